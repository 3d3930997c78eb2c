"""AdamW by torch's fused kernels, on a CPU and on a GPU, as Megatron's distributed optimizer takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import distrib_optimizer as distributed


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the contract of Apex's and Transformer Engine's FusedAdam: the step count is an int on the group.

    Megatron's checkpoint path for torch's own AdamW, whose step is a tensor a parameter, asserts before the first step
    and fails to reshard. Transformer Engine's reads neither of the two tensors below where no CUDA graph is captured,
    so that the host would have to wait for a step's gradients before it could launch the update.
    """

    grad_scale: torch.Tensor | None = None
    """[] fp32: the gradients are divided by it. The name is torch's."""
    found_inf: torch.Tensor | None = None
    """[] fp32: where it is 1, weights and moments stay as they are; the count does not know. The name is torch's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError("only AdamW, outside CUDA graphs")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self.state[param] for param in params]
            step = torch.full((), float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [step] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
            )

    def take_back(self) -> None:
        """The last step was none."""
        for group in self.param_groups:
            group["step"] -= 1


def use() -> None:
    """Have Megatron build this one."""
    megatron.Adam = distributed.Adam = FusedAdam
    megatron.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
