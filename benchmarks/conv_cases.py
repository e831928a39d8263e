"""The ops around a convolution: ``conv_bn_act`` in inference, ``conv_stats`` in training."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres import functional, reference

from . import cuda_peers
from .cases import Case, activation
from .costs import Costs
from .networks import Conv
from .op_cases import EPS, Op, Shape, Tensors, case
from .peers import CUDNN, CUDNN_FRONTEND


def conv_case(name: str, conv: Conv, batch: int, dtype: torch.dtype, **kwargs) -> Case:
    """One convolution of a network with the op around it.

    Args:
        name: "conv_bn_act", "conv_bn_act+residual" or "conv_stats".
    """
    build = _conv_stats if name == "conv_stats" else _conv_bn_act
    found = case(build(name, conv), (batch, *conv.x), dtype, **kwargs)
    found.title += f" to {conv.y[0]}, {conv.kernel}x{conv.kernel}"
    found.title += f" stride {conv.stride}" if conv.stride > 1 else ""
    if name == "conv_stats" and found.facts["direction"] != "forward":
        costs = Costs(batch, dtype)
        gradients = costs.dgrad(conv), costs.wgrad(conv)  # a CPU has no op for either
        found.floor = partial(found.floor, unreported=gradients)
    return found


def _weight(conv: Conv) -> Tensor:
    scale = math.sqrt(2 / math.prod(conv.weight[1:]))
    return scale * activation(conv.weight, torch.float32)


def _conv_bn_act(name: str, conv: Conv) -> Op:
    out, stride, padding = conv.y[0], conv.stride, conv.padding

    def tensors(shape: Shape, dtype: torch.dtype, layout: str) -> Tensors:
        found = {
            "x": activation(shape, dtype, layout),
            "conv_weight": _weight(conv).to(dtype),
            "weight": 1 + 0.1 * torch.randn(out),
            "bias": 0.1 * torch.randn(out),
            "running_mean": 0.1 * torch.randn(out),
            "running_var": 0.5 + torch.rand(out),
        }
        if "residual" in name:
            found["residual"] = activation((shape[0], *conv.y), dtype, layout)
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

    def peer(maker):
        return lambda tensors, *_: maker(tensors, stride, padding)

    on_gpu = {
        CUDNN: peer(cuda_peers.cudnn_convolution),
        CUDNN_FRONTEND: peer(cuda_peers.cudnn_graph),
    }
    return Op(name, tensors, fused, eager, meaning, on_gpu, trains=False)


def _conv_stats(name: str, conv: Conv) -> Op:
    """``conv(relu(bn(x)))`` in training, x's statistics known, and the result's statistics.

    Eager takes x's statistics here instead, in its batch norm: one statistics pass on both sides.
    """
    stride, padding = conv.stride, conv.padding
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1

    def tensors(shape: Shape, dtype: torch.dtype, layout: str) -> Tensors:
        c = shape[1]
        x = activation(shape, dtype, layout)
        mean, var = reference.bn_stats(x)
        return {
            "x": x.requires_grad_(),
            "weight": (1 + 0.1 * torch.randn(c)).requires_grad_(),
            "bias": (0.1 * torch.randn(c)).requires_grad_(),
            "mean": mean,
            "var": var,
            "conv_weight": _weight(conv).to(dtype).requires_grad_(),
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

    return Op(name, tensors, fused, eager, meaning)
