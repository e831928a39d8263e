"""The LSTM cell as a gated residual: its state is a residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from .. import functional as F
from ..ops.convolution import upcasts
from .products import adds_in_place, linear
from .recognise import symbolic


class ResidualLSTMCell(nn.Module):
    """``c' = f * c + i * g, h' = o * tanh(c')``: nn.LSTMCell; or without a forget gate.

    ``forget_gate=False`` is the original cell, ``c' = c + i * g``: an identity mapping along time,
    as a residual network's along depth. All gates come from two products, the second added to the
    first as it is made, and one launch does the rest.

    State dict: ``weight_ih`` [4H, I], ``weight_hh`` [4H, H], ``bias_ih`` and ``bias_hh`` [4H], rows
    in nn.LSTMCell's order i, f, g, o; without a forget gate [3H, ...]: i, g, o.

    Args:
        input_size, hidden_size, bias: as for nn.LSTMCell.
        forget_gate: whether the state has a gate.

    Raises:
        ValueError: a size < 1; in the forward an input or a state of another shape.
        TypeError: a size that is no whole number; an input of another dtype than the weights'
            (RuntimeError: another device).

    Numerics: under autocast the products are in its dtype and the state keeps its own.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, forget_gate: bool = True,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        checks.size("input_size", input_size)
        checks.size("hidden_size", hidden_size)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.bias, self.forget_gate = bias, forget_gate
        rows = (4 if forget_gate else 3) * hidden_size
        to = dict(device=device, dtype=dtype)
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **to))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, **to))
        self.bias_ih = nn.Parameter(torch.empty(rows, **to)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(rows, **to)) if bias else None
        for p in self.parameters():  # nn.LSTMCell's, in its order
            nn.init.uniform_(p, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``input``: [N, input_size] or [input_size]; ``hx``: (h, c), default zeros."""
        if symbolic(input):
            return plain(self, input, hx)
        checks.layer_input("input", input, self.weight_ih)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            wanted = f"[N, {self.input_size}] or [{self.input_size}]"
            raise ValueError(f"input: wanted shape {wanted}, got {tuple(input.shape)}")
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = zeros, zeros
        shape = *input.shape[:-1], self.hidden_size
        for name, t in zip(("hx[0]", "hx[1]"), hx, strict=True):
            if tuple(t.shape) != shape:
                raise ValueError(f"{name}: wanted shape {shape}, got {tuple(t.shape)}")
        if input.dim() == 2:
            return self._rows(input, *hx)
        h, c = self._rows(*(t.unsqueeze(0) for t in (input, *hx)))
        return h.squeeze(0), c.squeeze(0)

    def _rows(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight_hh
        bias = None if self.bias_ih is None else self.bias_ih + self.bias_hh
        gates = linear(x, self.weight_ih, bias)
        if upcasts(gates):
            gates = gates + linear(h, weight, None)
        elif adds_in_place(gates, h, weight):
            gates = gates.addmm_(h, weight.t())
        else:
            gates = torch.addmm(gates, h, weight.t())
        return F.lstm_cell(gates.to(c.dtype), c, forget_gate=self.forget_gate)

    def extra_repr(self) -> str:
        extra = "" if self.bias else ", bias=False"
        extra += "" if self.forget_gate else ", forget_gate=False"
        return f"{self.input_size}, {self.hidden_size}{extra}"


def plain(
    cell: ResidualLSTMCell, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The cell in PyTorch's own functions, for traces and ``unfuse``."""
    size, product = cell.hidden_size, nn.functional.linear
    gates = product(x, cell.weight_ih, cell.bias_ih)
    h, c = (torch.zeros_like(gates[..., :size], dtype=x.dtype),) * 2 if hx is None else hx
    gates = (gates + product(h, cell.weight_hh, cell.bias_hh)).to(c.dtype)
    parts = [gates[..., k * size : (k + 1) * size] for k in range(4 if cell.forget_gate else 3)]
    i, g, o = parts[0], *parts[-2:]
    kept = torch.sigmoid(parts[1]) * c if cell.forget_gate else c
    c = kept + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
