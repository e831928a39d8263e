"""The steps of a dense block: ``dense_load``, ``dense_grad`` and ``dense_finish``.

``dense_block`` says what they are for. The native kernels are in csrc/cpu/dense_block.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import dense
from .define import Traffic, define, numel_bytes

LOAD_SCHEMA = (
    "dense_load(Tensor buffer, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " int channels, float eps) -> Tensor"
)
GRAD_SCHEMA = (
    "dense_grad(Tensor(a!) dbuffer, Tensor dh, Tensor buffer, Tensor mean, Tensor var,"
    " Tensor? weight, Tensor? bias, float eps) -> (Tensor dweight, Tensor dbias)"
)
FINISH_SCHEMA = (
    "dense_finish(Tensor dbuffer, Tensor buffer, Tensor mean, Tensor q, Tensor r, int start,"
    " int channels) -> Tensor"
)


def _load(buffer, mean, var, weight, bias, channels, eps):
    x = buffer[:, :channels]
    h, _ = reference.bn_act(x, weight, bias, None, mean, var, False, eps, "relu")
    return dense(h, like=buffer)


def _grad(dbuffer, dh, buffer, mean, var, weight, bias, eps):
    channels = dh.shape[1]
    acc = reference.acc_dtype(buffer.dtype)
    mean, var, weight, bias = (None if t is None else t.to(acc) for t in (mean, var, weight, bias))
    centered = buffer[:, :channels].to(acc) - _column(mean)
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else weight * rstd
    z = centered * _column(scale)
    z = z if bias is None else z + _column(bias)
    u = torch.where(z <= 0, 0.0, dh.to(acc))
    dbuffer[:, :channels] += (u * _column(scale)).to(buffer.dtype)
    return (u * centered).sum((0, 2, 3)) * rstd, u.sum((0, 2, 3))


def _finish(dbuffer, buffer, mean, q, r, start, channels):
    acc = reference.acc_dtype(buffer.dtype)
    x, dx = (t[:, start : start + channels].to(acc) for t in (buffer, dbuffer))
    mean, q, r = (_column(t.to(acc)) for t in (mean, q, r))
    return dense((dx + (q * (x - mean) + r)).to(buffer.dtype), like=buffer)


def _column(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def _fake_load(buffer, mean, var, weight, bias, channels, eps):
    return torch.empty_like(buffer[:, :channels])


def _fake_grad(dbuffer, dh, buffer, mean, var, weight, bias, eps):
    shape, acc = (dh.shape[1],), reference.acc_dtype(buffer.dtype)
    return buffer.new_empty(shape, dtype=acc), buffer.new_empty(shape, dtype=acc)


def _fake_finish(dbuffer, buffer, mean, q, r, start, channels):
    return torch.empty_like(buffer[:, start : start + channels])


# --- memory traffic, in bytes


def _slice_bytes(buffer: Tensor, channels: int) -> int:
    return numel_bytes(buffer) // max(1, buffer.shape[1]) * channels


def load_bytes(buffer, mean, var, weight, bias, channels, eps) -> int:
    """Reads the slice, writes its activation."""
    return 2 * _slice_bytes(buffer, channels)


def load_eager_bytes(buffer, mean, var, weight, bias, channels, eps) -> int:
    """Eager: concatenation RW, statistics R, norm RW, ReLU RW."""
    return 7 * _slice_bytes(buffer, channels)


def grad_bytes(dbuffer, dh, *_) -> int:
    """Reads dh, the slice and its gradient, writes that."""
    return 4 * numel_bytes(dh)


def grad_eager_bytes(dbuffer, dh, *_) -> int:
    """Eager: ReLU RRW, norm RR + RRW, accumulation of the slices RRW."""
    return 11 * numel_bytes(dh)


def finish_bytes(dbuffer, buffer, mean, q, r, start, channels) -> int:
    return 3 * _slice_bytes(buffer, channels)


load_op = define(
    LOAD_SCHEMA,
    reference=_load,
    fake=_fake_load,
    traffic=Traffic(load_bytes, load_eager_bytes, flops=lambda b, *_: 4 * b.numel()),
)
grad_op = define(
    GRAD_SCHEMA,
    reference=_grad,
    fake=_fake_grad,
    traffic=Traffic(grad_bytes, grad_eager_bytes, flops=lambda _, dh, *__: 8 * dh.numel()),
)
finish_op = define(
    FINISH_SCHEMA,
    reference=_finish,
    fake=_fake_finish,
    traffic=Traffic(finish_bytes, finish_bytes, flops=lambda b, *_: 4 * b.numel()),
)
