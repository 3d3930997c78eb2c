"""Training on an NVIDIA GPU: speed of ModernBERT at 8192 in BF16 and in every FP8 recipe the GPU has, against published
figures, against BF16, and against transformers in the same call; what FP8 learns, and whether it resumes exactly.

Packed rows of MedQuAD's documents. Without a GPU every row says that it was not measured. What the bars of base and
large are: real tokens per second of one H100.

    python -m benchmarks.gpu [--quick] [--json FILE]
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cpu_vs_transformers import documents_of, ours, race, theirs
from benchmarks.table import Row, arguments, report
from configs.errors import InputError
from configs.load import validate
from configs.schema import Monitoring, Phase, RunConfig
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from monitoring.log import read_metrics

BASE: dict[str, Any] = {"size": "base"}
LARGE: dict[str, Any] = {"size": "large"}
MODELS: dict[str, dict[str, Any]] = {
    "150M": BASE,
    "400M": LARGE,
    "1B": {"hidden_size": 1792, "intermediate_size": 3840, "num_hidden_layers": 28, "num_attention_heads": 28},
    "3B": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 40},
}
SPEEDS = (  # name, model, objective, published tokens/s of an H100, bar in tokens/s
    ("base, CLM, bf16", BASE, "clm", 239e3, 350e3),
    ("base, MLM 15 %, bf16", BASE, "mlm", 218e3, 420e3),
    ("large, CLM, bf16", LARGE, "clm", 116e3, 150e3),
)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def run_config(folder: Path, model: dict[str, Any], objective: str, **precision: str) -> RunConfig:
    source = {"name": "medquad", "text": "package://corpus/medquad.jsonl.gz", "shards": str(folder / "medquad")}
    return validate(
        RunConfig,
        {
            "name": "gpu",
            "model": {**model, "max_position_embeddings": 8192},
            "tokenizer": "package://tokenizer/modernbert",
            "data": {"sequence_length": 8192, "streams": 4, "sources": [source]},
            "batch": {"sequences": 16},
            "phases": [{"objective": objective, "steps": 3}],
            **precision,
        },
        "gpu",
    )


@contextmanager
def training(config: RunConfig, steps: int) -> Iterator[Callable[[int], int]]:
    """A function that trains so many steps more, waits for the device, and gives back their real tokens.

    Everything but logging and checkpoints is included. Three steps have been made to warm up.
    """
    from engine.objectives import objective_of
    from engine.optimizer import step as optimizer_step
    from engine.setup import open_trainer
    from engine.step import forward_backward

    with tempfile.TemporaryDirectory() as scratch:
        trainer = open_trainer(config, Path(scratch))
        objective = objective_of(config.phases[0], trainer.tokenizer, config.data.seed)
        batches = trainer.loader.steps(objective.targets(), trainer.layout.micro, 0, 3 + steps, None)

        def run(count: int) -> int:
            tokens = 0
            for batch in islice(batches, count):
                forward_backward(trainer, batch.micro_batches, objective.causal)
                optimizer_step(trainer.optimizer)
                tokens += sum(micro.tokens for micro in batch.micro_batches)
            torch.cuda.synchronize()
            return tokens

        with closing(trainer), closing(batches):
            run(3)
            yield run


def speed(config: RunConfig, steps: int) -> float:
    """Real tokens per second."""
    with training(config, steps) as run:
        started = time.perf_counter()
        tokens = run(steps)
        return tokens / (time.perf_counter() - started)


def idle_row(config: RunConfig) -> Row:
    """What of the steps' time the device runs no kernel in: copies, launches, the step's boundary."""
    steps = 5
    with training(config, steps) as run:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run(steps)
        ranges = [e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, reached = 0.0, min(span.start for span in ranges)
    whole = max(span.end for span in ranges) - reached
    for span in sorted(ranges, key=lambda span: span.start):  # kernels of several streams overlap
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return Row.at_most("base, CLM: device time not in kernels", (whole - busy) / 1e6, whole / 1e6, 0.05, "s")


def transformers_row(folder: Path, objective: str, repeats: int) -> Row:
    """The same documents: ours packed, theirs by eight, the Trainer's default, padded as its collator does, with its
    fastest attention here."""
    config = run_config(folder, BASE, objective, precision="bf16")
    documents = documents_of(config)
    attentions = ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
    theirs_best = 0.0
    for attention in attentions:
        batches = -(-len(documents) // 8)
        runner = theirs(documents, objective, torch.bfloat16, attention, model={}, device="cuda", batches=batches)
        theirs_best = max(theirs_best, race({"": runner}, repeats)[""])
    with ours(config) as mine:
        found = race({"": mine}, repeats)[""]
    name = f"base, {objective.upper()} against transformers ({' or '.join(attentions)})"
    return Row.at_least(name, found, theirs_best, 2.0, "real tokens/s")


def attention_rows(folder: Path, steps: int) -> list[Row]:
    """Transformer Engine's attention against torch's, which is the default."""
    rows = []
    for objective in ("clm", "mlm"):
        torchs, engines = (
            run_config(folder, BASE, objective, precision="bf16", attention=kernel)
            for kernel in ("torch", "transformer_engine")
        )
        name = f"base, {objective.upper()}: Transformer Engine's attention against torch's"
        try:
            found = speed(engines, steps)
        except Exception as error:  # it has no kernel for some of the layers without other packages
            print(f"{name}: not measured: {str(error).splitlines()[0]}")
            continue
        rows.append(Row.at_least(name, found, speed(torchs, steps), None, "real tokens/s"))
    return rows


def fp8_rows(folder: Path, recipe: str, steps: int) -> list[Row]:
    """Training in FP8: how far its loss is from BF16's after so many steps, and from its own after a restart."""
    from engine.trainer import train

    def losses(name: str, stop_after: int | None = None, **precision: str) -> list[float]:
        config = run_config(folder, BASE, "clm", **precision).model_copy(
            update={"phases": (Phase(objective="clm", steps=steps),), "monitoring": Monitoring(every="1 steps")}
        )
        calls = count(1)
        (folder / name).mkdir(exist_ok=True)
        train(config, folder / name, lambda: "stop" if next(calls) == stop_after else None)
        return [line["loss"] for line in read_metrics(folder / name)]

    fp8 = {"precision": "fp8", "fp8_recipe": recipe}
    plain, whole = losses("bf16", precision="bf16"), losses(recipe, **fp8)
    losses(f"{recipe}-resumed", steps // 2, **fp8)
    resumed = losses(f"{recipe}-resumed", **fp8)
    last = statistics.fmean(plain[-10:])
    apart = abs(statistics.fmean(whole[-10:]) - last)
    again = abs(resumed[steps // 2] - whole[steps // 2])
    return [
        Row.at_most(f"FP8 {recipe}: loss after {steps} steps apart from BF16's", apart, last, 0.01, "nats"),
        Row.at_most(f"FP8 {recipe}: first loss after a restart apart from the undisturbed", again, last, 0.0, "nats"),
    ]


def measure(folder: Path, quick: bool) -> list[Row]:
    from engine.precision import resolve_precision

    steps, sizes = (5, ["150M"]) if quick else (30, list(MODELS))
    first = run_config(folder, BASE, "clm")
    ensure_prepared(first.data, load_tokenizer(first.tokenizer))
    rows = []
    for name, model, objective, published, bar in SPEEDS:
        found = speed(run_config(folder, model, objective, precision="bf16"), steps)
        rows.append(Row.at_least(name, found, published, bar / published, "real tokens/s"))
    for size in sizes:
        plain = speed(run_config(folder, MODELS[size], "clm", precision="bf16"), steps)
        for recipe in RECIPES:
            config = run_config(folder, MODELS[size], "clm", precision="fp8", fp8_recipe=recipe)
            try:
                resolve_precision(config)
            except InputError as error:
                print(f"{size}, {recipe}: not measured: {error}")
                continue
            wanted = 1.3 if size == "3B" else None
            name, found = f"{size}, FP8 {recipe} against BF16", speed(config, steps)
            rows.append(Row.at_least(name, found, plain, wanted, "real tokens/s"))
            if size == "150M":
                rows += fp8_rows(folder, recipe, 20 if quick else 200)
    rows += attention_rows(folder, steps)
    rows.append(idle_row(run_config(folder, BASE, "clm", precision="bf16")))
    return rows + [transformers_row(folder, objective, 1 if quick else 3) for objective in ("clm", "mlm")]


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        names = [row[0] for row in SPEEDS] + [
            f"{size}, FP8 {recipe} against BF16" for size in MODELS for recipe in RECIPES
        ]
        names += [f"FP8 {recipe}: loss against BF16's, and after a restart" for recipe in RECIPES]
        names += ["base, CLM and MLM: Transformer Engine's attention against torch's"]
        names += ["base, CLM: device time not in kernels", "base, CLM and MLM against transformers"]
        print("\n".join(f"{name}: not measured, there is no NVIDIA GPU here" for name in names))
        if options.json:
            empty = dict.fromkeys(("ours", "peer", "ratio", "bar", "unit", "met"))
            options.json.write_text(json.dumps([{"name": name, **empty} for name in names], indent=1) + "\n")
        return
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.quick)
    dist.destroy_process_group()
    report(rows, options.json)


if __name__ == "__main__":
    main()
