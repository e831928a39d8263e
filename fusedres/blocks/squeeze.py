"""Squeeze-excite in its variants: one op where there is one, else a gate and one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .. import observers, reference
from ..ops.define import numel_bytes
from .recognise import SE


def squeeze_excite(
    x: Tensor,
    se: SE,
    residual: Tensor | None = None,
    post_act: str = "identity",
    scale: Tensor | None = None,
) -> Tensor:
    """``post_act(scale * x * gate(x) + residual)``; ``scale`` [N] is stochastic depth's."""
    if se.has_op and scale is None:
        return F.squeeze_excite(
            x, se.w1, se.b1, se.w2, se.b2,
            residual=residual, act=se.act, gate=se.gate, post_act=post_act,
        )  # fmt: skip
    gate = channel_gate(x, se)
    gate = gate if scale is None else gate * scale.view(-1, 1)
    return F.residual_add(x, residual, scale=gate, act=post_act)


def channel_gate(x: Tensor, se: SE) -> Tensor:
    """The gate [N, C] of ``x`` [N, C, H, W], in the accumulator's dtype."""
    acc = reference.acc_dtype(x.dtype)
    passes = 1 + (se.pool == "mean_max")
    bytes_read = passes * numel_bytes(x)
    observers.notify(observers.Event("squeeze", "torch", None, passes, bytes_read, bytes_read))
    with torch.autocast(x.device.type, enabled=False):
        # Not mean(): its backward writes a tensor of x's size, that of a sum is a view.
        squeezed = x.sum((2, 3), dtype=acc) / x.shape[2:].numel()
        if se.pool == "mean_max":
            squeezed = 0.5 * squeezed + 0.5 * x.amax((2, 3)).to(acc)
        w1, b1, w2, b2 = (None if p is None else p.to(acc) for p in (se.w1, se.b1, se.w2, se.b2))
        logits = torch.nn.functional.linear(squeezed, w1.flatten(1), b1)
        if w2 is not None:
            hidden = reference.ACTIVATIONS[se.act](logits)
            logits = torch.nn.functional.linear(hidden, w2.flatten(1), b2)
        return reference.GATES[se.gate](logits)
