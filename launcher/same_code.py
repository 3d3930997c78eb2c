"""The check that all nodes of a run have the same code: a node with another version would train along unnoticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.errors import InputError
from configs.versions import own_code
from launcher.worker import WorkerInfo

MOST_NAMED = 5
"""Most differences named in the message."""


def check_same_code(workers: Sequence[WorkerInfo]) -> None:
    """Compare Detour's files on every node with those here, and the packages of the workers with each other.

    The packages of this process are not compared, because a head without GPUs may have another build of torch.

    Raises:
        InputError: A node differs; the message names node and difference.
    """
    first = workers[0]
    for worker in workers:
        if changed := differences(own_code(), worker.files):
            raise _other("files of Detour", worker.address, "here", changed)
        if changed := differences(first.packages, worker.packages):
            raise _other("packages", worker.address, f"on {first.address}", changed)


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the names whose values differ, with both values."""
    return [
        f"{name} ({theirs.get(name, 'missing')} instead of {ours.get(name, 'missing')})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _other(things: str, address: str, reference: str, changed: Sequence[str]) -> InputError:
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    return InputError(
        f"cluster.nodes: the node {address} has other {things} than {reference}: {', '.join(changed[:MOST_NAMED])}"
        f"{more}; install the same version of detour-train and its packages on every node",
        key="cluster.nodes",
        code="nodes-differ",
    )
