"""Release of a model's memory in a process that keeps running."""

from __future__ import annotations

from typing import Any


def release(ddp_model: Any, model: Any) -> None:
    """Break the reference cycles through which a closed model would keep its weights, gradients and optimizer.

    Python cannot see the cycles, because they pass through autograd's C++ nodes. Written for Megatron 0.16.1 and
    0.19.2: DistributedDataParallel keeps the nodes with its gradient hooks in `grad_accs`, and the configuration keeps
    the optimizer's `scale_loss` in `grad_scale_func`.
    """
    ddp_model.grad_accs.clear()
    model.config.grad_scale_func = None
