"""The ops as cases: inputs, our call, PyTorch's own modules' call, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fusedres import functional, reference

from . import plain
from .cases import Case, Memory, channels_last
from .floors import traffic
from .measure import Competitor, Truth
from .memory import allocations, saved_for_backward
from .peers import (
    COMPILE,
    EAGER,
    OURS,
    UNSELECTED,
    Missing,
    autocast,
    compiled_op,
    op_call,
    split,
)

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]
REDUCTION = 16  # SE's, as in SE-ResNet
EPS = 1e-5


@dataclass(frozen=True)
class Op:
    """One op in three executions that take the same named tensors.

    Args:
        tensors: makes the inputs for a shape [N, C, H, W] and a dtype.
        fused, eager: ours and plain PyTorch's.
        reference: the meaning, for the float64 result and PyTorch's own error.
        streaming: there is no convolution in it.
        trains: it has a backward.
    """

    name: str
    tensors: Callable[[Shape, torch.dtype], Tensors]
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    streaming: bool = True
    trains: bool = True


def case(
    op: Op, shape: Shape, dtype: torch.dtype, direction: str = "both", *, compiled: bool = True
) -> Case:
    """``op`` on one shape, against eager and torch.compile.

    Args:
        direction: "forward", "backward" or "both"; an op that does not train runs in inference.
        compiled: whether torch.compile takes part (its compilation takes seconds).
    """
    torch.manual_seed(0)
    tensors = op.tensors(shape, dtype)
    direction = direction if op.trains else "inference"
    dy = channels_last(_result_shape(op, tensors), dtype) if op.trains else None
    call = partial(op_call, tensors=tensors, dy=dy, direction=direction, dtype=dtype)
    ours, eager = call(OURS, op.fused), call(EAGER, op.eager)
    compile_peer = Missing(COMPILE, UNSELECTED)
    if compiled:
        compile_peer = compiled_op(op.eager, tensors, dy, direction, dtype)
    peers, missing = split([eager, compile_peer])
    size = "x".join(map(str, shape))
    return Case(
        title=f"{op.name} {direction} {size} {_short(dtype)}",
        competitors=[ours, *peers],
        missing=missing,
        truth=_truth(op, tensors, dy, dtype),
        traffic=traffic(ours),
        streaming=op.streaming,
        memory=partial(_memory, op, ours, eager, tensors, dtype),
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _result_shape(op: Op, tensors: Tensors) -> Shape:
    shapes_only = {k: t.to("meta") for k, t in _without_running(tensors, op).items()}
    return tuple(op.reference(**shapes_only).shape)


def _without_running(tensors: Tensors, op: Op) -> Tensors:
    """The reference of a training op takes no running statistics: they do not enter its result."""
    if not op.trains:
        return tensors
    return {k: t for k, t in tensors.items() if not k.startswith("running_")}


def _truth(op: Op, tensors: Tensors, dy: Tensor | None, dtype: torch.dtype) -> Truth:
    tensors = _without_running(tensors, op)
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    run = partial(op_call, direction="both", dtype=torch.float32)
    ref = run("ref", op.reference, exact, dy=None if dy is None else dy.double()).results()
    own = run("own", op.reference, tensors, dy=dy).results()
    sums = {f"d{k}": dy.numel() // dy.shape[1] for k in tensors if dy is not None and _summed(k)}
    return Truth(ref, own, frozenset(k for k in ref if k != "y"), sums)


def _summed(name: str) -> bool:
    return name in ("weight", "bias", "conv_weight", "w1", "b1", "w2", "b2")


def _memory(
    op: Op, ours: Competitor, eager: Competitor, tensors: Tensors, dtype: torch.dtype
) -> dict[str, Memory]:
    found = {}
    for competitor, function in ((ours, op.fused), (eager, op.eager)):
        competitor.prepare()
        peak = allocations(competitor.call).peak
        saved = None
        if op.trains:

            def forward(function=function):
                with autocast(dtype):
                    return function(**{k: _clone_running(k, t) for k, t in tensors.items()})

            saved = saved_for_backward(forward, _parameters(tensors))
        found[competitor.name] = Memory(peak, saved)
    return found


def _clone_running(name: str, t: Tensor) -> Tensor:
    return t.clone() if name.startswith("running_") else t


def _parameters(tensors: Tensors) -> list[Tensor]:
    return [t for k, t in tensors.items() if _summed(k)]


# --- inputs


def _activation(shape: Shape, dtype: torch.dtype) -> Tensor:
    return channels_last(shape, dtype).requires_grad_()


def _bn(shape: Shape, dtype: torch.dtype) -> Tensors:
    c = shape[1]
    return {
        "x": _activation(shape, dtype),
        "weight": (1 + 0.1 * torch.randn(c)).requires_grad_(),
        "bias": (0.1 * torch.randn(c)).requires_grad_(),
        "running_mean": torch.zeros(c),
        "running_var": torch.ones(c),
    }


def _se(channels: int) -> Tensors:
    r = max(1, channels // REDUCTION)
    return {
        "w1": (torch.randn(r, channels, 1, 1) / channels**0.5).requires_grad_(),
        "b1": (0.1 * torch.randn(r)).requires_grad_(),
        "w2": (torch.randn(channels, r, 1, 1) / r**0.5).requires_grad_(),
        "b2": (0.1 * torch.randn(channels)).requires_grad_(),
    }


def _with_residual(tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
    return tensors | {"residual": _activation(shape, dtype)}


# --- the ops


def _fused_bn(x, weight, bias, running_mean, running_var, residual=None):
    return functional.batch_norm_act(
        x, running_mean, running_var, weight, bias, training=True, residual=residual
    )


def _reference_bn(x, weight, bias, residual=None):
    return reference.bn_act(x, weight, bias, residual, None, None, True, EPS, "relu")[0]


def _fused_se(x, w1, b1, w2, b2, residual):
    return functional.squeeze_excite(x, w1, b1, w2, b2, residual=residual, post_act="relu")


def _reference_se(x, w1, b1, w2, b2, residual):
    mlp = w1.flatten(1), b1, w2.flatten(1), b2
    return reference.squeeze_excite(x, *mlp, residual, "relu", "sigmoid", "relu")[0]


def _fused_bn_se(x, weight, bias, running_mean, running_var, w1, b1, w2, b2, residual):
    return functional.batch_norm_se_act(
        x, running_mean, running_var, weight, bias, w1, b1, w2, b2, training=True,
        residual=residual,
    )  # fmt: skip


def _reference_bn_se(x, weight, bias, w1, b1, w2, b2, residual):
    mlp = w1.flatten(1), b1, w2.flatten(1), b2
    tail = residual, None, None, True, EPS, "relu", "sigmoid", "relu"
    return reference.bn_se_act(x, weight, bias, *mlp, *tail)[0]


def _mix_inputs(shape, dtype):
    keep = (torch.rand(shape[0]) < 0.9).float() / 0.9
    operands = {k: _activation(shape, dtype) for k in ("branch", "shortcut")}
    return operands | {"row_scale": keep.to(dtype)}


def _highway_inputs(shape, dtype):
    gate = torch.sigmoid(channels_last(shape, dtype)).requires_grad_()
    return {k: _activation(shape, dtype) for k in ("branch", "shortcut")} | {"gate": gate}


OPS = {
    op.name: op
    for op in (
        Op("bn_act", _bn, _fused_bn, plain.bn_act, _reference_bn),
        Op(
            "bn_act + residual",
            lambda s, d: _with_residual(_bn(s, d), s, d),
            _fused_bn, plain.bn_act, _reference_bn,
        ),
        Op(
            "squeeze_excite + residual",
            lambda s, d: {"x": _activation(s, d)} | _se(s[1]) | _with_residual({}, s, d),
            _fused_se, plain.squeeze_excite, _reference_se,
        ),
        Op(
            "bn_se_act + residual",
            lambda s, d: _with_residual(_bn(s, d) | _se(s[1]), s, d),
            _fused_bn_se, plain.bn_se_act, _reference_bn_se,
        ),
        Op(
            "residual_mix, stochastic depth",
            _mix_inputs,
            lambda branch, shortcut, row_scale: functional.residual_mix(
                branch, shortcut, row_scale=row_scale, act="relu"
            ),
            plain.stochastic_depth,
            lambda branch, shortcut, row_scale: reference.residual_mix(
                branch, shortcut, None, row_scale, 1.0, 1.0, "relu"
            )[0],
        ),
        Op(
            "residual_mix, highway",
            _highway_inputs,
            lambda branch, shortcut, gate: functional.residual_mix(branch, shortcut, gate=gate),
            plain.highway,
            lambda branch, shortcut, gate: reference.residual_mix(
                branch, shortcut, gate, None, 1.0, 1.0, "identity"
            )[0],
        ),
    )
}  # fmt: skip
