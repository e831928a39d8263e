"""Who runs an op that the library's CUDA kernels and Triton's both can: the faster, if measured.

The library's kernels do where nothing was measured. Forward and backward are two choices: what the
one keeps for the other (statistics, pre-activations, bit masks) is the same from both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning, tuning_asked

KIND = "backend of "  # what the keys of these choices begin with


@dataclass(frozen=True)
class Rival:
    by: str


RIVALS = Rival("native"), Rival("triton")  # the default first

_known: dict[tuple, tuple[str, str | None]] = {}  # by call: a string for each costs microseconds
MOST_KNOWN = 4096  # for inputs whose size never repeats


def faster(
    op: str, native: Callable, triton: Callable, device: torch.device, args: tuple
) -> tuple[str, str | None]:
    """Who runs the op, "native" or "triton", and what the choice rests on, for ``explain``.

    Args:
        native, triton: run the op, into results of their own.
    """
    call = op, device, *map(_seen, args)
    if call in _known:
        return _known[call]
    found = _measured(key(op, args), {"native": native, "triton": triton}, device, args)
    if found[1] is not None or not tuning_asked():
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[call] = found
    return found


def _seen(arg: object) -> object:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16
    return None if isinstance(arg, float) else arg


def _measured(
    name: str, work: dict[str, Callable], device: torch.device, args: tuple
) -> tuple[str, str | None]:
    try:
        by = tuning.choose(name, RIVALS, lambda rival: work[rival.by](*args), device).by
    except tuning.Unfit:  # of either: the default says so itself
        return RIVALS[0].by, None
    return by, tuning.told(tuning.measured(name, device))


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


def any_measured(device: torch.device) -> bool:
    """Whether any of these choices was measured on the GPU ``device``."""
    gpu = tuning.gpu_of(device)
    return gpu is not None and tuning.cache_of(gpu).holds(KIND)
