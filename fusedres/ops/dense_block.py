"""A dense block (Huang et al. 2017) as one autograd node on one buffer of channels.

Every layer reads all channels written before it and writes its own behind them, so nothing is ever
concatenated. A channel's mean and variance are computed when it is written; each layer has an
affine map of its own on them. What is kept for the backward is the buffer, which is the block's
result, and a layer's bottleneck, before its norm and after: memory is linear in the depth, where
eager's is quadratic. Where memory is short the second is computed again.

The layers' gradients are added into one buffer too. Batch norm's derivative of a channel is
``sum_l a_l * u_l + (x - mean) * sum_l q_l + sum_l r_l`` over the layers l that read it: the first
sum is taken in place as the layers come by, one pass each; the other two are numbers a channel, and
are applied once, when the layer that wrote the channel takes its gradient (``dense_finish``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..layout import dense, memory_format
from . import bn_act, conv_bn_act, conv_stats
from .convolution import Geometry, convolution, convolution_backward
from .define import by_reference, vjp
from .dense_buffer import finish_op, grad_op, load_op, store_op


@dataclass(frozen=True)
class Layer:
    """What a layer is besides its tensors: norm-ReLU-conv twice.

    Args:
        frugal: keep for the backward what convolution 1 made, not what convolution 2 reads.
    """

    batch_stats: tuple[bool, bool]
    eps: tuple[float, float]
    geometry: tuple[Geometry, Geometry]
    frugal: bool = False


# A layer's tensors: (weight, bias) of norm 1, convolution 1, (weight, bias) of norm 2, convolution
# 2, and the running (mean, var) of both norms.
TENSORS = 10
PARAMETERS = 6


def dense_block(layers: Sequence[Layer], x: Tensor, tensors: Sequence[Tensor | None]):
    """The concatenation of ``x`` and every layer's result.

    Args:
        tensors: ``TENSORS`` for each layer, one layer after the other.

    Returns:
        The result [N, C + sum of the layers', H, W], and for each layer the mean and variance of
        the batch that its two norms saw: (mean1, var1, mean2, var2), where they took them.
    """
    inputs = x, *tensors
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if graded:
        y, mean, var, *second = _DenseBlock.apply(tuple(layers), x, *tensors)
    else:
        y, (mean, var), second, _ = _forward(layers, x, tensors, keep=False)
    stats, channels = [], x.shape[1]
    for i in range(len(layers)):
        stats.append((mean[:channels], var[:channels], *second[2 * i : 2 * i + 2]))
        channels += _Tensors(tensors, i).growth
    return y, stats


class _Tensors:
    """The tensors of layer ``i`` by name."""

    def __init__(self, tensors: Sequence[Tensor | None], i: int):
        t = tensors[i * TENSORS : (i + 1) * TENSORS]
        self.norm1, self.conv1, self.norm2, self.conv2 = t[:2], t[2], t[3:5], t[5]
        self.running1, self.running2 = t[6:8], t[8:10]
        self.growth = self.conv2.shape[0]


class _Inner:
    """Memory for what convolutions 1 read: ``relu(norm1(the channels so far))``, layer by layer.

    One piece for all layers: each wants more than the one before, which in a forward would be new
    memory from the system every time.
    """

    def __init__(self, buffer: Tensor):
        self.buffer, self.memory = buffer, buffer.new_empty(buffer.numel())

    def load(self, layer: Layer, t: _Tensors, norm: Sequence[Tensor], channels: int) -> Tensor:
        """[N, channels, H, W], until the next call."""
        n, _, h, w = self.buffer.shape
        inner = self.memory[: n * channels * h * w]
        if memory_format(self.buffer) == torch.channels_last:
            inner = inner.view(n, h, w, channels).permute(0, 3, 1, 2)
        else:
            inner = inner.view(n, channels, h, w)
        load_op(inner, self.buffer, *norm, *t.norm1, layer.eps[0])
        return inner


def _forward(layers, x, tensors, keep: bool):
    """The result, its channels' statistics, those of the bottlenecks, and what is kept of these."""
    x = dense(x)
    n, channels, h, w = x.shape
    total = channels + sum(_Tensors(tensors, i).growth for i in range(len(layers)))
    buffer = torch.empty(
        (n, total, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )
    acc, tracked = reference.acc_dtype(x.dtype), any(layer.batch_stats[0] for layer in layers)
    mean, var = (x.new_empty(total if tracked else 0, dtype=acc) for _ in "mv")
    statistics = (mean, var) if tracked else (None, None)
    store_op(buffer, x, *statistics, 0)
    inner = _Inner(buffer)
    second, kept = [], []
    for i, layer in enumerate(layers):
        t = _Tensors(tensors, i)
        first = (mean[:channels], var[:channels]) if layer.batch_stats[0] else t.running1
        pair, stats, new = _second_half(layer, inner.load(layer, t, first, channels), t, keep)
        store_op(buffer, new, *statistics, channels)
        channels += t.growth
        second += stats
        kept += pair
    return buffer, (mean, var), second, kept


def _second_half(layer: Layer, inner: Tensor, t: _Tensors, keep: bool):
    """``conv2(relu(norm2(conv1(inner))))``: what is kept, the norm's statistics, the result."""
    if not keep and not layer.batch_stats[1]:
        h = conv_bn_act.op(
            inner, t.conv1, None, None, *t.norm2, *t.running2, layer.eps[1], *layer.geometry[0],
            "relu",
        )  # fmt: skip
        return (), t.running2, dense(convolution(h, t.conv2, None, layer.geometry[1]), inner)
    raw = dense(convolution(inner, t.conv1, None, layer.geometry[0]), inner)
    stats = bn_act.stats_op(raw) if layer.batch_stats[1] else t.running2
    h = bn_act.op(raw, *t.norm2, None, *stats, layer.batch_stats[1], layer.eps[1], "relu", False)[0]
    new = dense(convolution(h, t.conv2, None, layer.geometry[1]), inner)
    return (raw, None if layer.frugal else h), stats, new


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, x, *tensors):
        buffer, statistics, second, kept = _forward(layers, x, tensors, keep=True)
        # The caller may update running statistics in place before the backward: keep the values.
        tensors = [
            t.clone() if i % TENSORS >= PARAMETERS and t is not None else t
            for i, t in enumerate(tensors)
        ]
        second = [
            s if layers[i // 2].batch_stats[1] else tensors[i // 2 * TENSORS + 8 + i % 2]
            for i, s in enumerate(second)
        ]
        ctx.layers, ctx.channels = layers, x.shape[1]
        ctx.save_for_backward(buffer, *tensors, *statistics, *second, *kept)
        ctx.mark_non_differentiable(*statistics, *second)
        ctx.set_materialize_grads(False)
        return buffer, *statistics, *second

    @staticmethod
    def backward(ctx, dy, *_):
        count = len(ctx.layers)
        if dy is None:
            return (None,) * (2 + TENSORS * count)
        buffer, *saved = ctx.saved_tensors
        tensors, rest = saved[: TENSORS * count], saved[TENSORS * count :]
        needed = ctx.needs_input_grad[1:]
        # is_grads_batched has no rule for ops that write into their arguments
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)
        if batched or by_reference("dense_grad", buffer):
            grads = _differentiable_backward(ctx, buffer, tensors, dy, needed)
        else:
            grads = _backward(ctx, buffer, tensors, rest[:2], rest[2:], dy)
        return None, *(g if n else None for g, n in zip(grads, needed, strict=True))


def _backward(ctx, buffer, tensors, statistics, rest, dy):
    """Gradients of (x, *tensors), layer by layer from the last."""
    mean, var = statistics
    count, total = len(ctx.layers), buffer.shape[1]
    second, kept = rest[: 2 * count], rest[2 * count :]
    dbuffer = dense(dy, like=buffer)
    dbuffer = dbuffer.clone() if dbuffer is dy else dbuffer
    q, r = torch.zeros_like(mean), torch.zeros_like(mean)
    if not mean.numel():  # no layer has batch statistics: nothing is deferred
        mean, q, r = (buffer.new_zeros(total, dtype=mean.dtype) for _ in "mqr")
    grads: list[Tensor | None] = [None] * (1 + TENSORS * count)
    inner, end = _Inner(buffer), total
    for i in reversed(range(count)):
        layer, t = ctx.layers[i], _Tensors(tensors, i)
        start = end - t.growth
        written = slice(start, end)
        dnew = finish_op(dbuffer, buffer, mean[written], q[written], r[written], start, t.growth)
        first = (mean[:start], var[:start]) if layer.batch_stats[0] else t.running1
        pair = slice(2 * i, 2 * i + 2)
        draw, *found = _second_half_backward(layer, t, second[pair], *kept[pair], dnew)
        dinner, dconv1, _ = convolution_backward(
            draw, inner.load(layer, t, first, start), t.conv1, False, layer.geometry[0],
            [True, True, False],
        )  # fmt: skip
        deferred = (q, r) if layer.batch_stats[0] else (None, None)
        norm = *first, *t.norm1, layer.eps[0]
        dinner = dense(dinner, like=buffer)
        dweight, dbias = grad_op(dbuffer, *deferred, dinner, buffer, *norm)
        found = _like(dweight, t.norm1[0]), _like(dbias, t.norm1[1]), dconv1, *found
        grads[1 + i * TENSORS : 1 + i * TENSORS + PARAMETERS] = found
        end = start
    grads[0] = finish_op(dbuffer, buffer, mean[:end], q[:end], r[:end], 0, end)
    return grads


def _second_half_backward(layer, t, stats, raw, h, dnew):
    """Gradients of the bottleneck, norm 2 and convolution 2."""
    bn = *stats, layer.batch_stats[1], layer.eps[1], "relu"
    inputs = raw, *t.norm2, t.conv2, None
    needed = True, *(p is not None for p in t.norm2), True, False
    return conv_stats.backward(dnew, inputs, bn, layer.geometry[1], needed, h)[:4]


def _like(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else grad.to(parameter.dtype)


def _differentiable_backward(ctx, buffer, tensors, dy, needed):
    """The same gradients as a graph: the reference of the block is differentiated.

    The buffer is an output of this node, and its first channels are x.
    """

    def fn(x, *tensors):
        for i, layer in enumerate(ctx.layers):
            t, new = _Tensors(tensors, i), x
            halves = (t.norm1, t.running1, t.conv1), (t.norm2, t.running2, t.conv2)
            for k, (norm, running, conv) in enumerate(halves):
                bn = *norm, *running, layer.batch_stats[k], layer.eps[k], "relu"
                new = reference.conv_stats(new, bn, conv, None, *layer.geometry[k])[0]
            x = torch.cat([x, new], 1)
        return x

    inputs = buffer[:, : ctx.channels], *tensors
    return vjp(fn, inputs, needed, dy)
