"""The optimizer's update against torch's AdamW."""

from __future__ import annotations

import torch

from engine.device import device
from engine.megatron.adam import FusedAdam

DEVICE = device()


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((7, 5), (300,))]


def test_updates_equal_torchs_and_a_skipped_step_does_not_count() -> None:
    """`grad_scale` divides the gradients. Bias correction ignores a step whose count was undone."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    optimizer, reference = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)  # type: ignore[arg-type]
    for parameter in ours:
        optimizer.state[parameter].update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        gradients = [torch.randn(parameter.shape, generator=generator).to(DEVICE) for parameter in ours]
        for parameter, other, gradient in zip(ours, theirs, gradients, strict=True):
            parameter.grad, other.grad = gradient.clone(), gradient / 3.0
        skipped = step in (0, 3)
        if skipped:
            ours[1].grad[4] = float("nan")  # type: ignore[index]
        optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
        optimizer.step()
        if skipped:
            optimizer.undo_step_count()
        else:
            reference.step()
        for parameter, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
    assert [group["step"] for group in optimizer.param_groups] == [4]
