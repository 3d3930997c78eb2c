"""Python runs this at start where the folder is on its path: the workers' sequence 7 of stream 1 has a loss of NaN.

The seam is `engine.build.build`, whose components the poison changes before the training loop has them.
"""

from __future__ import annotations

import math
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any


class _Poisoner(MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "engine.build":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            build = module.build

            def poisoned_build(*args: Any, **more: Any) -> Any:
                components = build(*args, **more)
                _poison(components)
                return components

            module.build = poisoned_build

        spec.loader.exec_module = exec_module
        return spec


def _poison(components: Any) -> None:
    """Multiply the model's output by NaN on micro-batches that hold the sequence."""
    bad: list[Any] = []
    batches = components.batches

    def watched_batches(*args: Any) -> Any:
        for step in batches(*args):
            bad[:] = [
                on_device.inputs
                for micro_batch, on_device in zip(step.micro_batches, step.staged, strict=True)
                if any((origin.stream, origin.number) == (1, 7) for origin in micro_batch.origins)
            ]
            yield step

    def forward(model: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return output * math.nan if any(inputs[0] is one for one in bad) else output

    components.batches = watched_batches
    components.runner.ddp_model.register_forward_hook(forward)


sys.meta_path.insert(0, _Poisoner())
