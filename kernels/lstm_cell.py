"""``lstm_cell`` and its backward on Triton: one launch each for all gates and the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import sigmoid
from .gates import CONFIGS, Rows, load, rows_tile, store, tanh
from .launch import Config, launch


@triton.jit
def gates_of(gates_ptr, part, inside, C, FORGET: tl.constexpr):
    """i, f, g, o of a tile, in PyTorch's order; f is 1 without a forget gate."""
    i = sigmoid(load(gates_ptr, part, inside))
    f = tl.full(i.shape, 1.0, tl.float32)
    if FORGET:
        f = sigmoid(load(gates_ptr + C, part, inside))
    g = tanh(load(gates_ptr + (1 + FORGET) * C, part, inside))
    o = sigmoid(load(gates_ptr + (2 + FORGET) * C, part, inside))
    return i, f, g, o


# Computes: c' = sigmoid(f) * c + sigmoid(i) * tanh(g), h = sigmoid(o) * tanh(c')
#           (Gers et al. 2000; without f, which is then 1: Hochreiter and Schmidhuber 1997)
# Reads:    gates [N, 4 * C] (3 * C without f), c [N, C] once
# Writes:   h, c' [N, C] once
# Traffic:  (7 or 6)*N*C*sizeof(c) bytes; eager moves 22
# Split:    one program = one tile of c and the same columns of all gates; fp32 arithmetic, one
#           rounding at the store


@triton.jit(do_not_specialize=["C", "rows"])
def lstm_cell_fwd_kernel(
    gates_ptr, c_ptr, h_ptr, c_new_ptr, C, rows, PARTS: tl.constexpr, NHWC: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    at, part, inside, C = rows_tile(C, rows, PARTS, ALIGN, WIDE, BLOCK_C, BLOCK_HW)
    i, f, g, o = gates_of(gates_ptr, part, inside, C, PARTS - 3)
    c = f * load(c_ptr, at, inside) + i * g
    store(c_new_ptr, at, c, inside)
    store(h_ptr, at, o * tanh(c), inside)


# Computes: s = dc' + dh * o * (1 - tanh(c')^2); di = s * g * i * (1 - i), df = s * c * f * (1 - f),
#           dg = s * i * (1 - g^2), do = dh * tanh(c') * o * (1 - o), dc = s * f
# Reads:    gates, c, and dh, dc' where there are any, once: gates and c' are computed again
# Writes:   dgates, dc once
# Traffic:  (10 to 12)*N*C*sizeof(c) bytes, two less without f
# Split:    as the forward


@triton.jit(do_not_specialize=["C", "rows"])
def lstm_cell_bwd_kernel(
    gates_ptr, c_ptr, dh_ptr, dc_new_ptr, dgates_ptr, dc_ptr, C, rows, PARTS: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    FORGET: tl.constexpr = PARTS - 3
    at, part, inside, C = rows_tile(C, rows, PARTS, ALIGN, WIDE, BLOCK_C, BLOCK_HW)
    i, f, g, o = gates_of(gates_ptr, part, inside, C, FORGET)
    c = load(c_ptr, at, inside)
    s = tl.zeros_like(c)
    do = tl.zeros_like(c)
    if dc_new_ptr is not None:
        s = load(dc_new_ptr, at, inside)
    if dh_ptr is not None:
        dh = load(dh_ptr, at, inside)
        squashed = tanh(f * c + i * g)
        s += dh * o * (1.0 - squashed * squashed)
        do = dh * squashed * (o * (1.0 - o))
    store(dgates_ptr, part, s * g * (i * (1.0 - i)), inside)
    if FORGET:
        store(dgates_ptr + C, part, s * c * (f * (1.0 - f)), inside)
    store(dgates_ptr + (1 + FORGET) * C, part, s * i * (1.0 - g * g), inside)
    store(dgates_ptr + (2 + FORGET) * C, part, do, inside)
    store(dc_ptr, at, s * f, inside)


def lstm_cell(gates: Tensor, c: Tensor, forget_gate: bool) -> tuple[Tensor, Tensor]:
    view = Rows("lstm_cell", c, "gates", gates, 4 if forget_gate else 3)
    h, c_new = torch.empty_like(c), torch.empty_like(c)
    if not c.numel():
        return h, c_new

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            lstm_cell_fwd_kernel, view.programs(flags, flags["BLOCK_HW"]), gates, c, h, c_new,
            view.c, view.hw, device=c.device, warps=config.warps, **flags,
        )  # fmt: skip

    tuning.run(view.key("lstm_cell", forget_gate), CONFIGS, work, c.device)
    return h, c_new


def lstm_cell_backward(
    gates: Tensor, c: Tensor, dh: Tensor | None, dc: Tensor | None, forget_gate: bool
) -> tuple[Tensor, Tensor]:
    view = Rows("lstm_cell_backward", c, "gates", gates, 4 if forget_gate else 3)
    view.operand("dh", dh)
    view.operand("dc", dc)
    dgates, dc_before = torch.empty_like(gates), torch.empty_like(c)
    if not c.numel():
        return dgates, dc_before

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            lstm_cell_bwd_kernel, view.programs(flags, flags["BLOCK_HW"]), gates, c, dh, dc,
            dgates, dc_before, view.c, view.hw, device=c.device, warps=config.warps, **flags,
        )  # fmt: skip

    key = view.key("lstm_cell_backward", forget_gate, dh is not None, dc is not None)
    tuning.run(key, CONFIGS, work, c.device)
    return dgates, dc_before
