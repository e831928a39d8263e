"""The accuracy rule: a result may be as far from the truth as PyTorch's own, and no further.

``|out - ref| <= 2 * |eager - ref| + 4 * eps(dtype) * |ref|``, three times for gradients, where
``ref`` is computed in float64 and ``eager`` by PyTorch in the tested dtype. It must hold for the
largest element and for the L2 norm. ``fusedres.verify`` and the library's own tests use this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # of eager's error; calibrated on bn_act, then frozen
GRADIENT_FACTOR = 3.0
FLOOR = 4.0  # roundings of the largest value that are allowed where eager happens to be exact


@dataclass(frozen=True)
class Errors:
    """How far a result and eager's are from the reference, and how far the result may be.

    ``max_*`` are largest absolute differences; ``l2_*`` are L2 norms of the difference over the
    reference's (the difference's own norm where the reference is zero).
    """

    max_error: float
    max_bound: float
    l2_error: float
    l2_bound: float
    max_eager: float = 0.0
    l2_eager: float = 0.0

    @property
    def ok(self) -> bool:
        return self.max_error <= self.max_bound and self.l2_error <= self.l2_bound

    @property
    def ratio(self) -> float:
        """The share of the allowed error that is used; above 1 the result is wrong."""
        pairs = (self.max_error, self.max_bound), (self.l2_error, self.l2_bound)
        return max(_share(error, bound) for error, bound in pairs)


def errors(
    out: Tensor,
    ref: Tensor,
    eager: Tensor | Sequence[Tensor],
    *,
    gradient: bool = False,
    count: int = 1,
    scale: float = 0.0,
) -> Errors:
    """Measure ``out`` against the rule.

    Args:
        out: the tested result, any shape; integers and booleans must equal ``ref`` exactly.
        ref: the reference, of out's shape, in float64.
        eager: PyTorch's own result in the tested dtype, or several that are equally valid: the
            worst of them counts.
        gradient: allow three times eager's error instead of two.
        count: M of a result that sums M elements; the floor grows with sqrt(M).
        scale: the root mean square of a tensor that sums the same kind of terms: what the floor is
            a share of where ref's own is smaller, because its terms cancel.

    Returns:
        Errors. A NaN or Inf that the reference lacks, or lacks where the reference has it, is an
        infinite error; so it passes only where eager has one as well.

    Raises:
        ValueError: the shapes differ.
    """
    eagers = [eager] if isinstance(eager, Tensor) else list(eager)
    for name, t in (("out", out), *(("eager", e) for e in eagers)):
        if t.shape != ref.shape:
            raise ValueError(f"{name}: wanted ref's shape {tuple(ref.shape)}, got {tuple(t.shape)}")
    ref = ref.detach().double()
    max_error, l2_error = _distance(out, ref)
    if not out.is_floating_point():
        return Errors(max_error, 0.0, l2_error, 0.0)
    distances = [_distance(e, ref) for e in eagers]
    max_eager, l2_eager = (max(d[i] for d in distances) for i in range(2))
    factor = GRADIENT_FACTOR if gradient else FACTOR
    floor = FLOOR * torch.finfo(out.dtype).eps * count**0.5
    finite = ref[ref.isfinite()]
    largest = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    norm = finite.norm().item()
    length = max(scale * finite.numel() ** 0.5, norm) / (norm or 1.0)
    return Errors(
        max_error,
        factor * max_eager + floor * largest,
        l2_error,
        factor * l2_eager + floor * length,
        max_eager,
        l2_eager,
    )


def _distance(x: Tensor, ref: Tensor) -> tuple[float, float]:
    """The largest absolute difference and the relative L2 norm of the difference."""
    if not ref.numel():
        return 0.0, 0.0
    x = x.detach().to(ref)
    same = (x == ref) | (x.isnan() & ref.isnan())  # inf - inf would be NaN
    difference = torch.where(same, 0.0, x - ref).abs().nan_to_num(nan=float("inf"))
    norm = ref[ref.isfinite()].norm().item()
    return difference.max().item(), difference.norm().item() / (norm or 1.0)


def _share(error: float, bound: float) -> float:
    if error <= bound:
        return error / bound if 0 < bound < float("inf") else 0.0
    return error / bound if bound > 0 else float("inf")
