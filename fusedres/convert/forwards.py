"""What the recipes' forwards are written in: a run of modules, and a residual block around one.

A run is flattened and cut into segments (convolution, norm, squeeze-excite, activation) for
``chain``; a module that belongs to no segment runs as itself, between two chains. So whatever a
library puts into its block, the parts around it stay fused and the result stays the library's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import dispatch, observers
from ..blocks import squeeze
from ..blocks.chain import Scale, Shortcut, add_act, chain
from ..blocks.recognise import SE, NormPart, hooked, not_pointwise, se_of
from .activations import act_name, gate_name
from .recipe import recipe_of


class Segment(NamedTuple):
    """One link of a chain: ``act(se(norm(conv(x))))``."""

    conv: nn.Module
    norm: nn.Module | NormPart
    se: nn.Module | None = None
    act: str | None = None


def flat(modules: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    """The modules in the order they run, sequential ones replaced by their members."""
    for module in modules:
        if module is None:
            continue
        recipe = recipe_of(module)
        if recipe is not None and recipe.members is not None and hooked(module) is None:
            yield from flat(recipe.members(module))
        elif type(module) is not nn.Identity or hooked(module) is not None:
            yield module


def is_norm(module: nn.Module) -> bool:
    # By name too: the frozen norms of torchvision, timm and others share no base class.
    return isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__


def norm_and_act(module: nn.Module) -> tuple[NormPart, str] | None:
    """Both parts of a norm that activates by itself, where the ops have them."""
    recipe = recipe_of(module)
    if recipe is None or recipe.own_act is None or hooked(module) is not None:
        return None
    act = recipe.own_act(module)
    return None if act is None else (NormPart(module), act)


def has_se(step: Segment | nn.Module) -> bool:
    """Whether a step is a squeeze-excite module that the fused op can compute."""
    return isinstance(se_of(step), SE)


def steps(modules: Iterable[nn.Module | None]) -> list[Segment | nn.Module]:
    """Cuts a run into segments and the modules that belong to none."""
    todo = list(flat(modules))
    cut: list[Segment | nn.Module] = []
    while todo:
        module = todo.pop(0)
        if not (isinstance(module, nn.Conv2d) and todo and is_norm(todo[0])):
            cut.append(module)
            continue
        norm, own = norm_and_act(todo[0]) or (todo[0], "identity")
        todo.pop(0)
        if own != "identity":
            cut.append(Segment(module, norm, None, own))
            continue
        se = todo.pop(0) if todo and has_se(todo[0]) else None
        act = act_name(todo[0]) if todo else None
        if act is not None:
            todo.pop(0)
        cut.append(Segment(module, norm, se, act))
    return cut


def _advance(x: Tensor, todo: list[Segment | nn.Module]) -> tuple[Tensor, list[Segment]]:
    """Runs all steps but the segments of the last chain, which the caller may still extend."""
    pending: list[Segment] = []
    for step in todo:
        if not isinstance(step, Segment):
            x, pending = step(_flush(x, pending)), []
            continue
        if pending and pending[-1].se is not None:  # chain takes a squeeze-excite only at its end
            x, pending = _flush(x, pending), []
        pending.append(step)
    return x, pending


def _flush(
    x: Tensor,
    pending: list[Segment],
    residual: Shortcut | None = None,
    scale: Scale | None = None,
) -> Tensor:
    if not pending:
        return x
    triples = [(s.conv, s.norm, s.act) for s in pending]
    return chain(x, *triples, residual=residual, se=pending[-1].se, scale=scale)


def run(x: Tensor, modules: Iterable[nn.Module | None]) -> Tensor:
    """Applies the modules one after the other, the convolution runs among them fused."""
    return _flush(*_advance(x, steps(modules)))


def pointwise_se(
    fc1: nn.Module,
    act: nn.Module,
    fc2: nn.Module,
    gate: nn.Module,
    *others: nn.Module,
    pool: str = "mean",
) -> SE | str:
    """The squeeze-excite made of these layers, or the reason it is none for the fused op.

    Args:
        others: further modules that the peer calls and the fused op leaves out (the pooling).
    """
    reasons = not_pointwise(fc1), not_pointwise(fc2), *map(hooked, others)
    if (reason := next(filter(None, reasons), None)) is not None:
        return reason
    names = act_name(act), gate_name(gate)
    if None in names:
        return f"no fused form of {type(act).__name__} with {type(gate).__name__}"
    return SE(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, *names, pool)


def effective_se(fc: nn.Module, gate: nn.Module, pool: str = "mean") -> SE | str:
    """The one-layer squeeze-excite, or the reason it is none for the fused ops."""
    if (reason := not_pointwise(fc)) is not None:
        return reason
    if (name := gate_name(gate)) is None:
        return f"no fused form of {type(gate).__name__}"
    return SE(fc.weight.flatten(1), fc.bias, None, None, "identity", name, pool)


def squeeze_excite_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a fused squeeze-excite module."""
    return squeeze_excite(x, self) if has_se(self) and x.dim() == 4 else self.original_forward(x)


