"""The steps of a dense block: ``dense_store``, ``dense_load``, ``dense_grad``, ``dense_finish``.

``dense_block`` says what they are for. The native kernels are in csrc/cpu/dense_block.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import dense
from .define import Traffic, define, numel_bytes

STORE_SCHEMA = (
    "dense_store(Tensor(a!) buffer, Tensor x, Tensor(b!)? mean, Tensor(c!)? var, int start) -> ()"
)
LOAD_SCHEMA = (
    "dense_load(Tensor(a!) h, Tensor buffer, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, float eps) -> ()"
)
GRAD_SCHEMA = (
    "dense_grad(Tensor(a!) dbuffer, Tensor(b!)? q, Tensor(c!)? r, Tensor dh, Tensor buffer,"
    " Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor dweight, Tensor dbias)"
)
FINISH_SCHEMA = (
    "dense_finish(Tensor dbuffer, Tensor buffer, Tensor mean, Tensor q, Tensor r, int start,"
    " int channels) -> Tensor"
)


def _store(buffer, x, mean, var, start):
    written = slice(start, start + x.shape[1])
    buffer[:, written] = x
    if mean is not None:
        mean[written], var[written] = reference.bn_stats(x)


def _load(h, buffer, mean, var, weight, bias, eps):
    x = buffer[:, : h.shape[1]]
    h.copy_(reference.bn_act(x, weight, bias, None, mean, var, False, eps, "relu")[0])


def _grad(dbuffer, q, r, dh, buffer, mean, var, weight, bias, eps):
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
    dweight, dbias = (u * centered).sum((0, 2, 3)) * rstd, u.sum((0, 2, 3))
    if q is not None:  # batch norm's, csrc/bn_math.h
        count = max(1, dh.numel() // max(1, channels))  # of no values the sums are zeros
        q[:channels] -= scale * rstd * dweight / count
        r[:channels] -= scale * dbias / count
    return dweight, dbias


def _finish(dbuffer, buffer, mean, q, r, start, channels):
    acc = reference.acc_dtype(buffer.dtype)
    x, dx = (t[:, start : start + channels].to(acc) for t in (buffer, dbuffer))
    mean, q, r = (_column(t.to(acc)) for t in (mean, q, r))
    return dense((dx + (q * (x - mean) + r)).to(buffer.dtype), like=buffer)


def _column(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def _fake_store(buffer, x, mean, var, start):
    return None


def _fake_load(h, buffer, mean, var, weight, bias, eps):
    return None


def _fake_grad(dbuffer, q, r, dh, buffer, mean, var, weight, bias, eps):
    shape, acc = (dh.shape[1],), reference.acc_dtype(buffer.dtype)
    return buffer.new_empty(shape, dtype=acc), buffer.new_empty(shape, dtype=acc)


def _fake_finish(dbuffer, buffer, mean, q, r, start, channels):
    return torch.empty_like(buffer[:, start : start + channels])


# --- memory traffic, in bytes


def _slice_bytes(buffer: Tensor, channels: int) -> int:
    return numel_bytes(buffer) // max(1, buffer.shape[1]) * channels


def store_bytes(buffer, x, mean, var, start) -> int:
    """Reads the result of a layer, writes it into its slice."""
    return 2 * numel_bytes(x)


def load_bytes(h, *_) -> int:
    """Reads the slice, writes its activation."""
    return 2 * numel_bytes(h)


def load_eager_bytes(h, *_) -> int:
    """Eager: concatenation RW, statistics R, norm RW, ReLU RW."""
    return 7 * numel_bytes(h)


def grad_bytes(dbuffer, q, r, dh, *_) -> int:
    """Reads dh, the slice and its gradient, writes that."""
    return 4 * numel_bytes(dh)


def grad_eager_bytes(dbuffer, q, r, dh, *_) -> int:
    """Eager: ReLU RRW, norm RR + RRW, accumulation of the slices RRW."""
    return 11 * numel_bytes(dh)


def finish_bytes(dbuffer, buffer, mean, q, r, start, channels) -> int:
    return 3 * _slice_bytes(buffer, channels)


store_op = define(
    STORE_SCHEMA,
    reference=_store,
    fake=_fake_store,
    traffic=Traffic(store_bytes, store_bytes, flops=lambda _, x, *__: 4 * x.numel()),
)
load_op = define(
    LOAD_SCHEMA,
    reference=_load,
    fake=_fake_load,
    traffic=Traffic(load_bytes, load_eager_bytes, flops=lambda h, *_: 4 * h.numel()),
)
grad_op = define(
    GRAD_SCHEMA,
    reference=_grad,
    fake=_fake_grad,
    traffic=Traffic(grad_bytes, grad_eager_bytes, flops=lambda _, q, r, dh, *__: 8 * dh.numel()),
)
finish_op = define(
    FINISH_SCHEMA,
    reference=_finish,
    fake=_fake_finish,
    traffic=Traffic(finish_bytes, finish_bytes, flops=lambda b, *_: 4 * b.numel()),
)
