"""Training speed on an NVIDIA GPU: ModernBERT at 8192 in BF16 and in every FP8 recipe the GPU has.

Packed rows of MedQuAD's documents. Without a GPU every row says that it was not measured. What the bars of base and
large are: real tokens per second of one H100.

    python -m benchmarks.gpu [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import Row, arguments, report
from configs.errors import InputError
from configs.load import validate
from configs.schema import RunConfig
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer

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
            "phases": [{"objective": objective, "steps": 100}],
            **precision,
        },
        "gpu",
    )


def speed(config: RunConfig, steps: int) -> float:
    """Real tokens per second over `steps` steps after three, everything but logging and checkpoints included."""
    from engine.objectives import objective_of
    from engine.optimizer import step as optimizer_step
    from engine.setup import open_trainer
    from engine.step import forward_backward

    with tempfile.TemporaryDirectory() as scratch:
        trainer = open_trainer(config, Path(scratch))
        objective = objective_of(config.phases[0], trainer.tokenizer, config.data.seed)
        tokens, started = 0, 0.0
        for batch in trainer.loader.steps(objective.targets(), trainer.layout.micro, 0, 3 + steps, None):
            if batch.step == 3:
                torch.cuda.synchronize()
                started = time.perf_counter()
            forward_backward(trainer, batch.micro_batches, objective.causal)
            optimizer_step(trainer.optimizer)
            tokens += sum(micro.tokens for micro in batch.micro_batches) if batch.step >= 3 else 0
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        trainer.close()
    return tokens / elapsed


def measure(folder: Path, steps: int, sizes: list[str]) -> list[Row]:
    from engine.precision import resolve_precision

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
    return rows


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        names = [row[0] for row in SPEEDS] + [
            f"{size}, FP8 {recipe} against BF16" for size in MODELS for recipe in RECIPES
        ]
        print("\n".join(f"{name}: not measured, there is no NVIDIA GPU here" for name in names))
        if options.json:
            empty = dict.fromkeys(("ours", "peer", "ratio", "bar", "unit", "met"))
            options.json.write_text(json.dumps([{"name": name, **empty} for name in names], indent=1) + "\n")
        return
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), 5 if options.quick else 30, ["150M"] if options.quick else list(MODELS))
    dist.destroy_process_group()
    report(rows, options.json)


if __name__ == "__main__":
    main()