def squeeze_excite(
    x: Tensor, module: nn.Module, residual: Tensor | None = None, post_act: str | None = None
) -> Tensor:
    """``post_act(module(x) + residual)`` for a module that has a squeeze-excite."""
    return squeeze.squeeze_excite(x, se_of(module), residual, post_act or "identity")


def residual_block(
    x: Tensor,
    body: Iterable[nn.Module | None],
    *,
    skip: nn.Module | None,
    act: nn.Module,
    row_scale: Scale | None = None,
    promotes: bool = False,
) -> Tensor:
    """``act(row_scale * body(x) + skip(x))``, the end of it in one pass where that is possible.

    Args:
        row_scale: draws stochastic depth's ``[N]`` factors for the branch it is given.
        promotes: whether the peer adds as ``a + b``; most add into the branch, in its dtype.
    """
    name, todo, skipped = act_name(act), steps(body), list(flat((skip,)))
    identity = Shortcut.through(x, skipped, run)
    _tell_unfused([*todo, *([act] if name is None else [])])
    if promotes and identity.projection is None and _autocast_dtype(x) != x.dtype:
        branch, residual = _flush(*_advance(x, todo)), identity.settled()
        factors = row_scale and row_scale(branch)  # drawn in the branch's dtype, as the peer does
        branch = branch.to(torch.promote_types(branch.dtype, residual.dtype))
        x = add_act(branch, residual, name, factors)
    else:
        x = _add(x, todo, identity, name, row_scale)
    return x if name is not None else act(x)


def _add(
    x: Tensor,
    todo: list[Segment | nn.Module],
    identity: Shortcut,
    act: str | None,
    row_scale: Scale | None,
) -> Tensor:
    """``act(row_scale * todo(x) + identity)``."""
    se = todo.pop() if has_se(todo[-1]) else None
    x, pending = _advance(x, todo)
    if se is None and pending and pending[-1].act is None:
        pending[-1] = pending[-1]._replace(act=act)
        return _flush(x, pending, identity, row_scale)
    x, residual = _flush(x, pending), identity.settled()
    if se is not None and residual.shape == x.shape and row_scale is None:
        return squeeze_excite(x, se, residual.to(x.dtype), act)
    x = x if se is None else se(x)
    return add_act(x, residual, act, row_scale and row_scale(x))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution of ``x``."""
    if x.dtype != torch.float64 and dispatch.autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _tell_unfused(todo: Iterable[Segment | nn.Module]) -> None:
    """Let ``explain`` know of the modules that split a block."""
    for step in todo:
        if not isinstance(step, Segment) and recipe_of(step) is None and not has_se(step):
            name = type(step).__name__
            why = "has no fused form" if act_name(step) is None else "follows no norm"
            reason = hooked(step) or f"{name} {why}"
            observers.notify(observers.Event(name, "unfused", reason))
