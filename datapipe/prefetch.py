"""Making batches ahead of training, in a thread that gives way to the launch of GPU kernels."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator

from datapipe.batch import StepData


class LaunchGate:
    """Holds the data thread back while the training thread launches the kernels of a step on a GPU.

    The two threads share one interpreter. While kernels are launched the GPU has no work in store, so each pause of the
    launch makes the step longer. The loader closes the gate when training takes a batch. The step opens it when the GPU
    has all its work and the host is about to wait. On a CPU the gate stays open.
    """

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._opened.set()

    def open(self) -> None:
        """Let batches be made; called after a step's kernels are launched."""
        self._opened.set()

    def close(self) -> None:
        """Let no further batch be made until `open` is called."""
        self._opened.clear()

    def wait(self) -> None:
        """Wait until the gate is open."""
        self._opened.wait()


def prefetched(
    steps: Generator[StepData, None, None],
    depth: int,
    cancelled: threading.Event,
    gate: LaunchGate,
    *,
    closes: bool,
) -> Generator[StepData, None, None]:
    """Yield the same steps, made in advance in a thread that ends when this generator is closed.

    Args:
        steps: The steps to make.
        depth: Steps to make in advance.
        cancelled: Set at the end, so that the thread does not wait for a store that gives no answer.
        gate: Gate that the thread passes before each step.
        closes: Whether taking a step closes the gate. It stays open while no step is ready.
    """
    ready: queue.Queue[StepData | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()  # not `cancelled`, which a store sets that closes after an error
    gate.open()

    def put(item: StepData | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            while not stopped.is_set():
                gate.wait()
                step = next(steps, None)
                put(step)
                if step is None:
                    return
        except BaseException as error:
            put(error)
        finally:
            steps.close()

    thread = threading.Thread(target=work, name="detour-data", daemon=True)
    thread.start()
    try:
        while True:
            if ready.empty():
                gate.open()
            elif closes:
                gate.close()
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        cancelled.set()
        gate.open()
        thread.join()
