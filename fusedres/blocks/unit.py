"""One conv-norm-act of a residual branch, as the fused ops see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import dispatch, reference
from ..layout import dense
from ..ops import bn_act
from ..ops.convolution import Geometry, conv_shape
from ..ops.define import transformed
from ..running_stats import recomputing, update_running_stats, update_together
from .recognise import Norm, act_of, geometry_of, norm_of


@dataclass(frozen=True)
class Unit:
    """A convolution, its norm and an activation; ``then`` is an activation the ops do not have."""

    conv: nn.Conv2d
    geometry: Geometry
    norm: Norm
    act: str
    then: nn.Module | None


@dataclass(frozen=True)
class Pending:
    """A raw convolution result whose batch norm and activation its next reader applies."""

    raw: Tensor  # [N, C, H, W]
    norm: Norm
    act: str
    mean: Tensor  # [C]
    var: Tensor  # [C]

    @property
    def prologue(self) -> tuple:
        n = self.norm
        return n.weight, n.bias, self.mean, self.var, n.batch_stats, n.eps, self.act


State = Tensor | Pending


def unit_of(state: State, conv: nn.Module, norm: nn.Module, act) -> Unit | str:
    """The unit that takes ``state`` through these modules, or why they must run as they are."""
    unit, x = unit_of_modules(conv, norm, act), value(state)
    if isinstance(unit, str):
        return unit
    if (reason := misfit(unit.conv, x, unit.norm)) is not None:
        return reason
    if min(conv_shape(x.shape, unit.conv.weight, unit.geometry)[2:]) < 1:
        return "the kernel is larger than the image"
    return unit


def unit_of_modules(conv: nn.Module, norm: nn.Module, act) -> Unit | str:
    """The unit that these modules are, or why they must run as they are."""
    geometry = geometry_of(conv)
    if isinstance(geometry, str):
        return geometry
    found = norm_of(norm)
    if isinstance(found, str):
        return found
    name = act_of(act)
    return Unit(conv, geometry, found, name or "identity", None if name is not None else act)


def misfit(conv: nn.Conv2d, x: Tensor, norm: Norm | None = None) -> str | None:
    """A reason when PyTorch's own modules must see these operands (and may raise on them)."""
    if not isinstance(x, Tensor):
        return f"the input is a {type(x).__name__}"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, not 4"
    if x.dtype not in dispatch.DTYPES:
        return f"the input is {x.dtype}"
    return operand_misfit(conv, norm, x.shape[1], x.dtype, x.device)


def operand_misfit(
    conv: nn.Conv2d, norm: Norm | None, channels: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """``misfit`` of an input [N, channels, H, W] that may not exist yet."""
    weight = conv.weight
    if channels != weight.shape[1] * conv.groups or device != weight.device:
        return "the input does not fit the convolution"
    casts = autocasts(weight) and dtype != torch.float64
    if dtype != weight.dtype and not casts:
        return f"the input is {dtype}, the convolution's weight {weight.dtype}"
    bias = conv.bias
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        return "the bias does not fit the convolution"
    return None if norm is None else _norm_misfit(norm, weight.shape[:1], dtype, casts)


def _norm_misfit(norm: Norm, shape: torch.Size, dtype: torch.dtype, casts: bool) -> str | None:
    given = norm.weight, norm.bias, norm.running_mean, norm.running_var
    params = [p for p in given if p is not None]
    if any(p.shape != shape for p in params):
        return "the norm does not fit the convolution"
    found = {p.dtype for p in params}
    mixed = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    if not casts and found and found not in ({dtype}, {mixed}):
        return f"the norm is not {dtype} like the convolution"
    return None


def autocasts(*tensors: Tensor) -> bool:
    """Whether autocast converts these operands of a convolution."""
    return dispatch.autocasts(tensors[0]) and all(t.dtype != torch.float64 for t in tensors)


def in_autocast(t: Tensor | None) -> Tensor | None:
    """``t`` in the dtype that autocast computes products in."""
    return None if t is None else t.to(torch.get_autocast_dtype(t.device.type))


def operands(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in the dtype that autocast would convolve in."""
    if not autocasts(x, conv.weight):
        return x, conv.weight, conv.bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)


def value(state: State) -> Tensor:
    """The tensor in a state, normalised or not."""
    return state.raw if isinstance(state, Pending) else state


def materialise(state: State | None) -> Tensor | None:
    """The tensor that a state stands for."""
    if not isinstance(state, Pending):
        return state
    weight, bias, *bn = state.prologue
    return bn_act.op(dense(state.raw), weight, bias, None, *bn, False)[0]


def activate(x: Tensor, act: nn.Module | str | None) -> Tensor:
    if act is None:
        return x
    return act(x) if isinstance(act, nn.Module) else reference.ACTIVATIONS[act](x)


Batch = tuple[Norm, Tensor, Tensor, torch.Size]  # norm, mean, variance, shape


def track_all(batches: list[Batch]) -> None:
    """Count batches in the running statistics of their norms, as nn.BatchNorm2d does in training.

    Norms of one momentum are updated together: the calls cost more than the arithmetic.
    """
    counted = [batch for batch in batches if _tracks(batch[0])]
    if torch.compiler.is_compiling() or transformed() or not _alike(counted):
        for batch in counted:
            track(*batch)
        return
    norms, means, variances, shapes = zip(*counted, strict=True)
    torch._foreach_add_([n.module.num_batches_tracked for n in norms], 1)
    running = [(n.running_mean, n.running_var) for n in norms]
    pairs = list(zip(means, variances, strict=True))
    update_together(running, pairs, shapes, norms[0].module.momentum)


def _alike(batches: list[Batch]) -> bool:
    """Whether one call may update the statistics of all: it wants lists, and none of them twice."""
    modules = [norm.module for norm, *_ in batches]
    buffers = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in modules]
    known = all(b is not None for three in buffers for b in three)
    # In 16 bits PyTorch's calls for lists round the factors first, those for one tensor do not.
    exact = known and all(
        mean.dtype == m.running_mean.dtype == m.running_var.dtype
        for m, (_, mean, _, _) in zip(modules, batches, strict=True)
    )
    distinct = len({id(m.running_mean) for m in modules}) == len(modules) > 1
    momenta = {m.momentum for m in modules}
    same = len(momenta) == 1 and None not in momenta
    return exact and distinct and same and all(shape.numel() > 0 for *_, shape in batches)


def track(norm: Norm, mean: Tensor, var: Tensor, shape: torch.Size) -> None:
    """Count a batch in a norm's running statistics."""
    module = norm.module
    if not _tracks(norm):
        return
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # cumulative average
            momentum = 1.0 / module.num_batches_tracked.to(torch.float32)
    update_running_stats(norm.running_mean, norm.running_var, mean, var, shape, momentum)


def _tracks(norm: Norm) -> bool:
    module = norm.module
    tracks = module.training and getattr(module, "track_running_stats", False)
    return norm.batch_stats and tracks and not recomputing()
