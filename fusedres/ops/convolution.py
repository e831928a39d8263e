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

Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


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
    stride, padding, dilation, groups = geometry
    args = stride, padding, dilation, False, [0] * len(stride), groups
    if upcasts(x) and weight.dtype == x.dtype:
        operands = x.float(), weight.float(), None if bias is None else bias.float()
        return torch.convolution(*operands, *args).to(x.dtype)
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
    stride, padding, dilation, groups = geometry
    sizes, as_product = [weight.shape[0]] if has_bias else None, None
    if needed[1] and _is_product(dy, x, weight, geometry):
        as_product = torch.mm(_pixels(dy).t(), _pixels(x)).view_as(weight)
        needed = needed[0], False, needed[2]
    args = sizes, stride, padding, dilation, False, [0] * len(stride), groups, needed
    dx, dweight, dbias = torch.ops.aten.convolution_backward(dy, x, weight, *args)
    return dx, dweight if as_product is None else as_product, dbias


@cache
def _products_are_faster() -> bool:
    """Whether the weight gradient of a 1x1 convolution is left to BLAS and not to oneDNN.

    MKL's product takes 0.6 to 1.0 times as long with AVX2; with AVX-512 neither was measured.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


def _is_product(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the weight gradient is one product of two matrices that lie in memory as they are."""
    point = weight.shape[2:] == (1, 1) and geometry == ([1, 1], [0, 0], [1, 1], 1)
    plain = type(x) is type(dy) is Tensor and x.is_cpu and x.dtype == torch.float32
    if not (point and plain and _products_are_faster()) or torch.is_autocast_enabled("cpu"):
        return False
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x))


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
