"""The stacks of a hang, and the rank that they accuse."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from launcher import stacks
from launcher.stacks import Stack, answer_requests, collect_stacks, culprit, stack_file
from tests.launcher.toy import ROOT


class Store(dict[str, str]):
    """A store of the process group in one process."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value


def test_the_stack_of_a_busy_thread_reaches_the_run_directory(tmp_path: Path) -> None:
    store, release, ready = Store(), threading.Event(), threading.Event()

    def all_reduce_of_a_test() -> None:
        answer_requests(store, 0, tmp_path)
        ready.set()
        release.wait(60)

    rank = threading.Thread(target=all_reduce_of_a_test)
    rank.start()
    ready.wait()
    stack_file(tmp_path, 1).parent.mkdir()
    stack_file(tmp_path, 1).write_text("of an earlier hang")
    try:
        (found,) = collect_stacks(store, ranks=2, directory=tmp_path, seconds=5)
    finally:
        release.set()
        rank.join()
    assert found.rank == 0 and "all_reduce_of_a_test" in found.position
    assert "release.wait(60)" in stack_file(tmp_path, 0).read_text()


def test_a_collective_is_read_off_the_stack(tmp_path: Path) -> None:
    code = compile("def all_reduce():\n    return sys._getframe()\n", f"/torch/{stacks.COLLECTIVES}", "exec")
    names: dict[str, object] = {"sys": sys}
    exec(code, names)
    stacks.write_stack(names["all_reduce"](), 0, tmp_path)  # type: ignore[operator]
    assert '"collective": "all_reduce"' in stack_file(tmp_path, 0).read_text()


def test_the_rank_that_the_others_wait_for_is_accused() -> None:
    waits = [Stack(rank, "all_reduce", "engine/step.py:9 (run)") for rank in (0, 1, 2)]
    busy = Stack(3, None, "datapipe/loader.py:7 (read)")
    rank, collective, sentence = culprit([*waits, busy], 4)
    assert (rank, collective) == (3, "all_reduce") and "loader.py:7" in sentence and "step.py:9" in sentence
    assert culprit(waits, 4)[:2] == (3, "all_reduce"), "suspended"
    assert culprit(waits, 3)[:2] == (None, "all_reduce")
    assert culprit([], 2)[:2] == (0, None)


def test_a_rank_that_holds_pythons_lock_in_native_code_leaves_its_stacks_in_its_log(tmp_path: Path) -> None:
    program = f"""
import ctypes, pathlib, time
from launcher import stacks
stacks.STUCK_SECONDS, stacks.POLL_SECONDS = 1.0, 0.1
class Store:
    def check(self, keys):
        return False
stacks.answer_requests(Store(), 0, pathlib.Path({str(tmp_path)!r}))
def stuck_kernel():
    ctypes.PyDLL(None).sleep(3)  # PyDLL keeps the lock
time.sleep(0.3)
stuck_kernel()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "stuck_kernel" in done.stderr, done.stderr
