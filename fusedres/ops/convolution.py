"""Dense convolution as PyTorch has it, plus the detour that reduced precision needs on old CPUs.

What a product of matrices does faster is left to ``gemm``.

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

from . import gemm

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
    if upcasts(x) and weight.dtype == x.dtype:
        operands = x.float(), weight.float(), None if bias is None else bias.float()
        return _forward(*operands, geometry).to(x.dtype)
    return _forward(x, weight, bias, geometry)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    y = gemm.forward(x, weight, bias, geometry)
    if y is not None:
        return y
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
    found = gemm.backward(dy, x, weight, geometry, needed)
    needed = [need and grad is None for need, grad in zip(needed, found, strict=True)]
    if not any(needed):
        return found
    stride, padding, dilation, groups = geometry
    sizes = [weight.shape[0]] if has_bias else None
    args = sizes, stride, padding, dilation, False, [0] * len(stride), groups, needed
    rest = torch.ops.aten.convolution_backward(dy, x, weight, *args)
    return tuple(b if a is None else a for a, b in zip(found, rest, strict=True))


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
