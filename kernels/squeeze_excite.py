"""``squeeze_excite`` and its backward on Triton, and the kernels on [N, C] that bn_se_act shares.

Forward: five launches (chunk means, squeeze, two of the MLP, apply); x is read twice, written once.
Backward: seven (partial sums, the gate's gradient, four of the MLP, apply).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .activations import gate_backward
from .launch import View, cdiv, launch, power_of_2
from .mlp import Weights
from .passes import NO_NORM, Gate, Incoming, Norm
from .stats import Moments, moments
from .stream import bn_scale
from .tile import load_channels

SQUEEZE_CHANNELS = 256

# Computes: squeezed = mean of x over pixels; pooled = a * (squeezed - mean) + bias
# Reads:    part_mean [N, chunks, C] fp32; mean, var, weight, bias [C]
# Writes:   squeezed, pooled [N, C] fp32
# Traffic:  4*N*C*(chunks + 2) bytes
# Split:    one program = BLOCK_C channels of an image; chunks in order, weighted by their pixels


@triton.jit(do_not_specialize=["chunks", "C", "HW", "chunk"])
def se_squeeze_kernel(
    part_mean_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, squeezed_ptr, pooled_ptr,
    chunks, C, HW, chunk, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c_blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = tl.program_id(0) % c_blocks * BLOCK_C
    squeezed = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, chunks):
        count = tl.minimum(HW - part * chunk, chunk)
        part_mean = load_channels(part_mean_ptr + (n * chunks + part) * C, c0, C, BLOCK_C, 0.0)
        squeezed += part_mean * (count * 1.0 / HW)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(squeezed_ptr + n * C + offs_c, squeezed, mask=offs_c < C)
    if pooled_ptr is not None:
        _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
        center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
        pooled = (squeezed - center) * a + load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
        tl.store(pooled_ptr + n * C + offs_c, pooled, mask=offs_c < C)


# Computes: U1 = sum u and U2 = sum u * (x - mean) of an image, dgate = a * U2 + bias * U1,
#           dlogits = dgate * gate'(logits); pooled again
# Reads:    part_u, part_ux [N, chunks, C], logits, squeezed [N, C] fp32; the norm's vectors
# Writes:   sum_u, sum_ux (with batch norm), dlogits, pooled [N, C] fp32
# Traffic:  4*N*C*(2*chunks + 6) bytes
# Split:    one program = BLOCK_C channels of an image; chunks in order, in fp32


@triton.jit(do_not_specialize=["chunks", "C"])
def se_gate_bwd_kernel(
    part_u_ptr, part_ux_ptr, logits_ptr, squeezed_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    sum_u_ptr, sum_ux_ptr, dlogits_ptr, pooled_ptr, chunks, C, eps,
    GATE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c_blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = tl.program_id(0) % c_blocks * BLOCK_C
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, chunks):
        start = (n * chunks + part) * C
        sum_u += load_channels(part_u_ptr + start, c0, C, BLOCK_C, 0.0)
        sum_ux += load_channels(part_ux_ptr + start, c0, C, BLOCK_C, 0.0)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dgate = sum_ux
    if pooled_ptr is not None:
        _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
        bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
        center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
        squeezed = load_channels(squeezed_ptr + n * C, c0, C, BLOCK_C, 0.0)
        dgate = a * sum_ux + bias * sum_u
        tl.store(sum_u_ptr + n * C + offs_c, sum_u, mask=mask_c)
        tl.store(sum_ux_ptr + n * C + offs_c, sum_ux, mask=mask_c)
        tl.store(pooled_ptr + n * C + offs_c, (squeezed - center) * a + bias, mask=mask_c)
    logits = load_channels(logits_ptr + n * C, c0, C, BLOCK_C, 0.0)
    tl.store(dlogits_ptr + n * C + offs_c, gate_backward(logits, dgate, GATE), mask=mask_c)


def squeeze(view: View, found: Moments, norm: Norm) -> tuple[Tensor, Tensor]:
    """squeezed = mean_hw x [N, C], and what the MLP sees: the squeeze of the normalised x."""
    squeezed = view.new(view.n, view.c)
    pooled = None if norm.mean is None else view.new(view.n, view.c)
    block_c = min(SQUEEZE_CHANNELS, power_of_2(view.c))
    launch(
        se_squeeze_kernel, view.n * cdiv(view.c, block_c), found.mean, *norm.pointers, squeezed,
        pooled, cdiv(view.hw, found.chunk), view.c, view.hw, found.chunk, norm.eps,
        device=squeezed.device, warps=4, BLOCK_C=block_c,
    )  # fmt: skip
    return squeezed, squeezed if pooled is None else pooled


def gate_backward_sums(
    view: View, given: Incoming, norm: Norm, gate: Gate, squeezed: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dlogits and pooled [N, C]; with batch norm also sum u and sum u * (x - mean) [N, C]."""
    part_u, part_ux, chunks = passes.reduce(view, given, norm, gate)
    with_norm = norm.mean is not None
    dlogits = view.new(view.n, view.c)
    sum_u, sum_ux, pooled = (view.new(view.n, view.c) if with_norm else None for _ in range(3))
    block_c = min(SQUEEZE_CHANNELS, power_of_2(view.c))
    launch(
        se_gate_bwd_kernel, view.n * cdiv(view.c, block_c), part_u, part_ux, gate.logits, squeezed,
        *norm.pointers, sum_u, sum_ux, dlogits, pooled, chunks, view.c, norm.eps,
        device=dlogits.device, warps=4, GATE=gate.kind, BLOCK_C=block_c,
    )  # fmt: skip
    return dlogits, pooled if with_norm else squeezed, sum_u, sum_ux


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    residual: Tensor | None, act: str, gate: str, post_act: str, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("squeeze_excite", x, images=True)
    view.operand("residual", residual)
    weights = Weights.of(view, w1, b1, w2, b2, act)
    y, mask = torch.empty_like(x), view.new_mask(save_mask)
    if not x.numel():
        squeezed = view.new(view.n, view.c).fill_(float("nan"))
        hidden = view.new(view.n, w1.shape[0]).fill_(float("nan"))
        return y, squeezed, hidden, squeezed.clone(), mask
    squeezed, pooled = squeeze(view, moments(view), NO_NORM)
    hidden, logits = weights.forward(view, pooled)
    passes.apply(view, y, mask, NO_NORM, Gate(logits, gate), residual=residual, act=post_act)
    return y, squeezed, hidden, logits, mask


def squeeze_excite_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, residual: Tensor | None, squeezed: Tensor,
    hidden: Tensor, logits: Tensor, mask: Tensor, act: str, gate: str, post_act: str,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("squeeze_excite_backward", x, images=True)
    weights = Weights.of(view, w1, None, w2, None, act)
    given = Incoming.of(view, dy, residual, mask, post_act)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    if not x.numel():
        return dx, *weights.no_gradients(view), dresidual
    gate = Gate(logits, gate)
    dlogits, pooled, _, _ = gate_backward_sums(view, given, NO_NORM, gate, squeezed)
    dpooled, gradients = weights.backward(view, dlogits, pooled, hidden)
    passes.backward_apply(view, given, NO_NORM, dx, dresidual, gate, dpooled=dpooled)
    return dx, *gradients, dresidual
