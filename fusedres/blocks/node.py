"""A chain as one autograd node (``ops/residual_block.py``): when that is possible, its operands.

Every module must be known and every shape fit, and ``dispatch`` must find a kernel for every step
op. Anything else runs step by step, which is also what raises where PyTorch does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import dispatch
from ..ops.bn_act import saves_mask
from ..ops.conv_tail import worth_recomputing
from ..ops.convolution import conv_shape
from ..ops.define import transformed
from ..ops.residual_block import residual_block
from ..ops.residual_block_forward import Block, Link
from .recognise import SE, se_of, wants_grad
from .residual_scale import scaled_norm
from .unit import Batch, Unit, activate, autocasts, operand_misfit, unit_of, unit_of_modules

Triples = tuple[tuple[nn.Module, nn.Module, "nn.Module | str | None"], ...]


@dataclass(frozen=True)
class Branch:
    """A chain's triples whose modules and shapes are all known.

    Args:
        dtype: that autocast convolves in, None without autocast.
        shapes: of the convolutions' results.
    """

    x: Tensor
    dtype: torch.dtype | None
    units: tuple[Unit, ...]
    shapes: tuple[torch.Size, ...]
    mlp: SE | None


def branch_of(x: Tensor, triples: Triples, se: nn.Module | None) -> Branch | None:
    """The branch, where all of it wants a backward; None where it must run step by step."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return None
    if torch.jit.is_tracing():
        return None
    if type(x) not in (Tensor, nn.Parameter):
        return None
    unit = unit_of(x, *triples[0])
    mlp = None if se is None else se_of(se)
    # Where the front of a branch is frozen, the step ops keep less: none of it is in their graph.
    if isinstance(unit, str) or not wants_grad(x, unit.conv.weight):
        return None
    if mlp is not None and (isinstance(mlp, str) or not mlp.has_op):
        return None
    casts = autocasts(x, unit.conv.weight)
    dtype = torch.get_autocast_dtype(x.device.type) if casts else None
    units = [unit]
    for triple in triples[1:]:
        unit, before = unit_of_modules(*triple), units[-1]
        channels = before.conv.weight.shape[0]
        if isinstance(unit, str) or before.then is not None:
            return None
        if operand_misfit(unit.conv, unit.norm, channels, dtype or x.dtype, x.device) is not None:
            return None
        units.append(unit)
    shapes = _shapes(x, units)
    return None if shapes is None else Branch(x, dtype, tuple(units), shapes, mlp)


def _shapes(x: Tensor, units: list[Unit]) -> tuple[torch.Size, ...] | None:
    """Of the convolutions' results; None where one is empty or has too few values for its norm."""
    shapes, before = [], x.shape
    for unit in units:
        before = conv_shape(before, unit.conv.weight, unit.geometry)
        if min(before) < 1 or (unit.norm.batch_stats and before.numel() == before[1]):
            return None
        shapes.append(before)
    return tuple(shapes)


def as_one_node(branch: Branch, residual, scale, gain, batches: list[Batch]) -> Tensor | None:
    """What ``chain`` returns; None where the shortcut or the backend does not allow one node.

    Args:
        residual: a tensor, None, or a Shortcut that has started.
        scale, gain, batches: as in ``chain``.
    """
    units, mlp, out = list(branch.units), branch.mlp, branch.shapes[-1]
    source, projection = (residual, None) if residual is None else _source(residual)
    if scale is not None and (mlp is not None or source is None):
        return None
    x = branch.x if branch.dtype is None else branch.x.to(branch.dtype)
    side = None
    if projection is not None:
        side = _projection(branch, source, projection)
        if side is None:
            return None
    elif source is not None and (source.shape != out or source.device != x.device):
        return None
    joint = side is not None and mlp is None
    if (joint or scale is not None) and not dispatch.has_kernel("residual_add", x, "bn_act"):
        if scale is not None:
            return None
        joint = False
    tail = "residual_add" if joint or scale is not None else "bn_se_act" if mlp else "bn_act"
    ops = tuple({"bn_act", tail})
    if not dispatch.as_one_node(ops, x):
        return None
    if gain is not None:
        units[-1] = replace(
            units[-1], norm=scaled_norm(units[-1].norm, gain, units[-1].conv.out_channels)
        )
    adds_x = source is x
    rows = None if scale is None else scale(x).view(-1, 1)
    act, last = units[-1].act, units[-1]
    mask = saves_mask(act, source)
    repeats = len(units) > 1 and (mask or act == "identity")
    block = Block(
        ops, tuple(_link(unit) for unit in units), side and _link(side), joint, adds_x, act,
        mlp and (mlp.act, mlp.gate), branch.dtype,
        repeats and worth_recomputing(x, last.conv.weight, last.geometry), mask,
    )  # fmt: skip
    shortcut = None if adds_x or source is None else source.to(x.dtype)
    layers = (None,) * 4 if mlp is None else (mlp.w1, mlp.b1, mlp.w2, mlp.b2)
    parts = units if side is None else [*units, side]
    y, stats = residual_block(block, x, shortcut, rows, layers, [_tensors(u) for u in parts])
    shapes = *branch.shapes, *[out] * (side is not None)  # a projection's is what it is added to
    for unit, used, shape in zip(parts, stats, shapes, strict=True):
        batches.append((unit.norm, *used, shape))
    return y if last.then is None else activate(y, last.then)


def _source(residual) -> tuple[Tensor, tuple[nn.Module, nn.Module] | None]:
    """What a shortcut starts from, and the convolution and norm on it."""
    return (residual, None) if isinstance(residual, Tensor) else (residual.x, residual.projection)


def _projection(branch: Branch, source: Tensor, modules: tuple) -> Unit | None:
    """The unit of a projection in the dtype and to the shape of the branch, or None."""
    unit = unit_of(source, *modules, None)
    if isinstance(unit, str):
        return None
    weight, norm = unit.conv.weight, unit.norm
    if autocasts(source, weight) != (branch.dtype is not None):
        return None
    if branch.dtype is None and source.dtype != branch.x.dtype:
        return None
    if not norm.batch_stats and not wants_grad(
        source, weight, unit.conv.bias, norm.weight, norm.bias
    ):
        return None  # one call in inference
    return unit if _shapes(source, [unit]) == branch.shapes[-1:] else None


def _link(unit: Unit) -> Link:
    return Link(unit.geometry, unit.norm.batch_stats, unit.norm.eps, unit.act)


def _tensors(unit: Unit) -> tuple[Tensor | None, ...]:
    conv, norm = unit.conv, unit.norm
    running = (None, None) if norm.batch_stats else (norm.running_mean, norm.running_var)
    return conv.weight, conv.bias, norm.weight, norm.bias, *running
