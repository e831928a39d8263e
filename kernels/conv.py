"""Convolutions on the host's side: what the kernels take, and who carries a convolution out.

There are four ways: our kernel in one of its configurations ("triton"), the library's CUDA kernel
("native"), PyTorch's convolution with our streaming kernels around it ("aten"; on a GPU that is
cuDNN), and cuDNN's own fusion ("cudnn", inference). Which one is measured like any configuration
(``tuning``). Where nothing was measured, kernels of one pixel go to Triton, for they are limited by
memory and the fusion saves passes; the others go to cuDNN, which a Triton kernel does not beat at
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .launch import cdiv, power_of_2
from .ways import ATEN, CUDNN, Plan, Way, ours_by_default, out_shape, why_not

__all__ = ["ATEN", "CUDNN", "Conv", "Plan", "Way", "in_order", "plan_of", "precision", "why_not"]

TMA_CAPABILITY = (9, 0)
WIDE_ROWS = 2**30  # from here on rows are counted in 64 bits, which tensor descriptors do not take
# 48 to 72 KiB of shared memory: one fits every GPU, two or more an H100. None was measured yet.
# Tiles of 128 columns spill on sm_100, with moments also steps of 64 channels on sm_120.
MEDIUM = Way("triton", 128, 64, 64, 8, 3)
SMALL = Way("triton", 64, 64, 64, 4, 4)
WITH_MOMENTS = Way("triton", 128, 64, 32, 8, 4)
# A launch of fewer tiles than this leaves some of an H100's 132 multiprocessors without one.
FEW_TILES = 132


class Conv:
    """A convolution in the form that the kernels see.

    Args:
        x: [N, C, H, W], channels innermost in memory.
        weight: [K, C / groups, KH, KW]; copied for the kernel where it is not channels_last.
        geometry: stride, padding, dilation, groups.
        transposed: the weight is [C, K / groups, KH, KW], of the convolution whose gradient by its
            input this is.
    """

    configs = MEDIUM, SMALL  # the last one is for few pixels

    def __init__(
        self, op: str, x: Tensor, weight: Tensor, geometry: Sequence, transposed: bool = False
    ):
        self.op, self.x, self._weight, self.transposed = op, x, weight, transposed
        self.stride, self.padding, self.dilation, self.groups = geometry
        self.channels, self.inner = weight.shape[:2]  # of the result; of a group of x
        if transposed:
            self.channels, self.inner = self.inner * self.groups, self.channels // self.groups
        n, _, *sizes = out_shape(x, weight, geometry)
        self.out_shape = n, self.channels, *sizes
        self.rows = n * math.prod(sizes)
        self.taps = tuple(weight.shape[2:])
        self.padded = any(self.padding)

    @cached_property
    def weight(self) -> Tensor:
        """Its second dimension is innermost in memory."""
        return self._weight.contiguous(memory_format=torch.channels_last)

    def new_result(self) -> Tensor:
        return torch.empty(
            self.out_shape, dtype=self.x.dtype, device=self.x.device,
            memory_format=torch.channels_last,
        )  # fmt: skip

    def ways(self) -> list[Way]:
        """Configurations of our kernel, the default first."""
        order = list(self.configs)
        if self.programs(self.flags(order[0])) < FEW_TILES:
            order.reverse()
        return [replace(way, tma=True) for way in order if self.has_tma()] + order

    def has_tma(self) -> bool:
        """Whether both operands are matrices that tensor descriptors can describe."""
        x, size = self.x, self.x.element_size()
        pointwise = self.taps == (1, 1) and tuple(self.stride) == (1, 1) and not self.padded
        matrices = x.is_contiguous(memory_format=torch.channels_last) and self.groups == 1
        widths = (x.shape[1], self._weight.shape[1])
        aligned = x.data_ptr() % 16 == 0 and all(c * size % 16 == 0 for c in widths)
        fits = pointwise and matrices and aligned and self.rows < WIDE_ROWS
        return fits and target_has_tma(x.device) and self.weight.data_ptr() % 16 == 0

    def flags(self, way: Way) -> dict[str, object]:
        """The constexpr arguments that the convolutions' kernels share."""
        k = way.k * 2 // self.x.element_size()
        return {
            "KH": self.taps[0],
            "KW": self.taps[1],
            "PADDED": self.padded,
            "TMA": way.tma,
            "PRECISION": precision(self.x),
            "WIDE": self.rows >= WIDE_ROWS,
            "BLOCK_M": min(way.m, max(16, power_of_2(self.rows))),
            "BLOCK_N": min(way.n, max(16, power_of_2(self.channels // self.groups))),
            "BLOCK_K": min(k, max(16, power_of_2(self.inner))),
        }

    def operands(self, flags: dict) -> tuple:
        """x and weight: tensors, or tensor descriptors of them as matrices."""
        if not flags["TMA"]:
            return self.x, self.weight
        c, step = self.x.shape[1], flags["BLOCK_K"]
        x = self.x.permute(0, 2, 3, 1).view(self.rows, c)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        tile = [step, flags["BLOCK_N"]] if self.transposed else [flags["BLOCK_N"], step]
        return (
            TensorDescriptor(x, [self.rows, c], [c, 1], [flags["BLOCK_M"], step]),
            TensorDescriptor(weight, list(weight.shape), [weight.shape[1], 1], tile),
        )

    def sizes(self) -> tuple[int, ...]:
        """The sizes, strides and geometry that the kernels take, in their order."""
        n, _, h, w = self.x.shape
        x_n, _, x_h, x_w = self.x.stride()
        return (
            self.rows, self.inner, self.channels // self.groups, h, w,
            *self.out_shape[2:], self.groups, x_n, x_h, x_w, *self.stride, *self.padding,
            *self.dilation,
        )  # fmt: skip

    def programs(self, flags: dict, tiles: int = 1) -> int:
        columns = self.groups * cdiv(self.channels // self.groups, flags["BLOCK_N"])
        return columns * cdiv(cdiv(self.rows, flags["BLOCK_M"]), tiles)

    def key(self, *more: object) -> str:
        """What a measured choice depends on, besides the GPU."""
        x, weight = ("x".join(map(str, t.shape)) for t in (self.x, self._weight))
        geometry = (*self.stride, *self.padding, *self.dilation, self.groups)
        dense = self.x.is_contiguous(memory_format=torch.channels_last)
        parts = self.op, self.x.dtype, x, weight, *geometry, precision(self.x), dense, *more
        return "|".join(map(str, parts))


def target_has_tma(device: torch.device) -> bool:
    """Whether the device copies tiles by itself (from Hopper on); a dry run compiles for those."""
    if device.type == "meta":
        return True
    return device.type == "cuda" and _capability(device.index) >= TMA_CAPABILITY


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def precision(x: Tensor) -> str:
    """How products of float32 are formed: PyTorch's switch for convolutions decides."""
    if x.dtype != torch.float32:
        return "ieee"
    allowed = x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"  # three TF32 products: an error of float32's order


# --- the choice


def plan_of(
    key: str, ways: Sequence[Way], work: Callable[[Way], object], device,
    default: str = "cuDNN is the default above 1x1",
) -> Plan:  # fmt: skip
    """The way measured to be the fastest; the first one where nothing was measured.

    Args:
        work: carries the convolution out in one way, into results of its own.
        default: why another's way than our kernel's is the first, if it is.
    """
    way = tuning.choose(key, ways, work, device)
    why = _why(way, ways, tuning.measured(key, device), default)
    if way.by == "aten":
        return Plan(way.by, why)
    return Plan(way.by, why, lambda: tuning.run(key, ways, work, device))


def _why(
    way: Way, ways: Sequence[Way], measured: dict[str, float], default: str
) -> str | None:  # fmt: skip
    if measured:
        return tuning.told(measured)
    if way.by != ways[0].by:
        return f"no configuration of {ways[0].by} fits this GPU"
    if way.by == "triton":
        return None
    return f"not measured (FUSEDRES_TUNE=1): {default}"


def in_order(conv: Conv, rivals: Sequence[Way]) -> list[Way]:
    """All ways, the default first; the library's CUDA kernels, among the rivals, are ours too."""
    ours = [*conv.ways(), *(way for way in rivals if way.by == "native")]
    others = [way for way in rivals if way.by != "native"]
    first = ours_by_default(conv._weight, conv.groups)
    return [*ours, *others] if first else [*others, *ours]
