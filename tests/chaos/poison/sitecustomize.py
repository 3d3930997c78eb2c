"""Python runs this at start where the folder is on its path: the workers' sequence 7 of stream 1 has a loss of NaN."""

from __future__ import annotations

import math
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any


class _Poisoner(MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "engine.step":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            stage, original, bad = module.staged, module._forward, []

            def staged(micro: Any, causal: bool) -> Any:
                result = stage(micro, causal)
                if any((origin.stream, origin.number) == (1, 7) for origin in micro.origins):
                    bad.append(result)
                return result

            def forward(micro: Any, *rest: Any) -> Any:
                output, loss = original(micro, *rest)
                return (output * math.nan if any(micro is one for one in bad) else output), loss

            module.staged, module._forward = staged, forward

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Poisoner())
