"""The ops around a convolution: ``conv_bn_act`` in inference, ``conv_stats`` in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres import functional, reference

from .cases import Case, channels_last
from .op_cases import EPS, Op, Shape, Tensors, case


def conv_case(
    name: str, shape: Shape, out: int, kernel: int, dtype: torch.dtype, stride: int = 1, **kwargs
) -> Case:
    """A convolution of ``shape`` [N, C, H, W] to ``out`` channels, padded to keep the size.

    Args:
        name: "conv_bn_act", "conv_bn_act + residual" or "conv_stats".
    """
    build = _conv_stats if name == "conv_stats" else _conv_bn_act
    found = case(build(name, out, kernel, stride), shape, dtype, **kwargs)
    found.title += f" to {out}, {kernel}x{kernel}" + (f" stride {stride}" if stride > 1 else "")
    return found


def _weight(out: int, channels: int, kernel: int) -> Tensor:
    scale = math.sqrt(2 / (channels * kernel**2))
    return scale * channels_last((out, channels, kernel, kernel), torch.float32)


def _conv_bn_act(name: str, out: int, kernel: int, stride: int) -> Op:
    padding = kernel // 2

    def tensors(shape: Shape, dtype: torch.dtype) -> Tensors:
        found = {
            "x": channels_last(shape, dtype),
            "conv_weight": _weight(out, shape[1], kernel).to(dtype),
            "weight": 1 + 0.1 * torch.randn(out),
            "bias": 0.1 * torch.randn(out),
            "running_mean": 0.1 * torch.randn(out),
            "running_var": 0.5 + torch.rand(out),
        }
        if "residual" in name:
            size = [(s - 1) // stride + 1 for s in shape[2:]]
            found["residual"] = channels_last((shape[0], out, *size), dtype)
        return found

    def fused(x, conv_weight, weight, bias, running_mean, running_var, residual=None):
        return functional.conv_bn_act(
            x, conv_weight, None, running_mean, running_var, weight, bias, EPS, stride, padding,
            residual=residual,
        )  # fmt: skip

    def eager(x, conv_weight, weight, bias, running_mean, running_var, residual=None):
        y = F.conv2d(x, conv_weight, None, stride, padding)
        y = F.batch_norm(y, running_mean, running_var, weight, bias)
        if residual is not None:
            y += residual
        return F.relu_(y)

    def meaning(x, conv_weight, weight, bias, running_mean, running_var, residual=None):
        geometry = stride, padding, 1, 1
        bn = weight, bias, running_mean, running_var, EPS
        return reference.conv_bn_act(x, conv_weight, None, residual, *bn, *geometry, "relu")

    return Op(name, tensors, fused, eager, meaning, streaming=False, trains=False)


def _conv_stats(name: str, out: int, kernel: int, stride: int) -> Op:
    """``conv(relu(bn(x)))`` in training, x's statistics known, and the result's statistics.

    Eager takes x's statistics here instead, in its batch norm: one statistics pass on both sides.
    """
    padding = kernel // 2
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1

    def tensors(shape: Shape, dtype: torch.dtype) -> Tensors:
        c = shape[1]
        x = channels_last(shape, dtype)
        mean, var = reference.bn_stats(x)
        return {
            "x": x.requires_grad_(),
            "weight": (1 + 0.1 * torch.randn(c)).requires_grad_(),
            "bias": (0.1 * torch.randn(c)).requires_grad_(),
            "mean": mean,
            "var": var,
            "conv_weight": _weight(out, c, kernel).to(dtype).requires_grad_(),
        }

    def fused(x, weight, bias, mean, var, conv_weight):
        return torch.ops.fusedres.conv_stats(
            x, weight, bias, mean, var, True, EPS, "relu", conv_weight, None, *geometry, True
        )[0]

    def eager(x, weight, bias, mean, var, conv_weight):
        h = F.relu_(F.batch_norm(x, None, None, weight, bias, True))
        return F.conv2d(h, conv_weight, None, stride, padding)

    def meaning(x, weight, bias, mean, var, conv_weight):
        bn = weight, bias, mean, var, True, EPS, "relu"
        return reference.conv_stats(x, bn, conv_weight, None, stride, padding, 1, 1)[0]

    return Op(name, tensors, fused, eager, meaning, streaming=False)
