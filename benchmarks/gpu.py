"""Training on an NVIDIA GPU: speed of ModernBERT at 8192, in BF16 and in every FP8 recipe of the GPU.

The peers are published figures, BF16, and transformers in the same call. Further rows: the loss under FP8, and if FP8
resumes exactly. The rows are packed from MedQuAD's documents. Without a GPU every row says that it was not measured.

    python -m benchmarks.gpu [--quick] [--json FILE] [PART ...]

Parts: speed, changes, changes-large, fp8, fp8-loss, attention, deterministic, staging, idle, transformers. On an H100
or H200 speed and idle take a minute, fp8 three with --quick, fp8-loss four, the two parts of changes about seven each
(estimated). `changes` names the milliseconds that each change to the model was predicted to save, and measures those it
saves: base's, and `changes-large` those of larger models.
FILE has every row as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import ModernBertConfig

from benchmarks.changes import (
    BASE_CLM,
    BASE_MLM,
    BILLION_FP8,
    CHANGES,
    FOUR_ROWS,
    LARGE_CLM,
    LARGE_FP8,
    ONE_ROW,
    Change,
)
from benchmarks.cpu_vs_transformers import documents_of, ours, race, theirs
from benchmarks.table import Row, report, write
from configs.load import validate
from configs.schema import Checkpoint, Monitoring, Phase, RunConfig
from configs.units import Duration
from datapipe.loader import Loader
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from engine.build import build
from engine.checkpoint import step_directory
from engine.device import HostCopy, device, total_memory_bytes
from engine.modernbert import convert
from engine.objectives import objective_of
from engine.parallel import Layout, initialise
from engine.precision import resolve_precision
from engine.step import to_device_batch
from engine.trainer import train
from monitoring.log import read_metrics

BASE: dict[str, Any] = {"size": "base"}
LARGE: dict[str, Any] = {"size": "large"}
MODELS: dict[str, dict[str, Any]] = {
    "150M": BASE,
    "400M": LARGE,
    "1B": {"hidden_size": 1792, "intermediate_size": 3840, "num_hidden_layers": 28, "num_attention_heads": 28},
    "3B": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 40},
}
SPEEDS = (  # name, model, objective, rows per step, published tokens/s of an H100, bar in tokens/s
    (BASE_CLM, BASE, "clm", 16, 239e3, 440e3),
    (BASE_MLM, BASE, "mlm", 16, 218e3, 500e3),
    (LARGE_CLM, LARGE, "clm", 16, 116e3, 196e3),
    (FOUR_ROWS, BASE, "clm", 4, 239e3, 370e3),
)
BF16 = {"precision": "bf16"}
DELAYED = {"precision": "fp8", "fp8_recipe": "delayed"}
CHANGE_RUNS: dict[str, tuple[dict[str, Any], str, int, int, dict[str, Any]]] = {
    BASE_CLM: (BASE, "clm", 16, 16, BF16),
    BASE_MLM: (BASE, "mlm", 16, 16, BF16),
    FOUR_ROWS: (BASE, "clm", 4, 4, BF16),
    ONE_ROW: (BASE, "clm", 1, 1, BF16),
    LARGE_CLM: (LARGE, "clm", 16, 8, BF16),
    LARGE_FP8: (LARGE, "clm", 8, 8, DELAYED),
    BILLION_FP8: (MODELS["1B"], "clm", 4, 4, DELAYED),
}
"""Model, objective, rows per step and micro-batch, and precision of the runs that `changes` measures.

