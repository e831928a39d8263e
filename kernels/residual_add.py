"""``residual_add`` and its backward on Triton: two maps, a sum and an activation in one pass.

Forward: one launch (three with the sum's statistics). Backward: one launch where no gradient is a
sum over a channel, else three: partial sums, their merge, apply; one more for the scale's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning
from .launch import Config, View, cdiv, launch, power_of_2, vector
from .residual_sum import (
    residual_add_bwd_apply_kernel,
    residual_add_bwd_merge_kernel,
    residual_add_bwd_reduce_kernel,
    residual_add_bwd_scale_kernel,
    residual_add_fwd_kernel,
)
from .stats import MERGE_CHANNELS, MERGE_PARTS, batch_statistics, moments
from .stream import APPLY_CONFIGS

# The first is the default. None was measured on a GPU yet. Larger tiles of four tensors spill.
REDUCE_CONFIGS = Config(4096, 64, 4), Config(2048, 64, 4)
BACKWARD_CONFIGS = Config(2048, 64, 4), Config(4096, 64, 8)


@dataclass(frozen=True)
class _Maps:
    """The maps of branch and shortcut and the branch's scale, checked."""

    branch: tuple[Tensor | None, ...]  # mean, var, weight, bias [C]
    side: tuple[Tensor | None, ...]
    scale: Tensor | None  # [N, C] fp32
    eps: tuple[float, float]
    act: str

    @staticmethod
    def of(view: View, maps, scale: Tensor | None, eps: tuple[float, float], act: str) -> _Maps:
        """
        Args:
            maps: weight, bias, mean, var of the branch, then of the shortcut.
        """
        names = "weight", "bias", "mean", "var"
        names = (*names, *(f"shortcut_{name}" for name in names))
        w, b, m, v, *side = (
            vector(view.op, name, t, view.c) for name, t in zip(names, maps, strict=True)
        )
        if scale is not None:
            if scale.shape not in ((view.images, 1), (view.images, view.c)):
                raise ValueError(
                    f"{view.op}: scale: wanted shape ({view.images}, 1) or"
                    f" ({view.images}, {view.c}), got {tuple(scale.shape)}"
                )
            scale = scale.to(torch.float32).expand(view.images, view.c).contiguous()
        return _Maps((m, v, w, b), (*side[2:], *side[:2]), scale, eps, act)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return *self.branch, *self.side, self.scale


