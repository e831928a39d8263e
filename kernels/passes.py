"""Launches the streaming passes of ``stream.py``: their operands, checks and configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import tuning
from .launch import Config, View, cdiv, launch, vector
from .stream import (
    APPLY_CONFIGS,
    REDUCE_CONFIGS,
    stream_bwd_apply_kernel,
    stream_bwd_reduce_kernel,
    stream_fwd_apply_kernel,
)


@dataclass(frozen=True)
class Norm:
    """A batch norm: [C] each, of any floating dtype; all None where there is none."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    batch_stats: bool = False
    eps: float = 0.0

    @staticmethod
    def of(view: View, weight, bias, mean, var, batch_stats: bool, eps: float) -> Norm:
        """Check the arguments of a batch norm op."""
        if (mean is None) != (var is None) or (mean is None and not batch_stats):
            raise ValueError(f"{view.op}: mean, var: wanted both, or neither with batch_stats")
        named = {"weight": weight, "bias": bias, "mean": mean, "var": var}
        tensors = (vector(view.op, name, t, view.c) for name, t in named.items())
        return Norm(*tensors, batch_stats, eps)

    def with_statistics(self, mean: Tensor, var: Tensor) -> Norm:
        return replace(self, mean=mean, var=var)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.var, self.weight, self.bias


@dataclass(frozen=True)
class Gate:
    """A squeeze-excite gate: its logits [N, C] fp32; None where there is none."""

    logits: Tensor | None = None
    kind: str = "sigmoid"


@dataclass(frozen=True)
class Incoming:
    """The gradient that comes in, and what the activation's derivative is found from."""

    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    act: str

    @staticmethod
    def of(view: View, dy: Tensor, residual: Tensor | None, mask: Tensor, act: str) -> Incoming:
        view.operand("dy", dy)
        view.operand("residual", residual)
        return Incoming(dy, residual, view.mask("mask", mask), act)


NO_NORM, NO_GATE = Norm(), Gate()


def no_statistics(view: View) -> tuple[Tensor, Tensor]:
    """Mean and variance of no values."""
    nan = torch.full((view.c,), float("nan"), dtype=torch.float32, device=view.x.device)
    return nan, nan.clone()


def apply(
    view: View, y: Tensor, mask: Tensor, norm: Norm, gate: Gate = NO_GATE, *,
    residual: Tensor | None, act: str, saved: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write y, and the bit mask if it is not empty; copy mean and var to ``saved``."""

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            stream_fwd_apply_kernel, view.programs(flags, flags["BLOCK_HW"]), view.x, residual, y,
            mask if mask.numel() else None, *norm.pointers, gate.logits, *(saved or (None, None)),
            view.c, view.hw, norm.eps, device=y.device, warps=config.warps, ACT=act,
            GATE=gate.kind, **flags,
        )  # fmt: skip

    key = view.key("fwd_apply", act, residual is not None, mask.numel() > 0)
    tuning.run(key, APPLY_CONFIGS, work, y.device)


def reduce(
    view: View, given: Incoming, norm: Norm, gate: Gate = NO_GATE
) -> tuple[Tensor, Tensor, int]:
    """Partial sums of u and u * (x - mean), [n * chunks, C] fp32, and how many chunks there are."""

    def work(config: Config) -> tuple[Tensor, Tensor, int]:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        chunks = cdiv(view.hw, chunk)
        sums = view.new(view.n * chunks, view.c), view.new(view.n * chunks, view.c)
        launch(
            stream_bwd_reduce_kernel, view.programs(flags, chunk), given.dy, view.x,
            given.residual, given.mask, *norm.pointers, gate.logits, *sums, view.c, view.hw,
            chunk // flags["BLOCK_HW"], norm.eps, device=view.x.device, warps=config.warps,
            ACT=given.act, GATE=gate.kind, **flags,
        )  # fmt: skip
        return *sums, chunks

    key = view.key("bwd_reduce", given.act, given.residual is not None, given.mask is not None)
    return tuning.run(key, REDUCE_CONFIGS, work, view.x.device)


def backward_apply(
    view: View, given: Incoming, norm: Norm, dx: Tensor, dresidual: Tensor, gate: Gate = NO_GATE,
    *, through: tuple[Tensor, Tensor] | None = None, dpooled: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dx, and dresidual if it is not empty.

    Args:
        through: dweight and dbias [C] fp32, where the statistics are the batch's.
        dpooled: [N, C] fp32, the gradient of the squeeze.
    """
    needs_x = through is not None or (given.mask is None and given.act != "identity")

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            stream_bwd_apply_kernel, view.programs(flags, flags["BLOCK_HW"]), given.dy,
            view.x if needs_x else None, given.residual, given.mask, *norm.pointers, gate.logits,
            *(through or (None, None)), dpooled, dx, dresidual if dresidual.numel() else None,
            view.c, view.hw, float(view.pixels), float(view.count), norm.eps, device=dx.device,
            warps=config.warps, ACT=given.act, GATE=gate.kind, **flags,
        )  # fmt: skip

    key = view.key("bwd_apply", given.act, given.residual is not None, given.mask is not None)
    tuning.run(key, APPLY_CONFIGS, work, dx.device)
