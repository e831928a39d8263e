"""The ways to carry a convolution out, and what our kernels do not take.

Does not import Triton: the library's CUDA kernels are used without it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

# Tiles of the tensor-core instructions are 16 wide at least: narrower groups compute zeros.
NARROWEST_GROUP = 16
PACK = 8  # 16-bit elements of a 16-byte access


@dataclass(frozen=True)
class Way:
    """A way to carry a convolution out; for "triton" its output tile, step, warps and stages.

    Args:
        by: "triton"; "native", the library's CUDA kernel with this output tile; "aten"; "cudnn".
        k: input channels of a step, in 16 bits; half as many in 32.
        tma: whether tiles are loaded through tensor descriptors.
    """

    by: str
    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 0
    stages: int = 0
    tma: bool = False


ATEN, CUDNN = Way("aten"), Way("cudnn")
# In the order of csrc/cuda/conv.cuh's ConvVariant, which begins with "by size".
NATIVE = Way("native", 128, 128), Way("native", 128, 64), Way("native", 64, 64)
SM90 = tuple(Way("native", 128, n, tma=True) for n in (64, 128, 256))
SM90_NORM_CHANNELS = 2048  # csrc/cuda/conv_sm90_norm.cuh


@dataclass(frozen=True)
class Plan:
    """Who carries a convolution out.

    Args:
        by: "triton", "native", "aten" or "cudnn".
        why: what the choice rests on, for ``explain``.
        run: does it; None where that is left to the caller ("aten").
    """

    by: str
    why: str | None
    run: Callable[[], object] | None = None


def out_shape(x: Tensor, weight: Tensor, geometry: Sequence) -> tuple[int, ...]:
    stride, padding, dilation, _ = geometry
    sizes = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    )
    return x.shape[0], weight.shape[0], *sizes


def ours_by_default(weight: Tensor, groups: int) -> bool:
    """Whether our kernels go first where nothing is measured.

    Kernels of one pixel are limited by memory, and ours save passes; of the others, and of groups
    that fill no tensor-core tile, cuDNN is expected to be the faster.
    """
    narrow = groups > 1 and min(weight.shape[1], weight.shape[0] // groups) < NARROWEST_GROUP
    return math.prod(weight.shape[2:]) == 1 and not narrow


def why_not(x: Tensor, weight: Tensor, geometry: Sequence) -> str | None:
    """Why the kernels do not take this convolution, or None; aten refuses wrong operands better."""
    if x.dim() != 4 or weight.dim() != 4:
        return "the kernels convolve two dimensions"
    groups = geometry[3]
    fits = x.dtype == weight.dtype and x.device == weight.device
    if not fits or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % max(1, groups):
        return "the operands do not fit together"
    sizes = out_shape(x, weight, geometry)
    if min(*sizes, weight.numel(), x.numel()) <= 0:
        return "there is nothing to compute"
    formats = (suggest_memory_format(t) for t in (x, weight))
    if torch.channels_last not in formats and sizes[2:] != (1, 1):
        return "the tensors are NCHW, the kernels write channels_last"
    if x.stride(1) != 1 and x.shape[1] != 1:
        return "x is NCHW, the kernels read channels_last"
    return None


# --- the library's CUDA kernels

Native = Callable[[int], object]  # runs the op's kernel in a variant: 0, or one from NATIVE's first


def why_not_native(x: Tensor) -> str | None:
    """What of ``why_not`` is the CUDA kernels' own."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA kernels convolve 16-bit types"
    return None


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def native_ways(
    native: Native | None, x: Tensor, weight: Tensor, groups: int, norm_act: str | None = None
) -> list[Way]:
    """The CUDA kernels' tiles; where channels fill no 16 bytes there is one.

    Args:
        norm_act: the activation of a norm before the convolution; None without one.
    """
    if native is None or why_not_native(x) is not None:
        return []
    whole = weight.shape[1] % PACK == 0 and weight.shape[0] // groups % PACK == 0
    if not whole:
        return [NATIVE[-1]]
    plain = norm_act is None
    normed = norm_act in ("identity", "relu") and x.shape[1] <= SM90_NORM_CHANNELS
    on_sm90 = groups == 1 and (plain or normed) and is_hopper(x.device)
    return [*NATIVE, *SM90] if on_sm90 else [*NATIVE]


def variant(way: Way) -> int:
    return (*NATIVE, *SM90).index(way) + 1


def native_plan(
    native: Native | None, reason: str | None, x: Tensor, weight: Tensor, geometry: Sequence,
    by_name: bool,
) -> Plan:  # fmt: skip
    """Who carries a convolution out where Triton is not, whose timer measures.

    What ``ours_by_default`` leaves to cuDNN is the native kernel's if it was asked for by name.

    Args:
        native: None if the CUDA kernel cannot run, for ``reason``.
    """
    reason = reason or why_not(x, weight, geometry) or why_not_native(x)
    if native is None or reason is not None:
        return Plan("aten", reason)
    if not by_name and not ours_by_default(weight, geometry[3]):
        why = "cuDNN is the default above 1x1 and for groups of few channels"
        return Plan("aten", f"not measured (that needs Triton): {why}")
    return Plan("native", None, lambda: native(0))
