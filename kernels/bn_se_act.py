"""``bn_se_act`` and its backward on Triton: batch norm and squeeze-excite in the passes of one.

The chunk means of one pass over x are batch norm's statistics and the squeeze; a second pass writes
y. Forward: six launches (five with running statistics). Backward: eight: one pass over (dy, x)
gives U1 = sum u and U2 = sum u * (x - mean) of every image and channel, everything else up to the
apply pass is arithmetic on [N, C].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .activations import gate_forward
from .launch import View, cdiv, launch, power_of_2
from .mlp import Weights
from .passes import Gate, Incoming, Norm
from .squeeze_excite import gate_backward_sums, squeeze
from .stats import MERGE_CHANNELS, MERGE_PARTS, batch_statistics, moments

# Computes: with dz = u * g + dpooled / HW: dbias = sum dz = sum_n (g * U1 + dpooled),
#           dweight = rstd * sum dz * (x - mean)
#                   = rstd * sum_n (g * U2 + dpooled * (squeezed - mean))
# Reads:    U1, U2, logits, dpooled, squeezed [N, C] fp32; mean, var [C]
# Writes:   dweight, dbias [C] fp32
# Traffic:  20*N*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["N", "C"])
def bn_se_act_bwd_merge_kernel(
    sum_u_ptr, sum_ux_ptr, logits_ptr, dpooled_ptr, squeezed_ptr, mean_ptr, var_ptr,
    dweight_ptr, dbias_ptr, N, C, eps,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
    sum_dz = tl.zeros((BLOCK_C,), tl.float64)
    sum_dzx = tl.zeros((BLOCK_C,), tl.float64)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & mask_c[None, :]
        offs = n[:, None].to(tl.int64) * C + offs_c[None, :]
        g = gate_forward(tl.load(logits_ptr + offs, mask=inside, other=0.0), GATE).to(tl.float64)
        u1 = tl.load(sum_u_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        u2 = tl.load(sum_ux_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        dpooled = tl.load(dpooled_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        squeezed = tl.load(squeezed_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        sum_dz += tl.sum(g * u1 + dpooled, 0)
        sum_dzx += tl.sum(g * u2 + dpooled * (squeezed - mean[None, :]), 0)
    var = tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64)
    tl.store(dweight_ptr + offs_c, (sum_dzx / tl.sqrt(var + eps)).to(tl.float32), mask=mask_c)
    tl.store(dbias_ptr + offs_c, sum_dz.to(tl.float32), mask=mask_c)


def bn_se_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, residual: Tensor | None, mean: Tensor | None,
    var: Tensor | None, batch_stats: bool, eps: float, se_act: str, gate: str, act: str,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("bn_se_act", x, images=True)
    view.operand("residual", residual)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    weights = Weights.of(view, w1, b1, w2, b2, se_act)
    y, mask = torch.empty_like(x), view.new_mask(save_mask)
    if not x.numel():
        mean, var = passes.no_statistics(view) if norm.mean is None else (norm.mean, norm.var)
        stats = mean.to(torch.float32, copy=True), var.to(torch.float32, copy=True)
        squeezed = view.new(view.n, view.c).fill_(float("nan"))
        hidden = view.new(view.n, w1.shape[0]).fill_(float("nan"))
        return y, *stats, squeezed, hidden, squeezed.clone(), mask
    found, saved = moments(view), None
    if norm.mean is None:
        norm = norm.with_statistics(*batch_statistics(found))
        stats = norm.mean, norm.var
    else:
        stats = saved = view.new(view.c), view.new(view.c)
    squeezed, pooled = squeeze(view, found, norm)
    hidden, logits = weights.forward(view, pooled)
    passes.apply(view, y, mask, norm, Gate(logits, gate), residual=residual, act=act, saved=saved)
    return y, *stats, squeezed, hidden, logits, mask


def bn_se_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, w1: Tensor, w2: Tensor,
    residual: Tensor | None, mean: Tensor, var: Tensor, squeezed: Tensor, hidden: Tensor,
    logits: Tensor, mask: Tensor, batch_stats: bool, eps: float, se_act: str, gate: str,
    act: str, need_dresidual: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    view = View("bn_se_act_backward", x, images=True)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    weights = Weights.of(view, w1, None, w2, None, se_act)
    given = Incoming.of(view, dy, residual, mask, act)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dweight, dbias = view.new(view.c), view.new(view.c)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_(), *weights.no_gradients(view), dresidual
    gate = Gate(logits, gate)
    dlogits, pooled, sum_u, sum_ux = gate_backward_sums(view, given, norm, gate, squeezed)
    dpooled, gradients = weights.backward(view, dlogits, pooled, hidden)
    block_c = min(MERGE_CHANNELS, power_of_2(view.c))
    launch(
        bn_se_act_bwd_merge_kernel, cdiv(view.c, block_c), sum_u, sum_ux, logits, dpooled,
        squeezed, norm.mean, norm.var, dweight, dbias, view.n, view.c, eps, device=x.device,
        warps=4, GATE=gate.kind, BLOCK_N=MERGE_PARTS, BLOCK_C=block_c,
    )  # fmt: skip
    through = (dweight, dbias) if batch_stats else None
    passes.backward_apply(view, given, norm, dx, dresidual, gate, through=through, dpooled=dpooled)
    return dx, dweight, dbias, *gradients, dresidual
