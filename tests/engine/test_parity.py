"""Logits against Hugging Face's ModernBERT in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertForMaskedLM

from datapipe.batch import Origin
from engine.modernbert.attention import QUERY_MULTIPLE, PackedDocuments
from engine.modernbert.config import DropoutRates
from engine.modernbert.convert import load_weights
from engine.modernbert.dropout import Dropout
from engine.modernbert.model import ModernBert, transformer_config

pytestmark = pytest.mark.usefixtures("alone")
BAR = 1e-4


def build(**fields: Any) -> tuple[ModernBertForMaskedLM, ModernBert, ModernBertConfig]:
    """A Hugging Face model with loud random weights, in which a wrong mask cannot hide, and ours with the same."""
    architecture = ModernBertConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "local_attention": 16,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "attn_implementation": "eager",
            **fields,
        }
    )
    torch.manual_seed(0)
    theirs = ModernBertForMaskedLM(architecture).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    state = theirs.state_dict()
    ours = ModernBert(transformer_config(architecture), architecture).eval()
    load_weights(ours, lambda name: state[name])
    return theirs, ours, architecture


def their_logits(theirs: ModernBertForMaskedLM, ids: torch.Tensor, causal: bool) -> torch.Tensor:
    """One document; a causal one through masks made by hand, which the eager path takes as they are."""
    if not causal:
        return theirs(ids[None]).logits[0]
    place = torch.arange(len(ids))
    distance = place[:, None] - place[None, :]
    reach = theirs.config.local_attention // 2

    def mask(allowed: torch.Tensor) -> torch.Tensor:
        return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]

    masks = {
        "full_attention": mask(distance >= 0),
        "sliding_attention": mask((distance >= 0) & (distance <= reach)),
    }
    return theirs(ids[None], attention_mask=masks).logits[0]


@torch.no_grad()
def largest_difference(
    theirs: ModernBertForMaskedLM, ours: ModernBert, lengths: tuple[int, ...], causal: bool, seed: int = 1
) -> float:
    ids = torch.randint(0, theirs.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    expected = torch.cat([their_logits(theirs, document, causal) for document in ids.split(lengths)])
    packed = PackedDocuments.from_lengths(lengths, causal, ids.device)
    found = ours(ids[None], packed)[:, : theirs.config.vocab_size]
    assert expected.abs().max() > 0.1, "logits too small to tell anything"
    return float((found - expected).abs().max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(200,), (1,), (30, 1, 2, 170, 64), (300, 40, 5, 5, 5, 5), (64, 64)])
def test_packed_documents(lengths: tuple[int, ...], causal: bool) -> None:
    theirs, ours, _ = build()
    assert largest_difference(theirs, ours, lengths, causal) <= BAR


@torch.no_grad()
def test_weights_are_used_by_their_modules_calls_alone() -> None:
    """Megatron waits for weights that other ranks send in a hook of each module's call, and nowhere else."""
    _, ours, _ = build()
    waiting = {name: module for name, module in ours.named_modules() if [*module.parameters(recurse=False)]}
    for name, module in list(waiting.items()):
        module.register_forward_pre_hook(lambda *_, name=name: waiting.pop(name, None) and None)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    ours(ids, PackedDocuments.from_lengths((9,), True, ids.device))
    assert not waiting


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([1, 2, 3]),
    dim=st.sampled_from([8, 16, 32]),
    layers=st.integers(1, 5),
    every=st.integers(1, 4),
    local=st.sampled_from([2, 6, 32, 128]),
    thetas=st.sampled_from([(160000.0, 10000.0), (80000.0, 10000.0), (1000.0, 500.0)]),
    activation=st.sampled_from(["gelu", "silu"]),
    old_style=st.booleans(),
    causal=st.booleans(),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
)
def test_random_configurations(
    heads: int,
    dim: int,
    layers: int,
    every: int,
    local: int,
    thetas: tuple[float, float],
    activation: str,
    old_style: bool,
    causal: bool,
    lengths: list[int],
) -> None:
    rope: dict[str, Any] = {"global_rope_theta": thetas[0], "local_rope_theta": thetas[1]}
    if not old_style:
        kinds = ("full_attention", "sliding_attention")
        rope = {
            "rope_parameters": {
                k: {"rope_type": "default", "rope_theta": t} for k, t in zip(kinds, thetas, strict=True)
            }
        }
    theirs, ours, architecture = build(
        hidden_size=heads * dim,
        intermediate_size=24 * heads,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        global_attn_every_n_layers=every,
        local_attention=local,
        classifier_activation=activation,
        **rope,
    )
    assert architecture.rope_parameters["full_attention"]["rope_theta"] == thetas[0]
    assert largest_difference(theirs, ours, tuple(lengths), causal) <= BAR


