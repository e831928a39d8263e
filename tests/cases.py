"""What the tests of the ops share: backends, dtypes, and a named list of shapes and layouts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

BACKENDS = ("native", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Sizes that fill no vector, ambiguous layouts, and ResNet's own tensors at small batch.
SHAPES = {
    "odd": ((2, 17, 7, 5), "NCHW"),
    "odd_nhwc": ((3, 5, 5, 3), "NHWC"),
    "one_channel": ((4, 1, 3, 3), "NCHW"),
    "three_channels_nhwc": ((2, 3, 9, 7), "NHWC"),
    "one_image": ((1, 8, 6, 6), "NCHW"),
    "one_image_nhwc": ((1, 24, 5, 5), "NHWC"),
    "1x1": ((6, 20, 1, 1), "NCHW"),
    "1x1_nhwc": ((5, 33, 1, 1), "NHWC"),
    "one_row": ((2, 3, 1, 301), "NCHW"),
    "tail_of_one_nhwc": ((2, 65, 4, 4), "NHWC"),
    "stage1": ((1, 64, 56, 56), "NCHW"),
    "stage1_nhwc": ((2, 64, 56, 56), "NHWC"),
    "stage2_nhwc": ((2, 128, 28, 28), "NHWC"),
    "stage4": ((2, 512, 7, 7), "NCHW"),
    "stage4_nhwc": ((1, 2048, 7, 7), "NHWC"),
}

executions = pytest.mark.parametrize(
    ("backend", "dtype"),
    list(itertools.product(BACKENDS, DTYPES)),
    ids=lambda v: str(v).removeprefix("torch."),
)
backends = pytest.mark.parametrize("backend", BACKENDS)
layouts = pytest.mark.parametrize("layout", ["NCHW", "NHWC"])


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What per-channel parameters usually are beside activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values, dense in ``layout``."""
    nhwc = layout == "NHWC" and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def randn(shape, dtype=torch.float32, layout: str = "NCHW") -> Tensor:
    """Normal values, shifted by another amount in each channel."""
    x = torch.randn(shape)
    if x.dim() > 1:
        x += torch.linspace(-1, 2, x.shape[1]).view(1, -1, *[1] * (x.dim() - 2))
    return arrange(x.to(dtype), layout)


def channels(n: int, dtype=torch.float32, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """[n] values between ``low`` and ``high``."""
    return (torch.rand(n) * (high - low) + low).to(dtype)


def values_per_channel(x: Tensor) -> int:
    return max(1, x.numel() // x.shape[1])


def misaligned(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x``'s values and strides one element off any vector's alignment; and the buffer around.

    The buffer is NaN elsewhere: a read beyond ``x`` that counts would show in the result.
    """
    pad = 5
    buffer = torch.full((x.numel() + 2 * pad,), math.nan, dtype=x.dtype)
    view = buffer.as_strided(x.shape, x.stride(), storage_offset=pad)
    view.copy_(x)
    return view, buffer


def sliced(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x``'s values as the inside of a tensor that is larger in every dimension, NaN around."""
    base = torch.full([s + 2 for s in x.shape], math.nan, dtype=x.dtype)
    if x.dim() == 4 and not x.is_contiguous():
        base = base.contiguous(memory_format=torch.channels_last)
    view = base[tuple(slice(1, -1) for _ in x.shape)]
    view.copy_(x)
    return view, base


@dataclass(frozen=True)
class Conv:
    """A convolution and its input: shapes, formats and geometry."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "NHWC"
    weight_layout: str = "NCHW"
    bias: bool = False

    @property
    def geometry(self) -> tuple:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def out(self) -> torch.Size:
        weight = torch.empty(self.weight, device="meta")
        return torch.conv2d(torch.empty(self.x, device="meta"), weight, None, *self.geometry).shape


CONVS = {
    "3x3": Conv((2, 8, 9, 7), (12, 8, 3, 3), layout="NCHW"),
    "3x3_nhwc_stride": Conv((2, 16, 8, 8), (24, 16, 3, 3), stride=(2, 2)),
    "1x1": Conv((2, 5, 6, 6), (17, 5, 1, 1), padding=(0, 0), layout="NCHW", bias=True),
    "1x1_nhwc": Conv((2, 24, 9, 7), (20, 24, 1, 1), padding=(0, 0), bias=True),
    "1x1_nhwc_stride": Conv((2, 17, 7, 7), (3, 17, 1, 1), stride=(2, 2), padding=(0, 0)),
    "stem_nhwc": Conv((1, 3, 32, 32), (64, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
    "grouped_nhwc": Conv((2, 32, 6, 6), (32, 4, 3, 3), groups=8),
    "depthwise": Conv((2, 9, 6, 6), (9, 1, 3, 3), groups=9, layout="NCHW"),
    "dilated_nhwc": Conv((1, 6, 11, 9), (7, 6, 3, 3), padding=(2, 2), dilation=(2, 2)),
    "row_kernel": Conv((2, 4, 5, 12), (6, 4, 1, 3), stride=(1, 2), padding=(0, 1), bias=True),
    "wide_nhwc": Conv((3, 64, 9, 8), (72, 64, 3, 2), (2, 1), (1, 0), dilation=(1, 2), bias=True),
    "1x1_images": Conv((5, 33, 1, 1), (20, 33, 1, 1), padding=(0, 0)),
    "one_channel": Conv((3, 1, 7, 7), (1, 1, 3, 3), padding=(0, 0), layout="NCHW"),
    "nhwc_weight": Conv((2, 6, 7, 5), (10, 6, 3, 3), layout="NCHW", weight_layout="NHWC"),
    "stage4_nhwc": Conv((1, 256, 7, 7), (256, 256, 3, 3), weight_layout="NHWC"),
}


def conv_tensors(conv: Conv, dtype: torch.dtype) -> dict:
    fan_in = math.prod(conv.weight[1:])
    weight = torch.randn(conv.weight).div(fan_in**0.5).to(dtype)
    return dict(
        x=randn(conv.x, dtype, conv.layout),
        weight=arrange(weight, conv.weight_layout),
        bias=channels(conv.weight[0], dtype) if conv.bias else None,
    )
