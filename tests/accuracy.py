"""The accuracy rule of this project: as exact as PyTorch itself, measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.report.accuracy import errors


def assert_as_accurate_as_eager(
    out: Tensor,
    ref: Tensor,
    eager: Tensor | list[Tensor],
    *,
    gradient: bool = False,
    count: int = 1,
    name: str = "",
) -> None:
    """``out`` is within a small factor of eager PyTorch's own error, or of a few roundings.

    Args:
        out: what is tested.
        ref: the reference in float64 on upcast inputs.
        eager: the reference in the tested dtype; or several equally valid ones.
        gradient: whether these are gradients.
        count: how many elements each number is a sum of.
        name: of the tensor, for the message.
    """
    for other in [eager] if isinstance(eager, Tensor) else eager:
        assert out.dtype == other.dtype, f"{name}: {out.dtype}, eager has {other.dtype}"
    assert ref.dtype == torch.float64, f"{name}: the reference is {ref.dtype}"
    assert torch.isfinite(ref).all(), f"{name}: the reference is not finite"
    found = errors(out, ref, eager, gradient=gradient, count=count)
    assert found.ok, f"{name}: {found}"