def residual_add(
    x: Tensor, weight, bias, mean, var, shortcut: Tensor | None, shortcut_weight, shortcut_bias,
    shortcut_mean, shortcut_var, scale: Tensor | None, batch_stats: bool,
    shortcut_batch_stats: bool, eps: float, shortcut_eps: float, act: str, save_mask: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("residual_add", x, images=scale is not None)
    view.operand("shortcut", shortcut)
    side = shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var
    maps = _Maps.of(view, (weight, bias, mean, var, *side), scale, (eps, shortcut_eps), act)
    y, mask = torch.empty_like(x), view.new_mask(save_mask)
    if not x.numel():
        nothing = (view.new(view.c if stats else 0).fill_(float("nan")) for _ in "mv")
        return y, mask, *nothing

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            residual_add_fwd_kernel, view.programs(flags, flags["BLOCK_HW"]), x, shortcut, y,
            mask if save_mask else None, *maps.pointers, view.c, view.hw, *maps.eps,
            device=x.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    key = view.key("residual_add_fwd", act, shortcut is not None, save_mask)
    tuning.run(key, APPLY_CONFIGS, work, x.device)
    if not stats:
        return y, mask, view.new(0), view.new(0)
    return y, mask, *batch_statistics(moments(View("residual_add", y, images=False)))


def residual_add_backward(
    dy: Tensor, x: Tensor | None, weight, bias, mean, var, shortcut: Tensor | None,
    shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, scale: Tensor | None,
    mask: Tensor, batch_stats: bool, shortcut_batch_stats: bool, eps: float, shortcut_eps: float,
    act: str, need_sums: bool, need_shortcut_sums: bool, need_dshortcut: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    view = View("residual_add_backward", dy, images=scale is not None)
    view.operand("x", x)
    view.operand("shortcut", shortcut)
    side = shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var
    maps = _Maps.of(view, (weight, bias, mean, var, *side), scale, (eps, shortcut_eps), act)
    operands = dy, x, shortcut, view.mask("mask", mask)
    dx = torch.empty_like(dy)
    dshortcut = torch.empty_like(dy) if need_dshortcut else dy.new_empty(0)
    with_scale = scale is not None and need_sums
    dscale = view.new(view.images if with_scale else 0, view.c)
    sums = [view.new(view.c) for _ in range(4)]  # dweight, dbias, and the shortcut's
    if not dy.numel():
        dweight, dbias, *side = (t.zero_() for t in sums)
        return dx, dweight, dbias, dshortcut, *side, dscale.zero_()
    if need_sums or need_shortcut_sums:
        _sums(view, operands, maps, sums, dscale)
    else:
        sums = [t.zero_() for t in sums]
    recompute = operands[3] is None and act != "identity"  # z is found again, from both operands
    x = x if recompute or batch_stats else None
    shortcut = shortcut if recompute or shortcut_batch_stats else None
    operands = dy, x, shortcut, operands[3]
    through = (*(sums[:2] if batch_stats else (None, None)),)
    through += (*(sums[2:] if shortcut_batch_stats else (None, None)),)

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            residual_add_bwd_apply_kernel, view.programs(flags, flags["BLOCK_HW"]), *operands,
            *maps.pointers, *through, dx, dshortcut if need_dshortcut else None, view.c, view.hw,
            float(view.count), *maps.eps, device=dy.device, warps=config.warps, ACT=act, **flags,
        )  # fmt: skip

    tuning.run(_key(view, "apply", operands, act), BACKWARD_CONFIGS, work, dy.device)
    return dx, *sums[:2], dshortcut, *sums[2:], dscale


def _key(view: View, phase: str, operands: tuple, act: str) -> str:
    present = (t is not None for t in operands)
    return view.key(f"residual_add_bwd_{phase}", act, *present)


def _sums(view: View, operands: tuple, maps: _Maps, sums: list[Tensor], dscale: Tensor) -> None:
    """Write the gradients that are sums over pixels; dscale if it is not empty."""

    def work(config: Config) -> tuple[list[Tensor], int]:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        chunks = cdiv(view.hw, chunk)
        parts = [view.new(view.n * chunks, view.c) for _ in range(3)]
        launch(
            residual_add_bwd_reduce_kernel, view.programs(flags, chunk), *operands, *maps.pointers,
            *parts, view.c, view.hw, chunk // flags["BLOCK_HW"], *maps.eps,
            device=dscale.device, warps=config.warps, ACT=maps.act, **flags,
        )  # fmt: skip
        return parts, chunks

    key = _key(view, "reduce", operands, maps.act)
    parts, chunks = tuning.run(key, REDUCE_CONFIGS, work, dscale.device)
    block_c = min(MERGE_CHANNELS, power_of_2(view.c))
    blocks = cdiv(view.c, block_c)
    launch(
        residual_add_bwd_merge_kernel, blocks, *parts, maps.scale, maps.branch[1], maps.side[1],
        *sums, view.n * chunks, chunks, view.c, *maps.eps, device=dscale.device, warps=4,
        BLOCK_P=MERGE_PARTS, BLOCK_C=block_c,
    )  # fmt: skip
    if dscale.numel():
        launch(
            residual_add_bwd_scale_kernel, view.n * blocks, *parts[:2], *maps.branch, dscale,
            chunks, view.c, maps.eps[0], device=dscale.device, warps=4, BLOCK_C=block_c,
        )  # fmt: skip
