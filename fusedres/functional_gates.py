"""Gated residuals: ``fusedres.functional.highway`` and ``lstm_cell``; numerics as there."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .layout import dense, dense_like, memory_format
from .ops import highway as highway_op
from .ops import lstm_cell as lstm_cell_op

__all__ = ["highway", "lstm_cell"]


def highway(parts: Tensor, input: Tensor, *, act: str = "relu", coupled: bool = True) -> Tensor:
    """``act(h) * sigmoid(t) + input * (1 - sigmoid(t))``, uncoupled ``... + input * sigmoid(c)``.

    Args:
        parts: [N, 2C, ...] (uncoupled 3C): h, t and c along the channels, as one layer computed
            them.
        input: [N, C, ...].
        act: activation of h, as in ``batch_norm_act``.
        coupled: whether the carry gate is 1 - t.

    Returns:
        A new tensor of input's shape, dtype and format.

    Raises:
        TypeError: a tensor is not floating-point, or parts has another dtype than input.
        ValueError: a wrong shape or act.
        RuntimeError: tensors on different devices.

    Traffic: reads both once, writes once: 4 passes (eager: 15).
    Source: Srivastava et al. 2015, equation 3; ``reference.highway``.
    """
    checks.floating("input", input)
    checks.at_least_2d("input", input)
    checks.activation("act", act)
    _check_parts("parts", parts, input, 2 if coupled else 3)
    x = dense(input)
    parts = dense_like(parts, x)
    y = highway_op.op(_rows(parts), _rows(x), act, coupled)
    return _like_rows(y, x)


def _rows(t: Tensor) -> Tensor:
    """A dense tensor as the matrix in which each row holds all channels of one thing.

    NHWC: a row is a pixel. NCHW: a row is an image, whose channels are runs of pixels.
    """
    if memory_format(t) == torch.channels_last:
        return t.permute(0, 2, 3, 1).flatten(0, 2)
    return t.flatten(1)


def _like_rows(y: Tensor, x: Tensor) -> Tensor:
    if memory_format(x) == torch.channels_last:
        n, c, h, w = x.shape
        return y.view(n, h, w, c).permute(0, 3, 1, 2)
    return y.view(x.shape)


def _check_parts(name: str, parts: Tensor, x: Tensor, count: int) -> None:
    checks.floating(name, parts)
    checks.same_device(name, parts, x)
    wanted = (x.shape[0], count * x.shape[1], *x.shape[2:])
    if tuple(parts.shape) != wanted:
        raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(parts.shape)}")
    if parts.dtype != x.dtype:
        raise TypeError(f"{name}: wanted dtype {x.dtype} (the input's), got {parts.dtype}")


def lstm_cell(gates: Tensor, c: Tensor, *, forget_gate: bool = True) -> tuple[Tensor, Tensor]:
    """``c' = f * c + i * g, h = o * tanh(c')``; without a forget gate ``c' = c + i * g``.

    Args:
        gates: [N, 4H], the pre-activations of i, f, g, o in PyTorch's order; or [N, 3H]: i, g, o.
        c: [N, H], the cell's state.
        forget_gate: whether there is f.

    Returns:
        h and c', [N, H] of c's dtype.

    Raises:
        TypeError: a tensor is not floating-point, or gates has another dtype than c.
        ValueError: a wrong shape. RuntimeError: tensors on different devices.

    Traffic: reads both once, writes both results: 7 passes over c (eager: 22).
    Source: Gers et al. 2000; Hochreiter and Schmidhuber 1997; ``reference.lstm_cell``.
    """
    checks.floating("c", c)
    if c.dim() != 2:
        raise ValueError(f"c: wanted 2 dimensions [N, H], got {tuple(c.shape)}")
    _check_parts("gates", gates, c, 4 if forget_gate else 3)
    return lstm_cell_op.op(gates.contiguous(), c.contiguous(), forget_gate)