def test_a_causal_token_gets_no_gradient_from_the_future_or_another_document() -> None:
    _, ours, architecture = build()
    lengths = (50, 70, 30)
    ids = torch.randint(0, architecture.vocab_size, (1, sum(lengths)))
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = ours.embedding.register_forward_hook(keep)
    logits = ours(ids, PackedDocuments.from_lengths(lengths, causal=True, device=ids.device))
    handle.remove()
    position = 90  # inside the second document
    logits[position].sum().backward()
    reached = seen[0].grad[:, 0].abs().sum(dim=1) > 0
    assert reached[50:91].all()
    assert not reached[:50].any()
    assert not reached[91:].any()


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["small logits", "logits that exp alone would overflow on"])
def test_loss_on_paying_positions_equals_cross_entropy_of_the_logits(scale: float) -> None:
    _, ours, architecture = build()
    with torch.no_grad():
        ours.lm_head.norm.weight.mul_(scale)
    lengths = (40, 60)
    ids = torch.randint(0, architecture.vocab_size, (1, 100))
    paying = torch.tensor([3, 17, 40, 41, 99])
    labels = torch.randint(0, architecture.vocab_size, (5,))
    packed = PackedDocuments.from_lengths(lengths, causal=False, device=ids.device)
    with torch.no_grad():
        labels[:2] = ours(ids, packed)[paying[:2]].argmax(dim=1)
        evaluated, right = ours(ids, packed, paying, labels)
    loss, _ = ours(ids, packed, paying, labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    logits = ours(ids, packed)[paying, : architecture.vocab_size]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(torch.stack((loss, evaluated)), expected.expand(2), rtol=1e-6, atol=1e-6)
    assert int(right) == int((logits.argmax(dim=1) == labels).sum()) >= 2
    for name, parameter in ours.named_parameters():
        largest = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6).map(tuple),
    rate=st.sampled_from([0.0, 0.15, 0.9]),
    rates=st.sampled_from([None, DropoutRates(seed=3, embedding=0.1, attention_output=0.2, mlp=0.3)]),
)
def test_a_global_last_layer_computes_the_labels_alone(
    layers: int, lengths: tuple[int, ...], rate: float, rates: DropoutRates | None
) -> None:
    """Loss, right predictions and all gradients are those of the whole layer; documents without a label included."""
    _, ours, architecture = build(num_hidden_layers=layers)
    tokens, device = sum(lengths), torch.device("cpu")
    generator = np.random.default_rng(tokens)
    places = np.flatnonzero(generator.random(tokens) < rate)
    labels = torch.from_numpy(generator.integers(0, 300, len(places)))
    ids = torch.randint(0, architecture.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(2))
    dropout = rates and Dropout.of_rows(rates, [Origin(3, 7, ())], tokens, device)
    rows: list[int] = []
    ours.decoder.final_layernorm.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    found = []
    for needed in (None, places):
        packed = PackedDocuments.from_lengths(lengths, False, device, dropout, needed)
        ours.zero_grad()
        loss, _ = ours(ids, packed, torch.from_numpy(places), labels)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
        with torch.no_grad():
            found.append((ours(ids, packed, torch.from_numpy(places), labels), gradients))
    (whole, expected), (selected, gradients) = found
    torch.testing.assert_close(selected, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * (1 + float(gradient.abs().max())))
    is_global = layers in (1, 4)
    queries = len(np.union1d(places, np.cumsum((0, *lengths[:-1]))))
    assert rows[2] == (-(-queries // QUERY_MULTIPLE) * QUERY_MULTIPLE if is_global else tokens)


@torch.no_grad()
@pytest.mark.parametrize("style", [{}, {"local_rope_theta": 160000.0, "global_attn_every_n_layers": 2}])
def test_transformers_decoder_computes_our_causal_logits(style: dict[str, Any]) -> None:
    """The causal model that was trained is the decoder that is exported, its window included."""
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    from engine.modernbert.huggingface import decoder_config, decoder_weights

    theirs, ours, architecture = build(**style)
    config = decoder_config(architecture, torch.float32)
    decoder = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**config)).eval()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        weights |= decoder_weights(name, tensor)
    assert not decoder.load_state_dict(weights, strict=False).unexpected_keys
    ids = torch.randint(0, architecture.vocab_size, (120,))
    packed = PackedDocuments.from_lengths((120,), True, ids.device)
    found = ours(ids[None], packed)[:, : architecture.vocab_size]
    assert float((found - decoder(ids[None]).logits[0]).abs().max()) <= BAR
