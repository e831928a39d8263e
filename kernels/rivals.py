"""Who runs an op that the library's CUDA kernels and Triton's both can: the faster, if measured.

The library's kernels do where nothing was measured. Forward and backward are two choices: what the
one keeps for the other (statistics, pre-activations, bit masks) is the same from both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning

KIND = "backend of "  # what the keys of these choices begin with


@dataclass(frozen=True)
class Rival:
    by: str


RIVALS = Rival("native"), Rival("triton")  # the default first


def key(op: str, args: tuple) -> str:
    """What a measured choice depends on, besides the GPU: all arguments but factors and eps."""
    return "|".join((KIND + op, *(_part(a) for a in args if not isinstance(a, float))))


def _part(arg: object) -> str:
    if not isinstance(arg, Tensor):
        return str(arg)
    parts = [str(arg.dtype).removeprefix("torch."), "x".join(map(str, arg.shape))]
    if not arg.is_contiguous():
        nhwc = arg.dim() == 4 and arg.is_contiguous(memory_format=torch.channels_last)
        parts.append("NHWC" if nhwc else "strided")
    if arg.data_ptr() % 16:
        parts.append("misaligned")
    return " ".join(parts)


def faster(
    op: str, native: Callable, triton: Callable, device: torch.device, args: tuple
) -> tuple[str, str | None]:
    """"native" or "triton", and what the choice rests on, for ``explain``.

    Args:
        native, triton: run the op, into results of their own.
    """
    name, work = key(op, args), {"native": native, "triton": triton}
    try:
        by = tuning.choose(name, RIVALS, lambda rival: work[rival.by](*args), device).by
    except tuning.Unfit:  # of either: the default says so itself
        return RIVALS[0].by, None
    return by, tuning.told(tuning.measured(name, device))


def known(device: torch.device) -> bool:
    """Whether any of these choices was measured on the GPU ``device``."""
    gpu = tuning.gpu_of(device)
    return gpu is not None and tuning.cache_of(gpu).holds(KIND)