The micro-batches fit into 80 GB, and every change has the same ones.
"""
FP8_BARS = {"400M": 1.0, "1B": 1.3, "3B": 1.4}
"""Speed of FP8 relative to BF16, by model."""
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
SECONDS = 10
"""For which a speed is measured, after the warm-up; at least 3 steps."""
SKIP = 8
"""Steps before those that are measured: until the packing buffers have turned over, they give long documents first."""


def run_config(
    folder: Path,
    model: dict[str, Any],
    objective: str,
    sequences: int = 16,
    length: int = 8192,
    micro: int | None = None,
    **precision: Any,
) -> RunConfig:
    source = {"name": "medquad", "text": "package://corpus/medquad.jsonl.gz", "shards": str(folder / "medquad")}
    return validate(
        RunConfig,
        {
            "name": "gpu",
            "model": {**model, "max_position_embeddings": 8192},
            "tokenizer": "package://tokenizer/modernbert",
            "data": {"sequence_length": length, "streams": min(4, sequences), "sources": [source]},
            "batch": {"sequences": sequences, "micro": micro or "auto"},
            "phases": [{"objective": objective, "steps": 3}],
            **precision,
        },
        "gpu",
    )


def quick_weights(architecture: ModernBertConfig, seed: int) -> Callable[[str], torch.Tensor]:
    """In place of the real initialisation, which for 3B takes a CPU longer than the measurement."""
    shapes = convert.parameter_shapes(architecture)
    return lambda name: torch.randn(shapes[name], device=device()).mul_(0.02) + float(name.endswith("norm.weight"))


@contextmanager
def training(config: RunConfig) -> Iterator[Callable[[int], int]]:
    """A function that trains so many steps more, waits for the device, and gives back their real tokens.

    Everything but logging and checkpoints is included. Three steps have been made to warm up.
    """
    with tempfile.TemporaryDirectory() as scratch, mock.patch("engine.build.random_weights", quick_weights):
        components = build(config, Path(scratch))
        span = components.schedule.spans[0]
        data = components.batches(span, components.begin_phase(span), 0, 10**6, None)
        for _ in islice(data, SKIP):
            pass

        def run(count: int) -> int:
            tokens = 0
            unread: HostCopy | None = None
            for batch in islice(data, count):
                losses, _ = components.runner.forward_backward(batch.staged)
                components.runner.optimizer_step(losses)
                if unread:
                    unread.read()  # a step late, as the training loop does
                unread = HostCopy(losses)
                tokens += sum(micro.tokens for micro in batch.micro_batches)
            torch.cuda.synchronize()
            return tokens

        with closing(components), closing(data):
            run(3)
            yield run


def speed(config: RunConfig, quick: bool) -> float:
    """Real tokens per second."""
    with training(config) as run:
        started = time.perf_counter()
        run(1)
        steps = max(3, int((3 if quick else SECONDS) / (time.perf_counter() - started)))
        started = time.perf_counter()
        tokens = run(steps)
        return tokens / (time.perf_counter() - started)


def milliseconds(config: RunConfig, quick: bool) -> float:
    """Time of a step, over the same steps for every configuration of the same batches."""
    steps = 5 if quick else 30
    with training(config) as run:
        started = time.perf_counter()
        run(steps)
        return (time.perf_counter() - started) / steps * 1000


def predicted_changes(runs: Iterable[str] = CHANGE_RUNS) -> Iterator[tuple[str, Change, str]]:
    """Yield the name of a row, its change and its run, where the change was predicted to matter."""
    for run in runs:
        for name, change in CHANGES.items():
            if run in change.predicted:
                predicted = change.predicted[run]
                says = "not predicted" if predicted is None else f"predicted {predicted:+g} ms"
                yield f"{name}: {run}, {says}", change, run


def changes_rows(folder: Path, quick: bool, runs: Iterable[str] = CHANGE_RUNS) -> Iterator[Row]:
    """Measure a step with and without each change, and name the milliseconds that were predicted for it."""
    default: dict[str, float] = {}
    for name, change, run in predicted_changes(runs):
        model, objective, rows, micro, precision = CHANGE_RUNS[run]
        config_of = partial(run_config, folder, model, objective, sequences=rows, micro=micro, **precision)
        if run not in default:
            default[run] = measured(run, partial(milliseconds, config_of(), quick))
        other = measured(name, partial(with_the_other, change, config_of(**change.settings or {}), quick))
        before, after = (other, default[run]) if change.is_default else (default[run], other)
        if before and after:
            yield Row.at_most(name, after, before, None, "ms a step")


def with_the_other(change: Change, config: RunConfig, quick: bool) -> float:
    with change.other():
        return milliseconds(config, quick)


def measured(name: str, function: Callable[[], Any]) -> Any:
    """Return the function's result, or None if it fails, which stderr says. Its memory is free afterwards."""
    try:
        return function()
    except Exception as error:
        why = str(error).partition("\n")[0]  # which may be empty
        print(f"{name}: not measured: {type(error).__name__}: {why}", file=sys.stderr)
        return None
    finally:
        parallel_state.destroy_model_parallel()  # of a trainer that failed to open
        gc.unfreeze()  # a trainer freezes what lives at its start, as there is one in a process elsewhere
        gc.collect(), gc.collect()  # the first frees an optimizer, and with it what hid the model's cycles from it
        torch.cuda.empty_cache()


