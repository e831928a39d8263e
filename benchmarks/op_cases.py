"""The ops as cases: inputs, our call, PyTorch's own modules' call, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fusedres import functional, reference

from . import cuda_peers, plain
from .cases import CHANNELS_LAST, CPU, SHORT, Case, activation, redraw
from .floors import ops_floor
from .measure import Truth
from .peers import (
    ALL,
    APEX,
    AUTOTUNE_MODE,
    COMPILE,
    EAGER,
    EAGER_NCHW,
    MAX_AUTOTUNE,
    OURS,
    Choice,
    Maker,
    compiled_op,
    make,
    op_call,
    parameters,
)

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]
REDUCTION = 16  # SE's, as in SE-ResNet
EPS = 1e-5


@dataclass(frozen=True)
class Op:
    """One op in three executions that take the same named tensors.

    Args:
        tensors: makes the inputs for a shape [N, C, H, W], a dtype and a layout.
        fused, eager: ours and plain PyTorch's.
        reference: the meaning, for the float64 result and PyTorch's own error.
        peers: further makers, given (tensors, dy, direction, dtype); on a GPU only.
        trains: it has a backward.
    """

    name: str
    tensors: Callable[[Shape, torch.dtype, str], Tensors]
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    peers: dict[str, Callable] = field(default_factory=dict)
    trains: bool = True


def case(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    direction: str = "both",
    layout: str = CHANNELS_LAST,
    device: torch.device = CPU,
    chosen: Choice = ALL,
) -> Case:
    """``op`` on one shape, against PyTorch.

    Args:
        direction: "forward", "backward" or "both"; an op that does not train runs in inference.
    """
    torch.manual_seed(0)
    tensors = _on(device, op.tensors(shape, dtype, layout))
    direction = direction if op.trains else "inference"
    dy = None
    if op.trains:
        dy = activation(_result_shape(op, tensors), dtype, layout).to(device)
    run = partial(op_call, tensors=tensors, dy=dy, direction=direction, dtype=dtype)
    ours = run(OURS, op.fused)
    compiled = dict(function=op.eager, tensors=tensors, dy=dy, direction=direction, dtype=dtype)
    makers: dict[str, Maker] = {
        EAGER if layout == CHANNELS_LAST else EAGER_NCHW: partial(
            run, EAGER if layout == CHANNELS_LAST else EAGER_NCHW, op.eager
        ),
        COMPILE: partial(compiled_op, COMPILE, None, **compiled),
        MAX_AUTOTUNE: partial(compiled_op, MAX_AUTOTUNE, AUTOTUNE_MODE, **compiled),
    }
    if device.type == "cuda":
        makers |= {n: partial(m, tensors, dy, direction, dtype) for n, m in op.peers.items()}
    peers, missing = make(makers, chosen)
    drawn = [t for t in (*tensors.values(), dy) if t is not None and t.dim() == 4]
    drawn = [t for t in drawn if t.shape[0] == shape[0] and t.shape[2:].numel() > 1]
    size = "x".join(map(str, shape))
    return Case(
        title=f"{op.name} {direction} {size} {SHORT[dtype]} {layout}",
        device=device,
        dtype=dtype,
        competitors=[ours, *peers],
        missing=missing,
        truth=_truth(op, tensors, dy, dtype),
        facts={"op": op.name, "direction": direction, "shape": size, "dtype": SHORT[dtype]},
        floor=partial(ops_floor, ours),
        floor_of="the ops' bytes at copy bandwidth or flops at matmul rate, whichever takes longer",
        refresh=partial(redraw, drawn),
        graphable=direction != "backward",
    )


def _on(device: torch.device, tensors: Tensors) -> Tensors:
    return {k: t.detach().to(device).requires_grad_(t.requires_grad) for k, t in tensors.items()}


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
    run = partial(op_call, function=op.reference, direction="both")
    exact_dy = None if dy is None else dy.double()
    ref = run("ref", tensors=exact, dy=exact_dy, dtype=torch.float32).results()
    own = run("own", tensors=tensors, dy=dy, dtype=dtype).results()
    layer = {id(t) for t in parameters(tensors)}
    sums = {}
    if dy is not None:
        elements = dy.numel() // dy.shape[1]
        sums = {f"d{k}": elements for k, t in tensors.items() if id(t) in layer}
    return Truth(ref, own, frozenset(k for k in ref if k != "y"), sums)


# --- inputs


def _leaf(*spec) -> Tensor:
    return activation(*spec).requires_grad_()


def _bn(shape: Shape, dtype: torch.dtype, layout: str) -> Tensors:
    c = shape[1]
    return {
        "x": _leaf(shape, dtype, layout),
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


def _bn_residual(*spec) -> Tensors:
    return _bn(*spec) | {"residual": _leaf(*spec)}


def _se_residual(shape: Shape, *spec) -> Tensors:
    x, residual = _leaf(shape, *spec), _leaf(shape, *spec)
    return {"x": x} | _se(shape[1]) | {"residual": residual}


def _bn_se_residual(shape: Shape, *spec) -> Tensors:
    return _bn(shape, *spec) | _se(shape[1]) | {"residual": _leaf(shape, *spec)}


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


def _mix_inputs(shape, dtype, layout):
    keep = (torch.rand(shape[0]) < 0.9).float() / 0.9
    operands = {k: _leaf(shape, dtype, layout) for k in ("branch", "shortcut")}
    return operands | {"row_scale": keep.to(dtype)}


def _highway_inputs(*spec):
    return {k: _leaf(*spec) for k in ("branch", "shortcut", "gate")}


def _fused_depth(branch, shortcut, row_scale):
    return functional.residual_mix(branch, shortcut, row_scale=row_scale, act="relu")


def _reference_depth(branch, shortcut, row_scale):
    return reference.residual_mix(branch, shortcut, None, row_scale, 1.0, 1.0, "relu")[0]


def _fused_highway(branch, shortcut, gate):
    return functional.residual_mix(branch, shortcut, gate=gate)


def _reference_highway(branch, shortcut, gate):
    return reference.residual_mix(branch, shortcut, gate, None, 1.0, 1.0, "identity")[0]


_APEX = {APEX: cuda_peers.apex_batch_norm}
OPS = {
    op.name: op
    for op in (
        Op("bn_act", _bn, _fused_bn, plain.bn_act, _reference_bn, _APEX),
        Op("bn_act+residual", _bn_residual, _fused_bn, plain.bn_act, _reference_bn, _APEX),
        Op(
            "squeeze_excite+residual",
            _se_residual, _fused_se, plain.squeeze_excite, _reference_se,
        ),
        Op(
            "bn_se_act+residual",
            _bn_se_residual, _fused_bn_se, plain.bn_se_act, _reference_bn_se,
        ),
        Op("stochastic_depth", _mix_inputs, _fused_depth, plain.stochastic_depth, _reference_depth),
        Op("highway", _highway_inputs, _fused_highway, plain.highway, _reference_highway),
    )
}  # fmt: skip
