"""Detour against Hugging Face transformers on this machine's CPU: real tokens per second and peak memory.

Both sides train the same 17 M-parameter ModernBERT (the shape of Ettin's smallest) on the same documents, in one
process with the same threads, by turns. Detour packs the documents into rows. transformers gets them sorted by length,
as its Trainer's `group_by_length` does, in as many batches, or in more where those would not fit into memory; its
collator pads each batch to the longest document. Number format, attention and `torch.compile` of transformers are those
that are fastest here. The batches are those after the first 64: until a packing buffer has turned over, it gives long
documents first. Every batch is repeated, its fastest time counts, and these are added up: what other programs on the
machine took drops out.

    python -m benchmarks.cpu_vs_transformers [--quick] [--json FILE]
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.table import Row, arguments, report
from configs.load import validate
from configs.schema import RunConfig
from datapipe.batch import StepData
from datapipe.prepare import ensure_prepared
from datapipe.targets import NextToken
from datapipe.tokenizer import load_tokenizer
from engine.megatron import cpu
from engine.modernbert import linear_cross_entropy
from engine.precision import resolve_precision

MODEL = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4}
SKIP = 64
"""Batches before those that are measured."""
SLOTS = 4096
"""Packed token slots of a step."""
PADDED_SLOTS = 4 * 4096
"""Largest batch of transformers: its logits, several times over, must fit into 24 GB."""


class Runner(NamedTuple):
    """One side of a race: the work of each step, and the real tokens in all of it."""

    steps: Sequence[Callable[[], float]]
    tokens: int


def run_config(folder: Path, objective: str, length: int, rows: int, steps: int) -> RunConfig:
    """So many batches of packed rows of MedQuAD, whose documents have 812 tokens on average (11 to 10,873)."""
    source = {"name": "medquad", "text": "package://corpus/medquad.jsonl.gz", "shards": str(folder / "medquad")}
    return validate(
        RunConfig,
        {
            "name": "benchmark",
            "model": MODEL,
            "tokenizer": "package://tokenizer/modernbert",
            "data": {"sequence_length": length, "streams": rows, "sources": [source]},
            "batch": {"sequences": rows},
            "phases": [{"objective": objective, "steps": steps}],
        },
        "benchmark",
    )


@contextmanager
def ours(config: RunConfig, skip: int = SKIP) -> Iterator[Runner]:
    """Detour's own training step on its own batches; the process group of the caller, or of this process alone."""
    from engine.build import build

    with tempfile.TemporaryDirectory() as folder:
        components = build(config, Path(folder))
        span = components.schedule.spans[0]
        objective = components.begin_phase(span)
        data = list(islice(components.batches(span, objective, 0, skip + config.total_steps, None), skip, None))

        def step(batch: StepData) -> float:
            losses, _ = components.runner.forward_backward(batch.staged)
            components.runner.optimizer_step(losses)
            return float(losses.sum())

        work = [partial(step, batch) for batch in data]
        yield Runner(work, sum(micro.tokens for batch in data for micro in batch.micro_batches))
        components.close()


def theirs(
    documents: Sequence[list[int]],
    objective: str,
    dtype: torch.dtype,
    attention: str,
    sparse: bool = False,
    model: dict[str, Any] = MODEL,
    device: str = "cpu",
    *,
    batches: int,
    compiled: bool = False,
    collator: Callable[[Any], Any] | None = None,
) -> Runner:
    """The step of transformers' Trainer: its collator's batches, clipping, torch's fused AdamW.

    `collator` makes another collator of the one that pads. Without it the documents are sorted by length, as the
    Trainer's group_by_length does, so that little is padded.
    """
    from transformers import (
        DataCollatorForLanguageModeling,
        ModernBertConfig,
        ModernBertDecoderConfig,
        ModernBertDecoderForCausalLM,
        ModernBertForMaskedLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    shape: dict[str, Any] = {**model, "attn_implementation": attention}
    net: Any
    if objective == "clm":
        net = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**shape))
    else:
        net = ModernBertForMaskedLM(ModernBertConfig(**shape, sparse_prediction=sparse))
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer("package://tokenizer/modernbert").backend,
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=objective == "mlm", mlm_probability=0.15)
    forward = torch.compile(net, dynamic=True) if compiled else net
    if collator:
        collate, order = collator(collate), np.random.default_rng(0).permutation(len(documents))
    else:
        order = np.argsort([len(document) for document in documents], kind="stable")
    dealt = np.array_split(order, batches)
    collated = [collate([{"input_ids": documents[i]} for i in part]).to(device) for part in dealt]

    def step(batch: Any) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Runner([partial(step, batch) for batch in collated], sum(map(len, documents)))


