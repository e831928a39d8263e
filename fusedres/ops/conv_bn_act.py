"""``conv_bn_act``: in inference, convolution, batch norm, residual add and activation in one call.

On a CPU the call is oneDNN's, through PyTorch's own ``mkldnn`` ops, on weights that batch norm was
folded into and that were packed once (``packing``). What oneDNN's fused call cannot do is done in
two calls, with a reason that ``fusedres.explain`` shows. On a GPU it is one kernel, of Triton or of
the library, cuDNN's fusion or those two calls (kernels/conv_bn_act.py).

oneDNN's fused ReLU turns NaN into 0 where PyTorch's keeps it: with NaN in the input or the weights
an inference result can differ from eager's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Choice, forced_backend
from ..layout import conv_memory_format, dense
from . import bn_act
from .convolution import conv_flops, conv_numel, convolution, onednn_has, upcasts
from .define import OwnKernel, Traffic, define, numel_bytes, transformed
from .packing import folded_and_packed

SCHEMA = (
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? bn_weight,"
    " Tensor? bn_bias, Tensor mean, Tensor var, float eps, int[] stride, int[] padding,"
    " int[] dilation, int groups, str act) -> Tensor"
)

OWN = OwnKernel(
    SCHEMA.replace(") ->", ", int variant) ->"),
    convolution=lambda x, weight, *args: (x, weight, args[7:11]),
)

# oneDNN's name, scalars and algorithm of each activation.
_UNARY = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "hardswish": ("hardswish", [], ""),
}


def why_not_fused(x: Tensor, residual: Tensor | None, act: str) -> str | None:
    """Why oneDNN's fused call cannot do this, or None."""
    if x.device.type != "cpu":
        return f"oneDNN runs on the CPU, x is on {x.device.type}"
    if (asked := forced_backend()) in ("reference", "triton"):
        return f"the {asked} backend was asked for"
    if transformed():
        return "inside torch.func's transforms ops run as plain PyTorch"
    if torch.jit.is_tracing():
        return "a trace holds PyTorch's own ops"
    if not onednn_has(torch.float32):
        return "this PyTorch has no oneDNN, or it is switched off"
    if (missing := native.load_error()) is not None:
        return missing  # without it a packed weight cannot be known to be up to date
    if x.dtype == torch.float64:
        return "oneDNN has no float64 convolution"
    if x.numel() == 0:
        return "empty input"
    if residual is not None and act not in ("relu", "identity"):
        return f"oneDNN's residual add takes relu or identity, not {act}"
    return None


def _describe(x, weight, bias, residual, *args) -> Choice:
    reason = why_not_fused(x, residual, args[-1])
    if reason is not None:
        return Choice("aten + bn_act", reason)
    if upcasts(x):
        return Choice("onednn", f"in float32: this CPU has no {x.dtype} convolution in oneDNN")
    return Choice("onednn")


def _composed(
    x, weight, bias, residual, bn_weight, bn_bias, mean, var, eps,
    stride, padding, dilation, groups, act,
):  # fmt: skip
    geometry = stride, padding, dilation, groups
    if why_not_fused(x, residual, act) is not None:
        y = dense(_convolution(x, weight, bias, geometry))
        residual = None if residual is None else dense(residual, like=y)
        bn = bn_weight, bn_bias, residual, mean, var, False, eps, act, False
        return bn_act.op(y, *bn)[0]
    out_format = conv_memory_format(x, weight)
    compute = torch.float32 if upcasts(x) else x.dtype
    sources = bias, bn_weight, bn_bias, mean, var
    packed, shift = folded_and_packed(weight, sources, eps, x, compute, geometry)
    x, dtype = x.to(compute), x.dtype
    head = x, packed, shift, padding, stride, dilation, groups
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(*head, *_UNARY[act])
    else:
        other = residual.to(compute).contiguous(memory_format=out_format)
        unary = "relu" if act == "relu" else None
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, *head[1:], "add", 1.0, unary, [], None
        )
    return y.to(dtype).contiguous(memory_format=out_format)


def _fake(
    x, weight, bias, residual, bn_weight, bn_bias, mean, var, eps,
    stride, padding, dilation, groups, act,
):  # fmt: skip
    return _convolution(x, weight, bias, (stride, padding, dilation, groups))


def _convolution(x, weight, bias, geometry):
    """In the dtype of x, as autocast does it; where oneDNN fuses, a folded weight is rounded."""
    return convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)


def _backward(ctx, dy):
    raise RuntimeError(
        "conv_bn_act is for inference and has no derivative: wanted no input that requires grad,"
        " or torch.no_grad(); for gradients use fusedres.ConvBNAct2d or conv2d and batch_norm_act"
    )


def bytes_moved(x, weight, bias, residual, *args) -> int:
    """Reads x, the packed weight and the residual, writes y."""
    y = conv_numel(x, weight, tuple(args[5:9])) * x.element_size()
    return numel_bytes(x) + numel_bytes(weight) + (1 + (residual is not None)) * y


def eager_bytes(x, weight, bias, residual, *args) -> int:
    """Eager: convolution RW, batch norm RW, residual add RRW, activation RW."""
    y = conv_numel(x, weight, tuple(args[5:9])) * x.element_size()
    passes = 3 + 3 * (residual is not None) + 2 * (args[-1] != "identity")
    return numel_bytes(x) + numel_bytes(weight) + passes * y


_traffic = Traffic(
    bytes_moved,
    eager_bytes,
    flops=lambda x, weight, *args: conv_flops(x, weight, tuple(args[7:11])),
)
op = define(
    SCHEMA,
    composed=_composed,
    describe=_describe,
    fake=_fake,
    backward=_backward,
    setup_context=lambda ctx, inputs, output: None,
    traffic=_traffic,
    fused_traffic=_traffic,
    own=OWN,
)