def speed_rows(folder: Path, quick: bool) -> Iterator[Row]:
    for name, model, objective, rows, published, bar in SPEEDS:
        config = run_config(folder, model, objective, sequences=rows, precision="bf16")
        if found := measured(name, partial(speed, config, quick)):
            yield Row.at_least(name, found, published, bar / published, "real tokens/s")


def fp8_speed_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure steps of 16 rows in every recipe, in micro-batches of as many rows as fit.

    The largest model takes rows of 2048 tokens where longer ones do not fit beside its 60 GB of weights, gradients and
    moments.
    """
    possible = recipes(folder)
    for size, model in reversed(MODELS.items()):
        length = 2048 if size == "3B" and total_memory_bytes() < 100e9 else 8192
        config_of = partial(run_config, folder, model, "clm", length=length)
        plain = measured(f"{size}, BF16", partial(speed, config_of(precision="bf16"), quick))
        for recipe in possible if plain else ():
            config = config_of(precision="fp8", fp8_recipe=recipe)
            name = f"{size}, FP8 {recipe} against BF16"
            if found := measured(name, partial(speed, config, quick)):
                yield Row.at_least(name, found, plain, FP8_BARS.get(size), "real tokens/s")


def recipes(folder: Path) -> list[str]:
    """Those that this GPU has; for the others stderr says why not."""
    return [
        recipe
        for recipe in RECIPES
        if measured(
            recipe, partial(resolve_precision, run_config(folder, BASE, "clm", precision="fp8", fp8_recipe=recipe), 0)
        )
    ]


def fp8_loss_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Training in FP8: how far its loss is from BF16's, and the first one after a restart from its own.

    A run goes on from the checkpoint that the undisturbed one wrote on its way. Two whole runs would differ in the
    last bits: the gradients of attention are added up in no fixed order.
    """
    steps = 20 if quick else 200  # of two rows, so that they take seconds

    def losses(directory: Path, stop: Callable[[], str | None] = lambda: None, **precision: Any) -> list[float]:
        more = {
            "phases": (Phase(objective="clm", steps=steps),),
            "monitoring": Monitoring(every=Duration(1, "steps")),
            "checkpoint": Checkpoint(every=Duration(steps // 2, "steps")),
        }
        directory.mkdir(exist_ok=True)
        train(run_config(folder, BASE, "clm", sequences=2, **precision).model_copy(update=more), directory, stop)
        return [line["loss"] for line in read_metrics(directory)]

    plain = measured("BF16's loss", partial(losses, folder / "bf16", precision="bf16"))
    for recipe in recipes(folder) if plain else ():
        fp8: dict[str, Any] = {"precision": "fp8", "fp8_recipe": recipe}
        last = statistics.fmean(plain[-10:])
        name = f"FP8 {recipe}: loss after {steps} steps apart from BF16's"
        if whole := measured(name, partial(losses, folder / recipe, **fp8)):
            yield Row.at_most(name, abs(statistics.fmean(whole[-10:]) - last), last, 0.01, "nats")
            name = f"FP8 {recipe}: first loss after a restart apart from the undisturbed"
            again = folder / f"{recipe}-again"
            shutil.copytree(folder / recipe, again)
            shutil.rmtree(step_directory(again / "checkpoints", steps))
            if resumed := measured(name, partial(losses, again, lambda: "measured", **fp8)):
                assert len(resumed) == steps // 2 + 1
                yield Row.at_most(name, abs(resumed[-1] - whole[len(resumed) - 1]), last, 0.0, "nats")


def attention_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Compare Transformer Engine's attention, the default, with torch's. Some layers may have no kernel in it."""
    for objective in ("clm", "mlm"):
        name = f"base, {objective.upper()}: Transformer Engine's attention against torch's"
        found = {}
        for kernel in ("transformer_engine", "torch"):
            config = run_config(folder, BASE, objective, precision="bf16", attention=kernel)
            if not (result := measured(f"{name} ({kernel})", partial(speed, config, quick))):
                break
            found[kernel] = result
        else:
            yield Row.at_least(name, found["transformer_engine"], found["torch"], None, "real tokens/s")


def deterministic_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure what a fixed order of additions costs."""
    for objective in ("clm", "mlm"):
        name = f"base, {objective.upper()}: deterministic against not"
        config = run_config(folder, BASE, objective, precision="bf16")
        plain = measured(name, partial(speed, config, quick))
        fixed = measured(name, partial(speed, config.model_copy(update={"deterministic": True}), quick))
        torch.use_deterministic_algorithms(False)  # for the rows that follow in this process
        os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)
        if plain and fixed:
            yield Row.at_least(name, fixed, plain, None, "real tokens/s")


def staging_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure the preparation of a batch of 16 rows, from shards to the GPU, by either backend."""
    config, count = run_config(folder, BASE, "mlm"), 10 if quick else 50

    def seconds(backend: str) -> float:
        initialise(Layout(1, 1, 1, False, ()), config.seed)
        tokenizer = load_tokenizer(config.tokenizer)
        data = config.data.model_copy(update={"backend": backend, "prefetch": 1})
        loader = Loader(data, config.batch.sequences, tokenizer, 0, 1, device().index)
        targets = objective_of(config.spans[0], tokenizer, data.seed).targets()
        with closing(loader.steps(targets, config.batch.sequences, 0, SKIP + count, None, to_device_batch)) as steps:
            for _ in islice(steps, SKIP):
                pass
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in steps:
                pass
            torch.cuda.synchronize()
            return (time.perf_counter() - started) / count

    numpy, dali = (measured(f"staging by {backend}", partial(seconds, backend)) for backend in ("numpy", "dali"))
    if numpy and dali:
        yield Row.at_most("MLM: staging a batch of 16 rows by dali against numpy", dali, numpy, None, "s")


def idle_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Share of the steps' time in which the device runs no kernel: copies, launches, the step's boundary."""

    def spans() -> list[tuple[float, float]]:
        with training(run_config(folder, BASE, "clm", precision="bf16")) as run:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                run(5)
            ranges = [e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sorted((span.start, span.end) for span in ranges)

    name = "base, CLM: device time not in kernels"
    if found := measured(name, spans):
        busy, reached = 0.0, found[0][0]
        whole = max(end for _, end in found) - reached
        for start, end in found:  # kernels of several streams overlap
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        yield Row.at_most(name, (whole - busy) / 1e6, whole / 1e6, 0.05, "s")


def flash_attentions() -> list[str]:
    """Name the flash-attn versions that transformers finds here, the newest first."""
    from transformers.utils import import_utils

    versions = (4, 3, 2)
    return [f"flash_attention_{n}" for n in versions if getattr(import_utils, f"is_flash_attn_{n}_available", bool)()]


def without_padding(padding: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a collator that lays documents end to end, with the labels that the padding one would give each."""
    from transformers import BatchEncoding, DataCollatorWithFlattening

    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def collate(documents: Any) -> BatchEncoding:
        alone = [padding([document]) for document in documents]
        return BatchEncoding(flatten([{key: one[key][0] for key in ("input_ids", "labels")} for one in alone]))

    return collate


def transformers_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure transformers on the same documents, without padding if it finds a flash-attn package here.

    Its batches hold eight documents, the Trainer's default, or as many as fit. Without such a package its collator
    pads them, because its other attentions take padded batches alone.
    """
    attentions = flash_attentions() or ["sdpa"]
    repeats = 1 if quick else 3
    for objective in ("clm", "mlm"):
        name = f"base, {objective.upper()} against transformers ({' or '.join(attentions)})"
        config = run_config(folder, BASE, objective, precision="bf16")
        documents = documents_of(config, SKIP)

        def peer(attention: str, size: int, objective: str = objective, documents: Any = documents) -> float:
            batches = -(-len(documents) // size)
            runner = theirs(
                documents,
                objective,
                torch.bfloat16,
                attention,
                model={},
                device="cuda",
                batches=batches,
                collator=without_padding if attention != "sdpa" else lambda padding: padding,
            )
            return race({"": runner}, repeats)[""]

        def detour(config: RunConfig = config) -> float:
            with ours(config, SKIP) as runner:
                return race({"": runner}, repeats)[""]

        peers = []
        for attention in attentions:
            tries = (
                measured(f"{name}: {attention}, by {size}", partial(peer, attention, size)) for size in (8, 4, 2, 1)
            )
            peers.append(next(filter(None, tries), None))
        found = measured(name, detour)
        if found and any(peers):
            yield Row.at_least(name, found, max(filter(None, peers)), 1.5, "real tokens/s")


PARTS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "speed": speed_rows,
    "changes": partial(changes_rows, runs=[run for run, (model, *_) in CHANGE_RUNS.items() if model is BASE]),
    "changes-large": partial(changes_rows, runs=[run for run, (model, *_) in CHANGE_RUNS.items() if model is not BASE]),
    "fp8": fp8_speed_rows,
    "fp8-loss": fp8_loss_rows,
    "attention": attention_rows,
    "deterministic": deterministic_rows,
    "staging": staging_rows,
    "idle": idle_rows,
    "transformers": transformers_rows,
}


def measure(folder: Path, parts: list[str], quick: bool, file: Path | None) -> list[Row]:
    first = run_config(folder, BASE, "clm")
    ensure_prepared(first.data, load_tokenizer(first.tokenizer))
    rows: list[Row] = []
    for part in parts:
        for row in PARTS[part](folder, quick):
            print(f"{row.name}: {row.ours:,.4g} {row.unit}, {row.ratio:.3g} of the peer's", file=sys.stderr)
            rows.append(row)
            if file:
                write(rows, file)
    return rows


def without_a_gpu() -> list[str]:
    """List the rows that a GPU would fill."""
    names = [row[0] for row in SPEEDS] + [f"{size}, FP8 {recipe} against BF16" for size in MODELS for recipe in RECIPES]
    names += [name for name, *_ in predicted_changes()]
    names += [f"FP8 {recipe}: loss against BF16's, and after a restart" for recipe in RECIPES]
    names += ["base, CLM and MLM: Transformer Engine's attention against torch's"]
    names += ["base, CLM and MLM: deterministic against not", "MLM: staging a batch of 16 rows by dali against numpy"]
    return [*names, "base, CLM: device time not in kernels", "base, CLM and MLM against transformers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--quick", action="store_true", help="shorter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        names = without_a_gpu()
        print("\n".join(f"{name}: not measured, there is no NVIDIA GPU here" for name in names))
        if options.json:
            empty = dict.fromkeys(("ours", "peer", "ratio", "bar", "unit", "met"))
            options.json.write_text(json.dumps([{"name": name, **empty} for name in names], indent=1) + "\n")
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch's default on Hopper; "deterministic" cannot set it later
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.parts or list(PARTS), options.quick, options.json)
    dist.destroy_process_group()
    if not rows:
        raise SystemExit("nothing was measured")
    print(torch.cuda.get_device_name())
    report(rows, None)


if __name__ == "__main__":
    main()
