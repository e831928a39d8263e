"""``residual_mix`` and its backward on Triton: one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_backward, act_backward_masked, act_forward, act_mask
from .launch import Config, View, launch
from .tile import aligned, locate, mask_tile, pack_bits, tile, unpack_bits

# The first is the default. None was measured on a GPU yet.
CONFIGS = (Config(4096, 64, 4), Config(8192, 128, 8), Config(2048, 64, 4))


@triton.jit
def row_factor(row_scale_ptr, n, alpha):
    """alpha * s[n] (stochastic depth, Huang et al. 2016)"""
    if row_scale_ptr is None:
        return alpha
    else:
        return alpha * tl.load(row_scale_ptr + n).to(tl.float32)


# Computes: y = act(f * branch + beta * shortcut), f = alpha * s[n]; with a gate g:
#           y = act(f * g * branch + beta * (1 - g) * shortcut)   (Srivastava et al. 2015, eq. 3)
# Reads:    branch, shortcut, gate [N, C, HW] once; row_scale [N]
# Writes:   y [N, C, HW] once, mask one bit an element
# Traffic:  (3 or 4)*N*C*HW*sizeof(branch) + N*C*HW/8 bytes
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "HW"])
def residual_mix_fwd_kernel(
    branch_ptr, shortcut_ptr, gate_ptr, row_scale_ptr, y_ptr, mask_ptr, C, HW, alpha, beta,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    branch = tl.load(branch_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    shortcut = tl.load(shortcut_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    branch *= row_factor(row_scale_ptr, n, alpha)
    shortcut *= beta
    if gate_ptr is not None:
        g = tl.load(gate_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        branch *= g
        shortcut *= 1.0 - g
    z = branch + shortcut
    y = act_forward(z, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + offs, y, mask=inside)
    if mask_ptr is not None:
        bits = pack_bits(act_mask(z, ACT) & inside)
        start, offs, inside = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        tl.store(mask_ptr + start + offs, bits, mask=inside)


# Computes: with u = dy * act'(z): dbranch = f * g * u, dshortcut = beta * (1 - g) * u,
#           dgate = (f * branch - beta * shortcut) * u
# Reads:    dy [N, C, HW] once; gate; branch and shortcut if there is a gate, or to find z again
# Writes:   dbranch, dshortcut, dgate [N, C, HW] once
# Traffic:  (3 to 7)*N*C*HW*sizeof(dy) + N*C*HW/8 bytes
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "HW"])
def residual_mix_bwd_kernel(
    dy_ptr, branch_ptr, shortcut_ptr, gate_ptr, row_scale_ptr, mask_ptr,
    dbranch_ptr, dshortcut_ptr, dgate_ptr, C, HW, alpha, beta,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    u = tl.load(dy_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    factor = row_factor(row_scale_ptr, n, alpha)
    if gate_ptr is None:
        through_branch = tl.zeros_like(u) + factor
        through_shortcut = tl.zeros_like(u) + beta
    else:
        g = tl.load(gate_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        through_branch = factor * g
        through_shortcut = beta * (1.0 - g)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        shortcut = tl.load(shortcut_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    if ACT != "identity":
        if mask_ptr is not None:
            first, bytes_, present = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
            passes = unpack_bits(tl.load(mask_ptr + first + bytes_, mask=present, other=0))
            u = act_backward_masked(passes, u, ACT)
        else:
            u = act_backward(through_branch * branch + through_shortcut * shortcut, u, ACT)
    dtype: tl.constexpr = dbranch_ptr.dtype.element_ty
    tl.store(dbranch_ptr + start + offs, (through_branch * u).to(dtype), mask=inside)
    tl.store(dshortcut_ptr + start + offs, (through_shortcut * u).to(dtype), mask=inside)
    if dgate_ptr is not None:
        dgate = (factor * branch - beta * shortcut) * u
        tl.store(dgate_ptr + start + offs, dgate.to(dtype), mask=inside)


def _view(op: str, x: Tensor, row_scale: Tensor | None) -> tuple[View, Tensor | None]:
    """Images are told apart only if they have scales of their own."""
    if row_scale is not None and row_scale.shape != (x.shape[0],):
        wanted, got = (x.shape[0],), tuple(row_scale.shape)
        raise ValueError(f"{op}: row_scale: wanted shape {wanted}, got {got}")
    scales = None if row_scale is None else row_scale.contiguous()
    return View(op, x, images=row_scale is not None), scales


def residual_mix(
    branch: Tensor, shortcut: Tensor, gate: Tensor | None, row_scale: Tensor | None,
    alpha: float, beta: float, act: str, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view, row_scale = _view("residual_mix", branch, row_scale)
    view.operand("shortcut", shortcut)
    view.operand("gate", gate)
    y, mask = torch.empty_like(branch), view.new_mask(save_mask)
    if not branch.numel():
        return y, mask

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            residual_mix_fwd_kernel, view.programs(flags, flags["BLOCK_HW"]), branch, shortcut,
            gate, row_scale, y, mask if save_mask else None, view.c, view.hw, alpha, beta,
            device=y.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    tuning.run(view.key("residual_mix", act, gate is not None, save_mask), CONFIGS, work, y.device)
    return y, mask


def residual_mix_backward(
    dy: Tensor, branch: Tensor | None, shortcut: Tensor | None, gate: Tensor | None,
    row_scale: Tensor | None, mask: Tensor, alpha: float, beta: float, act: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    view, row_scale = _view("residual_mix_backward", dy, row_scale)
    for name, t in (("branch", branch), ("shortcut", shortcut), ("gate", gate)):
        view.operand(name, t)
    bits = view.mask("mask", mask)
    if (branch is None) != (shortcut is None):
        raise ValueError(f"{view.op}: branch, shortcut: wanted both or neither")
    if branch is None and (gate is not None or (act != "identity" and bits is None)):
        raise ValueError(f"{view.op}: branch: wanted with a gate, and to find z again, got None")
    dbranch, dshortcut = torch.empty_like(dy), torch.empty_like(dy)
    dgate = dy.new_empty(0) if gate is None else torch.empty_like(dy)
    if not dy.numel():
        return dbranch, dshortcut, dgate
    # Without a gate the operands are read only to find z again.
    needed = gate is not None or (act != "identity" and bits is None)

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            residual_mix_bwd_kernel, view.programs(flags, flags["BLOCK_HW"]), dy,
            *((branch, shortcut) if needed else (None, None)), gate, row_scale, bits, dbranch,
            dshortcut, None if gate is None else dgate, view.c, view.hw, alpha, beta,
            device=dy.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    key = view.key("residual_mix_backward", act, gate is not None, bits is not None)
    tuning.run(key, CONFIGS, work, dy.device)
    return dbranch, dshortcut, dgate
