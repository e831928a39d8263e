"""``highway`` and its backward on Triton: one launch each for gates, mix and all gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_backward, act_forward, sigmoid
from .gates import CONFIGS, Rows, load, rows_tile, store
from .launch import Config, launch

# Computes: y = act(h) * t + x * (1 - t), t = sigmoid(t'); uncoupled: ... + x * sigmoid(c')
#           (Srivastava et al. 2015, eq. 3)
# Reads:    parts [rows, 2 * C] (3 * C uncoupled), x [rows, C] once
# Writes:   y [rows, C] once
# Traffic:  (4 or 5)*rows*C*sizeof(x) bytes; eager moves 15
# Split:    one program = one tile of x and the same columns of all parts; fp32 arithmetic, one
#           rounding at the store


@triton.jit(do_not_specialize=["C", "rows"])
def highway_fwd_kernel(
    parts_ptr, x_ptr, y_ptr, C, rows, ACT: tl.constexpr, PARTS: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    at, part, inside, C = rows_tile(C, rows, PARTS, ALIGN, WIDE, BLOCK_C, BLOCK_HW)
    h = act_forward(load(parts_ptr, part, inside), ACT)
    t = sigmoid(load(parts_ptr + C, part, inside))
    c = 1.0 - t
    if PARTS == 3:
        c = sigmoid(load(parts_ptr + 2 * C, part, inside))
    store(y_ptr, at, h * t + load(x_ptr, at, inside) * c, inside)


# Computes: dh = dy * t * act'(h), dt' = dy * (act(h) - x) * t * (1 - t), dx = dy * (1 - t);
#           uncoupled: dt' without x, dc' = dy * x * c * (1 - c), dx = dy * c
# Reads:    dy, x [rows, C], parts once: the gates are computed again
# Writes:   dparts, dx once
# Traffic:  (7 or 9)*rows*C*sizeof(x) bytes
# Split:    as the forward


@triton.jit(do_not_specialize=["C", "rows"])
def highway_bwd_kernel(
    dy_ptr, parts_ptr, x_ptr, dparts_ptr, dx_ptr, C, rows, ACT: tl.constexpr,
    PARTS: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    at, part, inside, C = rows_tile(C, rows, PARTS, ALIGN, WIDE, BLOCK_C, BLOCK_HW)
    dy = load(dy_ptr, at, inside)
    x = load(x_ptr, at, inside)
    z = load(parts_ptr, part, inside)
    t = sigmoid(load(parts_ptr + C, part, inside))
    store(dparts_ptr, part, act_backward(z, dy * t, ACT), inside)
    c = 1.0 - t
    through_t = act_forward(z, ACT)
    if PARTS == 2:
        through_t -= x
    else:
        c = sigmoid(load(parts_ptr + 2 * C, part, inside))
        store(dparts_ptr + 2 * C, part, dy * x * (c * (1.0 - c)), inside)
    store(dparts_ptr + C, part, dy * through_t * (t * (1.0 - t)), inside)
    store(dx_ptr, at, dy * c, inside)


def highway(parts: Tensor, x: Tensor, act: str, coupled: bool) -> Tensor:
    view = Rows("highway", x, "parts", parts, 2 if coupled else 3)
    y = torch.empty_like(x)
    if not x.numel():
        return y

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            highway_fwd_kernel, view.programs(flags, flags["BLOCK_HW"]), parts, x, y, view.c,
            view.hw, device=x.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    tuning.run(view.key("highway", act, coupled), CONFIGS, work, x.device)
    return y


def highway_backward(
    dy: Tensor, parts: Tensor, x: Tensor, act: str, coupled: bool
) -> tuple[Tensor, Tensor]:
    view = Rows("highway_backward", x, "parts", parts, 2 if coupled else 3)
    view.operand("dy", dy)
    dparts, dx = torch.empty_like(parts), torch.empty_like(x)
    if not x.numel():
        return dparts, dx

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            highway_bwd_kernel, view.programs(flags, flags["BLOCK_HW"]), dy, parts, x, dparts, dx,
            view.c, view.hw, device=x.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    tuning.run(view.key("highway_backward", act, coupled), CONFIGS, work, x.device)
    return dparts, dx
