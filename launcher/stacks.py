"""The stacks of all ranks when a run hangs: where each rank waits, and which rank the others wait for."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread, get_ident
from types import FrameType
from typing import Any

from configs.versions import HOME
from monitoring.run_directory import RunDirectory

REQUEST = "detour-stacks"
"""Key in the store of the process group: its presence asks every rank for its stack."""
POLL_SECONDS = 3.0
STDERR = 2
"""File descriptor that leads to the rank's log."""
ANSWER_SECONDS = 10.0
"""Seconds that the ranks have to write their stacks. A rank that does not is suspended, or holds Python's lock."""
STUCK_SECONDS = 30.0
"""Seconds without Python's lock after which a rank's stacks are written by a thread that needs no lock."""
COLLECTIVES = "distributed_c10d.py"
"""File of torch's collectives."""


@dataclass(frozen=True)
class Stack:
    """Position of one rank, the first line of its file."""

    rank: int
    collective: str | None
    """torch's collective in which the rank waits; None if the rank is elsewhere."""
    position: str
    """Innermost line of Detour's own code."""


def answer_requests(store: Any, rank: int, directory: Path) -> None:
    """Write the calling thread's stack into the run directory when the launcher asks for it, from another thread.

    Native code that holds Python's lock blocks that thread. Then faulthandler writes all stacks into the rank's log.

    Args:
        store: A connection to the store of the process group, used by nobody else.
        rank: The rank of this process.
        directory: The run directory.
    """
    trained_by = get_ident()

    def wait() -> None:
        try:
            while not store.check([REQUEST]):
                faulthandler.dump_traceback_later(STUCK_SECONDS, file=STDERR)  # unless this loop comes here again
                time.sleep(POLL_SECONDS)
            write_stack(sys._current_frames()[trained_by], rank, directory)  # noqa: SLF001 - documented by Python
        except Exception as error:  # the store has gone with rank 0, or training has ended
            logging.getLogger(__name__).debug("no stack of rank %d: %s", rank, error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    Thread(target=wait, name="stacks", daemon=True).start()


def write_stack(frame: FrameType, rank: int, directory: Path) -> None:
    """Write the stack that ends in `frame`, and on a GPU the latest collectives of NCCL's flight recorder."""
    path = stack_file(directory, rank)
    path.parent.mkdir(exist_ok=True)
    summary = traceback.extract_stack(frame)
    first = json.dumps(asdict(Stack(rank, _collective(summary), _position(summary))))
    partial = path.with_suffix(".partial")
    partial.write_text(first + "\n" + "".join(traceback.format_list(summary)), encoding="utf-8")
    partial.rename(path)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        recorded = torch._C._distributed_c10d._dump_nccl_trace_json()  # noqa: SLF001 - no public call exists
        path.with_suffix(".nccl.json").write_bytes(recorded)


def stack_file(directory: Path, rank: int) -> Path:
    """Return the path of a rank's stack."""
    return RunDirectory(directory).stacks / f"rank-{rank}.txt"


def collect_stacks(store: Any, ranks: int, directory: Path, seconds: float = ANSWER_SECONDS) -> list[Stack]:
    """Ask every rank for its stack, and return those that came in time, by rank."""
    for old in RunDirectory(directory).stacks.glob("rank-*"):
        old.unlink(missing_ok=True)
    until = time.monotonic() + seconds
    try:
        store.set(REQUEST, "1")
    except RuntimeError:  # rank 0 does not answer
        until = time.monotonic()
    paths = [stack_file(directory, rank) for rank in range(ranks)]
    while not all(path.exists() for path in paths) and time.monotonic() < until:
        time.sleep(0.2)
    return [Stack(**json.loads(path.read_text("utf-8").partition("\n")[0])) for path in paths if path.exists()]


def culprit(stacks: Sequence[Stack], ranks: int) -> tuple[int | None, str | None, str]:
    """Find the rank that the others wait for.

    Args:
        stacks: The stacks that came, by rank.
        ranks: Number of ranks.

    Returns:
        The rank, or None if all wait alike; the collective in which the others wait; a sentence for people.
    """
    silent = sorted(set(range(ranks)) - {stack.rank for stack in stacks})
    waiting = [stack for stack in stacks if stack.collective]
    elsewhere = [stack for stack in stacks if not stack.collective]
    collective = waiting[0].collective if waiting else None
    others = f"; the others are in torch.distributed's {collective}, called by {waiting[0].position}" if waiting else ""
    if silent:
        named = ", ".join(map(str, silent[:8]))
        plural = "s" * (len(silent) > 1)
        sentence = (
            f"no answer from rank{plural} {named}, suspended or stuck in native code (then logs/worker-"
            f"{silent[0]}.log has the stacks){others}"
        )
        return silent[0], collective, sentence
    if waiting and elsewhere:
        return elsewhere[0].rank, collective, f"it is at {elsewhere[0].position}{others}"
    return None, collective, others.replace("; the others are", "all ranks are")


def _collective(stack: traceback.StackSummary) -> str | None:
    """Return the outermost of torch's collectives at the inner end of a stack."""
    names = [entry.name for entry in stack if entry.filename.endswith(COLLECTIVES)]
    return names[0] if names else None


def _position(stack: traceback.StackSummary) -> str:
    own = [entry for entry in stack if Path(entry.filename).is_relative_to(HOME) and ".venv" not in entry.filename]
    entry = (own or list(stack))[-1]
    path = Path(entry.filename)
    return f"{path.relative_to(HOME) if own else path}:{entry.lineno} ({entry.name})"
