"""AdamW by torch's fused kernels, in the form that Megatron's distributed optimizer expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's and Transformer Engine's FusedAdam: the step count is an int on the group.

    torch's own AdamW keeps the step as a tensor per parameter. Megatron's checkpoint path for it asserts before the
    first step and cannot reshard. Transformer Engine's FusedAdam reads `grad_scale` and `found_inf` only while a CUDA
    graph is captured. The host would therefore have to wait for the gradient norm before it could launch the update.

    Written for torch 2.11 to 2.13: `torch._fused_adamw_` takes both tensors on CPUs and GPUs. Megatron fills
    `state[parameter]` with `exp_avg` and `exp_avg_sq`.
    """

    grad_scale: torch.Tensor | None = None
    """[] fp32: the update divides the gradients by it. The name is torch's."""
    found_inf: torch.Tensor | None = None
    """[] fp32: at 1 the update changes no weight and no moment. The name is torch's."""

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
        self._skipped: torch.Tensor | float = 0.0
        """[] fp32 on the device: skipped steps that the groups' step counts still include."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is part of torch's interface and ignored."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self.state[param] for param in params]
            step = torch.full((), float(group["step"]), device=params[0].device) - self._skipped
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
        if self.found_inf is not None:
            self._skipped = self._skipped + self.found_inf

    def undo_step_count(self) -> None:
        """Take a skipped step out of the step counts, once the host knows of it. Updates in between are exact."""
        for group in self.param_groups:
            group["step"] -= 1
        self._skipped = self._skipped - 1


def install() -> None:
    """Make Megatron build this optimizer and treat it as Apex's.

    Written for Megatron 0.16.1 and 0.19.2, which choose the class by these globals of two modules when they build an
    optimizer and when they save or load its state.
    """
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
