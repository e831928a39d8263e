"""A perceptron whose layers read everything before them, as one autograd node on one buffer.

Each layer's result is written behind its input, so nothing is concatenated, and the layers'
gradients are added into one buffer by the products that make them. Kept for the backward is the
buffer alone.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor

from .. import observers, reference
from .convolution import upcasts
from .define import PLAIN, vjp


def dense_mlp(x: Tensor, *parameters: Tensor | None, act: str) -> Tensor:
    """``[x, h_1, ..., h_n]`` with ``h_l = act(W_l [x, h_1, ..., h_{l-1}] + b_l)``.

    Args:
        x: [N, D], of the weights' dtype.
        parameters: weight [H, D + l * H] and bias [H] or None of each layer in turn.
    """
    # The compiler plans memory by itself; functorch's levels do not survive a nested vjp.
    traced = torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy)
    if traced or torch._C._are_functorch_transforms_active():
        return _plain(act, x, *parameters)
    _notify(x, parameters)
    if not torch.is_grad_enabled():
        return _forward(act, x, parameters)
    return _DenseMLP.apply(act, x, *parameters)


def _notify(x: Tensor, parameters) -> None:
    """Eager concatenates, RW of everything so far, before each layer but the first."""
    if not observers.observed():
        return
    weights = parameters[::2]
    read = sum(x.shape[0] * w.shape[1] + w.numel() for w in weights)
    written = sum(x.shape[0] * w.shape[0] for w in weights)
    concatenated = 2 * sum(x.shape[0] * (w.shape[1] + w.shape[0]) for w in weights)
    size = x.element_size()
    moved, reason = (read + written) * size, "products of aten, on one buffer"
    observers.notify(
        observers.Event(
            "dense_mlp", "aten", reason, len(weights), moved, moved + concatenated * size
        )
    )


def _plain(act: str, x: Tensor, *parameters: Tensor | None) -> Tensor:
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        new = reference.ACTIVATIONS[act](torch.nn.functional.linear(x, weight, bias))
        x = torch.cat([x, new], 1)
    return x


def _forward(act: str, x: Tensor, parameters) -> Tensor:
    if _upcasts(x, parameters):
        return _forward(act, x.float(), _floats(parameters)).to(x.dtype)
    weights, biases = parameters[::2], parameters[1::2]
    width = x.shape[1]
    buffer = x.new_empty(x.shape[0], width + sum(w.shape[0] for w in weights))
    buffer[:, :width] = x
    for weight, bias in zip(weights, biases, strict=True):
        z = torch.nn.functional.linear(buffer[:, :width], weight, bias)
        end = width + weight.shape[0]
        buffer[:, width:end] = reference.ACTIVATIONS[act](z)
        width = end
    return buffer


def _upcasts(x: Tensor, parameters) -> bool:
    """Whether products go by float32, as convolutions do: the CPU has none in x's dtype."""
    return upcasts(x) and all(p is None or type(p) in PLAIN for p in (x, *parameters))


def _floats(tensors) -> list[Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, act, x, *parameters):
        buffer = _forward(act, x, parameters)
        ctx.act, ctx.width = act, x.shape[1]
        ctx.save_for_backward(buffer, *parameters)
        return buffer

    @staticmethod
    def backward(ctx, dy):
        buffer, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # a graph of the backward: the first columns are x

            def fn(x, *parameters):
                return _plain(ctx.act, x, *parameters)

            inputs = buffer[:, : ctx.width], *parameters
            return None, *vjp(fn, inputs, needed, dy)
        dtype = dy.dtype
        if _upcasts(buffer, parameters):
            dy, buffer, *parameters = _floats([dy, buffer, *parameters])
        grads: list[Tensor | None] = [None] * (1 + len(parameters))
        dbuffer, end = dy.clone(memory_format=torch.contiguous_format), buffer.shape[1]
        for i in reversed(range(0, len(parameters), 2)):
            weight, bias = parameters[i : i + 2]
            start = end - weight.shape[0]
            x, y = buffer[:, :start], buffer[:, start:end]
            dz = _through_activation(ctx.act, x, y, weight, bias, dbuffer[:, start:end])
            dbuffer[:, :start].addmm_(dz, weight)
            grads[1 + i] = dz.t() @ x if needed[1 + i] else None
            grads[2 + i] = dz.sum(0) if needed[2 + i] else None
            end = start
        grads[0] = dbuffer[:, :end] if needed[0] else None
        return None, *(None if g is None else g.to(dtype) for g in grads)


def _through_activation(act: str, x, y, weight, bias, dy) -> Tensor:
    """``dy * act'(z)``: from the result where its sign tells, else with z computed again."""
    if act == "identity":
        return dy
    if act == "relu":
        return torch.where(y <= 0, 0.0, dy)
    z = torch.nn.functional.linear(x, weight, bias)
    return vjp(reference.ACTIVATIONS[act], (z,), (True,), dy)[0]
