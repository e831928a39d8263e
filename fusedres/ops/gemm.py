"""What of a convolution is left to BLAS as a product of matrices, where that beats oneDNN.

An image in channels_last is a matrix of its pixels, and so is the gradient of a 1x1 convolution's
weight ``dy^T x``. That of a larger kernel is ``dy^T patches``, where a row of the patches is what
the kernel sees at one pixel; they are gathered for as many images at a time as stay in the cache.

Measured with AVX2 alone, on one CPU (docs/performance.md); elsewhere oneDNN keeps everything.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

FEW_PIXELS = 1024  # of all images together: with more, only weight gradients are products
MIN_CHANNELS = 64  # of a larger kernel: below, gathering costs more than the product saves
PATCHES_BYTES = 4 * 2**20  # gathered at a time
MAX_PATCHES_BYTES = 16 * 2**20  # of one image

POINT = [1, 1], [0, 0], [1, 1], 1


@cache
def _faster() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


def _plain(x: Tensor, *others: Tensor) -> bool:
    """Whether these are matrices of pixels as they lie in memory."""
    # The type first: a fake tensor's sizes are symbols that nobody should ask. Where both layouts
    # are one, a result has that of the weight.
    if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32 or x.is_contiguous():
        return False
    if not _faster() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active():  # vmap knows no memory formats
        return False
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, *others))


def _pointwise(weight: Tensor, geometry) -> bool:
    return weight.shape[2:] == (1, 1) and geometry == POINT


def _has_few_pixels(x: Tensor) -> bool:
    return x.numel() <= FEW_PIXELS * x.shape[1]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry) -> Tensor | None:
    """The convolution, or None where it is oneDNN's."""
    if not (_plain(x) and _pointwise(weight, geometry) and _has_few_pixels(x)):
        return None
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry, needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed, each None where it is oneDNN's."""
    if not _plain(x, dy):
        return None, None, None
    pointwise, dx, dweight = _pointwise(weight, geometry), None, None
    if not (pointwise or _gathers(dy, x, weight, geometry)):
        return None, None, None
    if needed[1] and pointwise:
        dweight = torch.mm(_pixels(dy).t(), _pixels(x)).view_as(weight)
    elif needed[1]:
        dweight = _gathered(dy, x, weight, geometry)
    if needed[0] and pointwise and _has_few_pixels(x):
        dx = linear(dy.permute(0, 2, 3, 1), weight.flatten(1).t()).permute(0, 3, 1, 2)
    # oneDNN has the bias's only together with the weight's.
    return dx, dweight, _pixels(dy).sum(0) if needed[2] else None


def _pixels(x: Tensor) -> Tensor:
    """The matrix that a channels_last tensor is in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _image_bytes(dy: Tensor, weight: Tensor) -> int:
    """Of the patches of one image."""
    return 4 * dy.shape[2:].numel() * weight[0].numel()


def _gathers(dy: Tensor, x: Tensor, weight: Tensor, geometry) -> bool:
    """Whether gathering what the kernel sees pays."""
    wide = geometry[3] == 1 and min(weight.shape[:2]) >= MIN_CHANNELS
    return wide and _image_bytes(dy, weight) <= MAX_PATCHES_BYTES


def _gathered(dy: Tensor, x: Tensor, weight: Tensor, geometry) -> Tensor:
    """``dy^T patches`` in the weight's shape, image by image or several at a time."""
    stride, padding, dilation, _ = geometry
    (vertical, horizontal), (channels, *kernel) = padding, weight.shape[1:]
    image = pad(x.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical))
    of_image, *steps, of_channel = image.stride()
    across = (step * s for step, s in zip(steps, stride, strict=True))
    within = (step * d for step, d in zip(steps, dilation, strict=True))
    windows = image.as_strided(
        (len(dy), *dy.shape[2:], *kernel, channels), (of_image, *across, *within, of_channel)
    )
    images = max(1, PATCHES_BYTES // _image_bytes(dy, weight))
    memory = x.new_empty((min(images, len(dy)), *windows.shape[1:]))
    rows, columns = (-1, weight.shape[0]), (-1, math.prod(windows.shape[3:]))
    dweight = x.new_zeros(weight.shape[0], columns[1])
    for seen, d in zip(windows.split(images), dy.permute(0, 2, 3, 1).split(images), strict=True):
        patches = memory[: len(seen)].copy_(seen).view(columns)
        dweight.addmm_(d.reshape(rows).t(), patches)
    return dweight.view(weight.shape[0], *kernel, channels).permute(0, 3, 1, 2)
