"""The gradient's norm by layer: how strongly an objective pulls at each depth of the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.module import param_is_not_shared

from engine.device import device
from engine.megatron.cpu import squared_norm
from engine.megatron.names import global_name
from engine.megatron.optimizer import PARTS, members


class GradientNorms:
    """Computes the L2 norm of the gradient, before clipping, of each part of the whole model.

    Written for Megatron 0.16.1 and 0.19.2: between `prepare_gradients` and `update`, a rank's range of a parameter has
    its gradient in `grad` of its main parameter. Those that Megatron's own norm counts are counted here.

    Args:
        model: This rank's pipeline stage.
        optimizer: The result of `build_optimizer`.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        order = parts(model.config.num_layers)
        names = {parameter: global_name(model, name) for name, parameter in model.named_parameters()}
        rows = []
        self._counted: list[Any] = []
        for member in members(optimizer):
            for parameter, (group, position) in member.model_param_group_index_map.items():
                main = member.optimizer.param_groups[group]["params"][position]
                if param_is_not_shared(main) and tensor_parallel.param_is_not_tensor_parallel_duplicate(main):
                    self._counted.append(main)
                    rows.append(order.index(_part(names[parameter])))
        self._count, self._rows = len(order), torch.tensor(rows, dtype=torch.int64, device=device())

    def compute(self) -> torch.Tensor:
        """Return the norms, [parts] fp32 on the device, in the order of `parts`; every rank calls it.

        The host does not wait for the device. A frozen part has 0. The squares sum up to that of the global norm.
        """
        squares = torch.zeros(self._count, dtype=torch.float64, device=device())
        if self._counted:
            grads = [main.grad for main in self._counted]
            if device().type == "cpu":
                own = torch.stack([squared_norm(grad) for grad in grads])
            else:
                own = torch.stack(torch._foreach_norm(grads)).double().square()
            squares.index_add_(0, self._rows, own)
        dist.all_reduce(squares)
        return squares.sqrt().float()


def parts(num_layers: int) -> list[str]:
    """Return `embeddings`, the layers of the whole model from `0`, and `head`, which includes the final norm."""
    return ["embeddings", *map(str, range(num_layers)), "head"]


def _part(name: str) -> str:
    if name.startswith("decoder.layers."):
        return name.split(".")[2]
    return "embeddings" if name.startswith(PARTS["embeddings"]) else "head"
