"""Batch norm's running statistics: changed after the forward, once a step, never inside an op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def update_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    shape: torch.Size,
    momentum: float | Tensor,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance unbiased, in place.

    Args:
        mean, var: [C]; the batch's mean and biased variance.
        shape: of the normalised tensor [N, C, ...]; gives the number of values a channel.
        momentum: a number, or a one-element tensor (cumulative average).
    """
    numel = math.prod(shape)  # Size.numel() makes a constant of a dynamic dimension
    if running_mean is None or running_var is None or numel == 0 or recomputing():
        return
    count = numel // shape[1]
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            batch = batch.to(running.dtype)
            if isinstance(momentum, Tensor):
                running.mul_(1 - momentum).add_(batch * momentum)
            else:
                running.mul_(1 - momentum).add_(batch, alpha=momentum)


def update_together(
    running: Sequence[tuple[Tensor, Tensor]],
    batch: Sequence[tuple[Tensor, Tensor]],
    shapes: Sequence[torch.Size],
    momentum: float,
) -> None:
    """``update_running_stats`` of several norms, in as many calls as one takes; the same bits.

    Running and batch statistics are of one dtype.
    """
    counts = [shape.numel() // shape[1] for shape in shapes]
    means, variances = zip(*batch, strict=True)
    with torch.no_grad():
        unbiased = torch._foreach_mul(list(variances), [n / (n - 1) for n in counts])
        old = [t for pair in zip(*running, strict=True) for t in pair]
        torch._foreach_mul_(old, 1 - momentum)
        torch._foreach_add_(old, [*means, *unbiased], alpha=momentum)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``; an error leaves the norm as it was.

    PyTorch's batch norm counts a batch before it looks whether it can normalise it.
    """
    counted = getattr(norm, "num_batches_tracked", None)
    if type(counted) is not Tensor or not norm.training or torch.compiler.is_compiling():
        return norm(x)
    before = counted.clone()
    try:
        return norm(x)
    except Exception:
        with torch.no_grad():
            counted.copy_(before)
        raise


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing repeats it there.

    PyTorch's own batch norm counts such a batch twice (pytorch#96136); here it counts once.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
