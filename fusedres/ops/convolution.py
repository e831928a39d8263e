"""Dense convolution as PyTorch has it, plus the detour that reduced precision needs on old CPUs.

oneDNN convolves bfloat16 and float16 only on CPUs with the matching instructions (AVX-512 or
AVX-NE-CONVERT). Elsewhere aten falls back to a scalar-typed GEMM that is ten to twenty times
slower than float32. There a float32 convolution of the upcast operands, rounded once at the end,
is exact to the same standard (float32 accumulation is what oneDNN uses too) and far faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups

FEW_PIXELS = 1024  # of all images together


@cache
def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves ``dtype`` on this CPU (and is switched on)."""
    return torch.backends.mkldnn.enabled and _onednn_has(dtype)


def upcasts(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a convolution of ``x``, or of x in ``dtype``, takes the detour through float32."""
    dtype = dtype or x.dtype
    reduced = dtype in (torch.bfloat16, torch.float16)
    return x.device.type == "cpu" and reduced and not onednn_has(dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``torch.conv2d`` of operands of one dtype; the result's dtype is theirs."""
    if upcasts(x) and weight.dtype == x.dtype:
        operands = x.float(), weight.float(), None if bias is None else bias.float()
        return _forward(*operands, geometry).to(x.dtype)
    return _forward(x, weight, bias, geometry)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if _has_few_pixels(x) and _is_product(weight, geometry, x):
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    stride, padding, dilation, groups = geometry
    args = stride, padding, dilation, False, [0] * len(stride), groups
    return torch.convolution(x, weight, bias, *args)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    geometry: Geometry,
    needed: Sequence[bool],
) -> Gradients:
    """Gradients of ``convolution`` with respect to x, weight and bias, where needed."""
    if not upcasts(x):
        return _backward(dy, x, weight, has_bias, geometry, needed)
    operands = dy.float(), x.float(), weight.float()
    grads = _backward(*operands, has_bias, geometry, needed)
    return tuple(None if g is None else g.to(x.dtype) for g in grads)


def _backward(dy, x, weight, has_bias: bool, geometry: Geometry, needed) -> Gradients:
    dx = dweight = dbias = None
    if _is_product(weight, geometry, x, dy):
        if needed[1]:
            dweight = torch.mm(_pixels(dy).t(), _pixels(x)).view_as(weight)
        if needed[0] and _has_few_pixels(x):
            dx = linear(dy.permute(0, 2, 3, 1), weight.flatten(1).t()).permute(0, 3, 1, 2)
        needed = needed[0] and dx is None, False, needed[2]
    if any(needed):
        stride, padding, dilation, groups = geometry
        sizes = [weight.shape[0]] if has_bias else None
        args = sizes, stride, padding, dilation, False, [0] * len(stride), groups, needed
        rest = torch.ops.aten.convolution_backward(dy, x, weight, *args)
        dx, dweight, dbias = (
            a if b is None else b for a, b in zip(rest, (dx, dweight, dbias), strict=True)
        )
    return dx, dweight, dbias


@cache
def _products_are_faster() -> bool:
    """Whether 1x1 convolutions are MKL's rather than oneDNN's, where they are products.

    Measured with AVX2 alone, on one CPU: the weight gradient takes 0.6 to 1.0 times as long, of few
    pixels the others 0.8 to 1.0 times; of many pixels they would take up to 1.2 times as long.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


def _has_few_pixels(x: Tensor) -> bool:
    return x.numel() <= FEW_PIXELS * x.shape[1]


def _is_product(weight: Tensor, geometry: Geometry, x: Tensor, *others: Tensor) -> bool:
    """Whether a convolution is one product of matrices that lie in memory as they are."""
    if weight.shape[2:] != (1, 1) or geometry != ([1, 1], [0, 0], [1, 1], 1):
        return False
    if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32 or x.is_contiguous():
        return False  # (where both layouts are one, the result has that of the weight)
    if not _products_are_faster() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active():  # vmap knows no memory formats
        return False
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, *others))


def _pixels(x: Tensor) -> Tensor:
    """A channels_last tensor as a matrix of its pixels."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def conv_flops(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    return 2 * conv_numel(x, weight, geometry) * weight[0].numel()


def conv_numel(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """The number of elements of the convolution's result."""
    return conv_shape(x.shape, weight, geometry).numel()


def conv_shape(shape: torch.Size, weight: Tensor, geometry: Geometry) -> torch.Size:
    """The shape of the convolution's result for an input of ``shape``."""
    stride, padding, dilation, _ = geometry
    sizes = [
        (size + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
        for i, (size, kernel) in enumerate(zip(shape[2:], weight.shape[2:], strict=True))
    ]
    return torch.Size((shape[0], weight.shape[0], *sizes))