def documents_of(config: RunConfig, skip: int = SKIP) -> list[list[int]]:
    """The documents of the run's batches; those longer than a row come in parts, on both sides."""
    from datapipe.loader import Loader

    tokenizer = load_tokenizer(config.tokenizer)
    loader = Loader(config.data, config.batch.sequences, tokenizer, 0, 1)
    return [
        document.tolist()
        for batch in islice(loader.steps(NextToken(), 1, 0, skip + config.total_steps, None), skip, None)
        for micro in batch.micro_batches
        for document in np.split(micro.inputs[: micro.tokens], micro.cu_seqlens[1:-1])
        if len(document)
    ]


def padded_batches(documents: Sequence[list[int]], length: int, steps: int) -> int:
    """Batches for transformers: one for each of our steps, or more, so that none exceeds PADDED_SLOTS."""
    return max(steps, -(-len(documents) * length // PADDED_SLOTS))


def race(runners: dict[str, Runner], repeats: int) -> dict[str, float]:
    """Real tokens per second of each, measured by turns."""
    best = {name: np.full(len(runner.steps), np.inf) for name, runner in runners.items()}
    for runner in runners.values():
        runner.steps[0]()  # warms up
    for _ in range(repeats):
        for name, runner in runners.items():
            for place, step in enumerate(runner.steps):
                started = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                best[name][place] = min(best[name][place], time.perf_counter() - started)
    return {name: runner.tokens / float(best[name].sum()) for name, runner in runners.items()}


class Fastest(NamedTuple):
    """The settings with which transformers is fastest here."""

    dtype: torch.dtype
    attention: str
    compiled: bool


def fastest(documents: Sequence[list[int]], objective: str, config: RunConfig) -> Fastest:
    """Choose the settings of transformers by the second step on four documents, torch.compile last.

    bf16 is tried only where the processor multiplies it: elsewhere it is emulated, for either side.
    """
    seconds: dict[Fastest, float] = {}

    def measure(settings: Fastest) -> None:
        dtype, attention, compiled = settings
        runner = theirs(documents[:4], objective, dtype, attention, batches=1, compiled=compiled)
        runner.steps[0]()  # warms up
        started = time.perf_counter()
        runner.steps[0]()
        seconds[settings] = time.perf_counter() - started
        how = ", compiled" if compiled else ""
        print(f"transformers {objective}, {dtype}, {attention}{how}: {seconds[settings]:.1f} s", file=sys.stderr)

    dtypes = (torch.float32, torch.bfloat16) if resolve_precision(config, 0) == "bf16" else (torch.float32,)
    for dtype, attention in product(dtypes, ("sdpa", "eager")):
        measure(Fastest(dtype, attention, compiled=False))
    try:
        measure(min(seconds, key=seconds.__getitem__)._replace(compiled=True))
    except Exception as error:  # torch.compile wants a C++ compiler, and may not take the model
        print(f"transformers {objective}, compiled: {type(error).__name__}: {error}", file=sys.stderr)
    return min(seconds, key=seconds.__getitem__)


def speed_rows(folder: Path, repeats: int) -> list[Row]:
    rows = []
    for objective, length, steps, bars, sparse_bar in (
        ("mlm", 1024, 4, {"bf16": 3.5}, 1.2),
        ("clm", 1024, 4, {"bf16": 2.3, "fp32": 1.5}, None),
        ("mlm", 4096, 6, {"bf16": 3.5}, None),
    ):
        config = run_config(folder, objective, length, SLOTS // length, steps)
        bar = bars.get(resolve_precision(config, 0))
        documents = documents_of(config)
        with ours(config) as mine:
            dtype, attention, compiled = fastest(documents, objective, config)
            batches = padded_batches(documents, length, steps)
            peer = partial(theirs, documents, objective, dtype, attention, batches=batches, compiled=compiled)
            runners = {"Detour": mine, "transformers": peer()}
            if sparse_bar:
                runners["transformers, sparse_prediction"] = peer(sparse=True)
            speeds = race(runners, repeats)
        for (other, speed), wanted in zip(list(speeds.items())[1:], (bar, sparse_bar), strict=False):
            name = f"{objective.upper()} at {length} against {other}"
            rows.append(Row.at_least(name, speeds["Detour"], speed, wanted, "real tokens/s"))
            report(rows[-1:], None)
    return rows


def peak_memory(folder: Path, side: str) -> int:
    """Peak resident bytes of a process that trains CLM at 4096; `whole`: ours, with all logits in one tile."""
    cpu.install()
    if side == "whole":
        linear_cross_entropy.TILE_BYTES["cpu"] = 2**40
    config = run_config(folder, "clm", 4096, SLOTS // 4096, 3)
    if side == "theirs":
        documents = documents_of(config)
        batches = padded_batches(documents, 4096, 3)
        for step in theirs(documents, "clm", torch.float32, "sdpa", batches=batches).steps:
            step()
    else:
        with process_group(1), ours(config) as mine:
            for step in mine.steps:
                step()
    status = Path("/proc/self/status").read_text()  # getrusage's maximum is inherited from the parent
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def data_parallel_speed(folder: Path, rank: int, size: int, store: str) -> float:
    """Real tokens per second of all ranks together, as one of `size` processes that share two threads."""
    cpu.install()
    torch.set_num_threads(2 // size)
    with process_group(size, rank, store), ours(run_config(folder, "mlm", 1024, 2 * SLOTS // 1024, 3)) as mine:
        speed = torch.tensor(race({"": mine}, 4)[""])
        dist.all_reduce(speed)
    return float(speed)


def data_parallel_row(folder: Path, repeats: int) -> Row:
    best = {1: 0.0, 2: 0.0}
    for repeat in range(repeats):
        for size in best:
            store = str(folder / f"store-{repeat}-{size}")
            speeds = in_processes(data_parallel_speed, [(folder, rank, size, store) for rank in range(size)])
            best[size] = max(best[size], *speeds)
    name = "two data-parallel processes of one thread against one of two"
    return Row.at_least(name, best[2], best[1], 0.9, "real tokens/s")


def overhead_row(folder: Path) -> Row:
    """Share of a step spent around the model: data, logging, guards and everything else of the loop."""
    from engine.build import build
    from engine.trainer import train_loop

    config = run_config(folder, "mlm", 1024, SLOTS // 1024, 12)
    inside, edges = [0.0], []

    def clocked(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            edges.append(time.perf_counter())
            result = work(*args, **more)
            edges.append(time.perf_counter())
            inside[0] += edges[-1] - edges[-2]
            return result

        return run

    (folder / "overhead").mkdir()
    with closing(build(config, folder / "overhead")) as components:
        runner = components.runner
        for work in ("forward_backward", "optimizer_step"):
            setattr(runner, work, clocked(getattr(runner, work)))
        train_loop(components)
    whole = edges[-1] - edges[0]  # the last save comes after it
    name = "time outside forward, backward and optimizer against the steps"
    return Row.at_most(name, whole - inside[0], whole, 0.03, "s")


@contextmanager
def process_group(size: int = 1, rank: int = 0, store: str | None = None) -> Iterator[None]:
    """torch.distributed over gloo."""
    shared = dist.FileStore(store, size) if store else dist.HashStore()
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=size)
    yield
    dist.destroy_process_group()


def in_processes(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """The results of as many new processes, which work at the same time."""
    with ProcessPoolExecutor(len(arguments), multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(function, *values) for values in arguments]]


def main() -> None:
    options = arguments(__doc__)
    cpu.install()
    repeats = 1 if options.quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = run_config(folder, "mlm", 1024, 4, 1)
        ensure_prepared(config.data, load_tokenizer(config.tokenizer))
        with process_group():
            rows = [*speed_rows(folder, repeats), overhead_row(folder)]
        mine, whole, peer = (
            in_processes(peak_memory, [(folder, side)])[0] / 2**30 for side in ("ours", "whole", "theirs")
        )
        rows.append(Row.at_most("peak memory of the process, CLM at 4096", mine, peer, 0.4, "GiB"))
        rows.append(Row.at_most("the same against all logits at once", mine, whole, None, "GiB"))
        rows.append(data_parallel_row(folder, repeats))
    report(rows, options.json)


if __name__ == "__main__":
    main()
