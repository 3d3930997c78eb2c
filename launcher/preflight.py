"""Checks before workers start: everything that can be wrong with a run is found here if it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from configs.errors import InputError
from configs.schema import SCRATCH, RunConfig
from datapipe.loader import check_sources
from datapipe.source import SourceSummary
from datapipe.tokenizer import Tokenizer
from datapipe.words import word_starts
from launcher.cluster import is_joined
from launcher.nodes import alive_nodes
from launcher.rules import require_enough, require_gpus, workers_per_node
from launcher.topology import Topology
from monitoring.events import DataDamaged, InitialModel, record

WORKING_COPIES = "working_dir_files"
"""Folder in which Ray keeps the working directories of submitted jobs."""


@dataclass(frozen=True)
class Plan:
    """A run that may start."""

    topologies: list[Topology]
    """Topologies that the run may take, the largest first; at least one."""
    precision: str
    """Precision of the training; the configured value if only the workers can resolve it."""


def require_lasting(directory: Path) -> None:
    """Raise InputError for a run directory in the copy of `--working-dir` that Ray keeps per node, and deletes."""
    if is_joined() and WORKING_COPIES in directory.parts:
        raise InputError(
            f"--output {directory} lies in Ray's copy of the job's working directory, which is another one on each "
            "node and is deleted with the job; give an absolute --output on storage that all nodes share",
            key="--output",
            code="output-in-working-copy",
        )


def check(config: RunConfig, tokenizer: Tokenizer, directory: Path, console: Console) -> Plan:
    """Check the model, its division over workers, the precision and the data, and report what will be left out.

    Raises:
        InputError: The run cannot start.
    """
    from engine.modernbert.config import parameter_count
    from engine.parallel import plan
    from engine.precision import resolve_precision
    from engine.run_inputs import run_architecture

    architecture = run_architecture(config, directory, tokenizer)
    if not tokenizer.frames_itself:
        console.print(f"[yellow]tokenizer:[/] documents are framed {escape(tokenizer.framing)}", highlight=False)
    precision: str = config.precision
    if not is_joined():  # the head of a cluster may have another device than the workers, which check for themselves
        precision = resolve_precision(config, parameter_count(architecture))
    topologies, problems = [], {}
    for topology in possible_topologies(config):
        try:
            plan(config, architecture, topology.workers, precision)
            topologies.append(topology)
        except InputError as error:
            problems[topology] = error
    if not topologies:
        raise list(problems.values())[-1]
    for topology, problem in problems.items():
        console.print(f"[yellow]{topology}: will not be used:[/] {escape(str(problem))}")
    if any(phase.mask_unit == "word" for phase in config.phases):
        word_starts(tokenizer)
    sources = check_sources(config.data, tokenizer, architecture.vocab_size)
    for source in sources:
        for problem_of_source in source.problems:
            console.print(f"[yellow]source {source.name}: will be skipped:[/] {escape(problem_of_source)}")
        if source.problems:
            event = DataDamaged(source=source.name, problems=len(source.problems), first=source.problems[0])
            record(directory, event)
    require_enough(config, sources)
    if config.data.evaluation is not None:
        for note in trained_on(sources):
            console.print(f"[yellow]data.evaluation:[/] {escape(note)}", highlight=False, soft_wrap=True)
    _tell_canaries(config, directory, console)
    return Plan(topologies, precision)


def trained_on(sources: Sequence[SourceSummary]) -> list[str]:
    """Say which training sources have shards of the evaluation set, the last of the sources."""
    *training, held_out = sources
    return [
        f"its shards are also those of the source {source.name}, so the run trains on its evaluation set"
        for source in training
        if source.contents & held_out.contents
    ]


def _tell_canaries(config: RunConfig, directory: Path, console: Console) -> None:
    """Keep the lists of planted secrets with the run, and tell that the text holds them."""
    from engine.run_inputs import keep_canaries

    try:
        found = keep_canaries(config, directory)
    except InputError as error:
        console.print(f"[yellow]canaries:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return
    for name, canaries in found.items():
        copies = sum(canary.copies for canary in canaries.canaries)
        console.print(
            f"[yellow]source {name}:[/] {len(canaries.planted):,} canaries (random secrets) are planted in {copies:,} "
            f"of its {canaries.documents:,} documents; `detour audit {escape(str(directory))}` measures leaks",
            highlight=False,
            soft_wrap=True,
        )


def check_initial_model(config: RunConfig, tokenizer: Tokenizer, directory: Path, console: Console) -> None:
    """Check and record the model that a new run starts from, and print what its start leaves out or makes anew.

    A model from scratch needs no file. `check` sees whether the recipe fits it.

    Raises:
        InputError: `model.init` cannot be read, does not hold exactly the model that the recipe asks for, or cannot be
            divided as the recipe says.
    """
    if config.model.init == SCRATCH:
        return
    from engine.initial_weights import check_initial_weights, initial_sha256
    from engine.modernbert.config import resolve_architecture
    from engine.parallel import require_fitting

    architecture = resolve_architecture(config.model, tokenizer)
    require_fitting(config, architecture)  # text is prepared next, which may take hours
    for note in check_initial_weights(config.model.init, architecture, tokenizer):
        console.print(f"[yellow]model.init:[/] {escape(note)}", soft_wrap=True, highlight=False)
    record(directory, InitialModel(init=config.model.init, sha256=initial_sha256(config.model.init)))


def possible_topologies(config: RunConfig) -> list[Topology]:
    """List topologies by the configuration and the devices of the cluster or of this machine, the most nodes first.

    Raises:
        InputError: The run needs a cluster and this process is in none, or a node has too few GPUs.
    """
    fewest, most = node_range(config)
    if config.cluster.gpus_per_node != "auto":
        gpus = config.cluster.gpus_per_node
    elif is_joined():
        gpus = max((node.gpus for node in alive_nodes()), default=0)
    else:
        import torch

        gpus = torch.cuda.device_count()
    per_node = workers_per_node(config, gpus)
    require_gpus(per_node, gpus)
    return [Topology(number, per_node, gpu=gpus > 0) for number in range(most, fewest - 1, -1)]


def node_range(config: RunConfig) -> tuple[int, int]:
    """Return the fewest and the most nodes of the run.

    Raises:
        InputError: The run needs a cluster and this process is in none.
    """
    nodes = config.cluster.nodes
    fewest, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if is_joined():
        return fewest, most
    if fewest > 1:
        raise InputError(
            f"cluster.nodes: asked for {fewest} nodes, but this process is in no Ray cluster and would start one "
            "of 1 node here; set RAY_ADDRESS or use `ray job submit`, or lower --nodes to 1",
            key="cluster.nodes",
            code="no-cluster",
        )
    return 1, 1
