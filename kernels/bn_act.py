"""``bn_act``, ``bn_stats`` and ``bn_act_backward`` on Triton.

Training: three launches (partial statistics, their merge, apply), running statistics: one.
Backward: three (partial sums, their merge, apply).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .launch import View, cdiv, launch, power_of_2
from .passes import Norm
from .stats import MERGE_CHANNELS, MERGE_PARTS, batch_statistics, moments

# Computes: dbias = sum u, dweight = rstd * sum u * (x - mean)
# Reads:    part_u, part_ux [parts, C] fp32; var [C]
# Writes:   dweight, dbias [C] fp32
# Traffic:  8*parts*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["parts", "C"])
def bn_act_bwd_merge_kernel(
    part_u_ptr, part_ux_ptr, var_ptr, dweight_ptr, dbias_ptr, parts, C, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_u = tl.zeros((BLOCK_C,), tl.float64)
    sum_ux = tl.zeros((BLOCK_C,), tl.float64)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & mask_c[None, :]
        offs = p[:, None].to(tl.int64) * C + offs_c[None, :]
        u = tl.load(part_u_ptr + offs, mask=inside, other=0.0)
        ux = tl.load(part_ux_ptr + offs, mask=inside, other=0.0)
        sum_u += tl.sum(u.to(tl.float64), 0)
        sum_ux += tl.sum(ux.to(tl.float64), 0)
    var = tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64)
    dweight = sum_ux / tl.sqrt(var + eps)
    tl.store(dweight_ptr + offs_c, dweight.to(tl.float32), mask=mask_c)
    tl.store(dbias_ptr + offs_c, sum_u.to(tl.float32), mask=mask_c)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    view = View("bn_stats", x, images=False)
    if not x.numel():
        return passes.no_statistics(view)
    return batch_statistics(view, moments(view))


def bn_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, batch_stats: bool, eps: float, act: str,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("bn_act", x, images=False)
    view.operand("residual", residual)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    y, mask = torch.empty_like(x), view.new_mask(save_mask)
    if not x.numel():
        mean, var = passes.no_statistics(view) if norm.mean is None else (norm.mean, norm.var)
        return y, mean.to(torch.float32, copy=True), var.to(torch.float32, copy=True), mask
    if norm.mean is not None:
        saved = view.new(view.c), view.new(view.c)
        passes.apply(view, y, mask, norm, residual=residual, act=act, saved=saved)
        return y, *saved, mask
    norm = norm.with_statistics(*batch_statistics(view, moments(view)))
    passes.apply(view, y, mask, norm, residual=residual, act=act)
    return y, norm.mean, norm.var, mask


def bn_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, mask: Tensor, batch_stats: bool, eps: float, act: str,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("bn_act_backward", x, images=False)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    given = passes.Incoming.of(view, dy, residual, mask, act)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    if not x.numel():
        zeros = torch.zeros(view.c, dtype=torch.float32, device=x.device)
        return dx, zeros, zeros.clone(), dresidual
    sum_u, sum_ux, _ = passes.reduce(view, given, norm)
    dweight, dbias = view.new(view.c), view.new(view.c)
    block_c = min(MERGE_CHANNELS, power_of_2(view.c))
    launch(
        bn_act_bwd_merge_kernel, cdiv(view.c, block_c), sum_u, sum_ux, norm.var, dweight, dbias,
        sum_u.shape[0], view.c, eps, device=x.device, warps=4, BLOCK_P=MERGE_PARTS,
        BLOCK_C=block_c,
    )  # fmt: skip
    through = (dweight, dbias) if batch_stats else None
    passes.backward_apply(view, given, norm, dx, dresidual, through=through)
    return dx, dweight, dbias, dresidual
