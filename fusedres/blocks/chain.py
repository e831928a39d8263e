"""Runs a residual branch, conv-norm-act after conv-norm-act, in the fewest passes its mode allows.

In inference a triple is one ``conv_bn_act`` call. In training a triple leaves its convolution's raw
result *pending*: the batch norm and activation on it are applied by whoever reads it next, which
is the next convolution (``conv_stats``) or the block's tail (``bn_act``, ``bn_se_act``), so that
neither the normalised nor the activated tensor outlives the pass that made it.

A module that cannot be fused runs as it is, and the reason goes to ``fusedres.explain``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import observers, reference
from ..ops import conv_bn_act
from ..ops.convolution import conv_shape
from ..running_stats import normalised
from .node import as_one_node, branch_of
from .recognise import act_of, hooked, se_of, symbolic, wants_grad
from .residual_scale import scaled_norm
from .squeeze import squeeze_excite
from .training import convolve, tail
from .unit import (
    Batch,
    Pending,
    State,
    Unit,
    activate,
    autocasts,
    in_autocast,
    materialise,
    operands,
    track_all,
    unit_of,
    value,
)

Triple = tuple[nn.Module, nn.Module, "nn.Module | str | None"]
Scale = Callable[[Tensor], Tensor]


def chain(
    x: Tensor,
    *triples: Triple,
    residual: Tensor | Shortcut | None = None,
    se: nn.Module | None = None,
    scale: Scale | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """The composition of ``act(norm(conv(.)))`` over the triples.

    The last triple's activation comes after ``se`` and after the residual has been added.

    Args:
        x: [N, C, H, W]; not changed.
        triples: (conv, norm, act); act is a module, a name or None.
        residual: added before the last activation; not changed. A Shortcut runs when all but the
            last triple have: errors come in the order in which PyTorch's blocks raise.
        se: a module applied to the last norm's result.
        scale: draws factors [N] (stochastic depth) of the branch for a tensor of its N and dtype.
        gain: factors [C] or [1] of the last norm's result.
    """
    batches: list[Batch] = []
    y, branch = None, branch_of(x, triples, se)
    if branch is not None:
        residual = residual.started() if isinstance(residual, Shortcut) else residual
        y = as_one_node(branch, residual, scale, gain, batches)
    if y is None:
        state: State = x
        for conv, norm, act in triples[:-1]:
            state = step(state, conv, norm, act, batches)
        y = _last(state, *triples[-1], residual, se, scale, batches, gain)
    track_all(batches)  # last: an error above leaves the running statistics as they were
    return y


@dataclass(frozen=True)
class Shortcut:
    """``norm(conv(before(x)))``, each of them optional: what a block adds to its branch."""

    x: Tensor
    before: Callable[[Tensor], Tensor] | None = None
    projection: tuple[nn.Module, nn.Module] | None = None

    @classmethod
    def of(cls, x: Tensor, module: nn.Module | None) -> Shortcut:
        """What ``module(x)`` is; the norm of a projection may be left to the tail."""
        if module is None:
            return cls(x)
        if type(module) is not nn.Sequential or hooked(module) is not None:
            return cls(x, module)
        return cls.through(x, list(module))

    @classmethod
    def through(cls, x: Tensor, modules: list[nn.Module], run: Callable | None = None) -> Shortcut:
        """The modules one after the other; ``run(x, modules)`` runs those before a projection."""
        ends_in_norm = len(modules) >= 2 and isinstance(modules[-2], nn.Conv2d)
        before, projection = modules, None
        if ends_in_norm:
            before, projection = modules[:-2], (modules[-2], modules[-1])
        return cls(x, partial(run or _one_by_one, modules=before) if before else None, projection)

    def started(self) -> Shortcut:
        """What is left when ``before`` has run."""
        return self if self.before is None else Shortcut(self.before(self.x), None, self.projection)

    def __call__(self, batches: list[Batch]) -> State:
        """The value; a projection's norm is left pending."""
        x = self.started().x
        return x if self.projection is None else step(x, *self.projection, None, batches)

    def settled(self) -> Tensor:
        """The value, for where no chain adds it."""
        batches: list[Batch] = []
        value = materialise(self(batches))
        track_all(batches)
        return value


def _one_by_one(x: Tensor, modules: list[nn.Module]) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def add_act(
    branch: Tensor,
    residual: Tensor | None,
    act: nn.Module | str | None,
    scale: Tensor | None = None,
) -> Tensor:
    """``act(scale * branch + residual)``, ``scale`` [N]."""
    if residual is None and scale is None:
        return activate(branch, act)
    fits = residual is not None and not symbolic(branch) and branch.layout == torch.strided
    if not fits or residual.shape != branch.shape or residual.device != branch.device:
        if scale is not None:
            branch = branch * scale.to(branch.dtype).view(-1, 1, 1, 1)
        return activate(branch if residual is None else _plain_sum(branch, residual), act)
    name = act_of(act)
    residual = residual.to(branch.dtype)
    y = F.residual_mix(branch, residual, row_scale=scale, act=name or "identity")
    return y if name is not None else act(y)


def _plain_sum(branch: Tensor, residual: Tensor) -> Tensor:
    """PyTorch broadcasts, or raises; its blocks add into the branch, which keeps its shape."""
    y = branch + residual
    if not symbolic(y) and y.shape != branch.shape:
        raise RuntimeError(
            f"output with shape {list(branch.shape)} doesn't match the broadcast shape"
            f" {list(y.shape)}"
        )
    return y


def activate_copy(x: Tensor, act: nn.Module | str | None) -> Tensor:
    """``act(x)`` where x must stay as it is: a block's ReLU may work in place."""
    name = act_of(act)
    return act(x.clone()) if name is None else reference.ACTIVATIONS[name](x)


def step(state: State, conv: nn.Module, norm: nn.Module, act, batches: list[Batch]) -> State:
    """A triple that is not the last."""
    unit = "tracing" if symbolic(state) else unit_of(state, conv, norm, act)
    if isinstance(unit, str):
        return activate(_unfused(state, conv, norm, unit), act)
    if _in_one_call(unit, state):
        y: State = _conv_bn_act(unit, state, None, unit.act)
    else:
        y = convolve(unit, state)
        batches.append((unit.norm, y.mean, y.var, y.raw.shape))
    return y if unit.then is None else unit.then(materialise(y))


def _last(
    state: State, conv, norm, act, residual, se, scale, batches: list[Batch], gain=None
) -> Tensor:
    """The last triple and the block's tail: squeeze-excite, scale, residual and activation."""
    if isinstance(residual, Shortcut):
        residual = residual(batches)
    unit = "tracing" if symbolic(state) else unit_of(state, conv, norm, act)
    if isinstance(unit, str):
        branch = _unfused(state, conv, norm, unit)
        branch = branch if gain is None else branch * gain.to(branch.dtype).view(-1, 1, 1)
        return _finish(branch, materialise(residual), se, act, scale and scale(branch))
    if gain is not None:
        unit = replace(unit, norm=scaled_norm(unit.norm, gain, unit.conv.out_channels))
    scale = scale and scale(operands(value(state), unit.conv)[0])
    if scale is not None and (se is not None or residual is None):
        branch = _last(state, conv, norm, None, None, se, None, batches, gain)
        return add_act(branch, materialise(residual), act, scale)
    if scale is not None or not _in_one_call(unit, state, residual):
        rows = None if scale is None else scale.view(-1, 1)
        y = tail(unit, state, residual, se, rows, batches)
        if y is not None:
            return y
        pending = convolve(replace(unit, act="identity"), state)
        batches.append((unit.norm, pending.mean, pending.var, pending.raw.shape))
        return _finish(materialise(pending), materialise(residual), se, act, scale)
    if se is not None:
        return _finish(_conv_bn_act(unit, state, None, "identity"), residual, se, act)
    shape = conv_shape(state.shape, unit.conv.weight, unit.geometry)
    if residual is None or (residual.shape == shape and residual.device == state.device):
        y = _conv_bn_act(unit, state, residual, unit.act)
        return y if unit.then is None else unit.then(y)
    return add_act(_conv_bn_act(unit, state, None, "identity"), residual, act)


def _unfused(state: State, conv: nn.Module, norm: nn.Module, reason: str) -> Tensor:
    observers.notify(observers.Event("conv, norm", "unfused", reason, launches=2))
    return normalised(norm, conv(materialise(state) if isinstance(state, Pending) else state))


def _finish(
    branch: Tensor, residual: Tensor | None, se: nn.Module | None, act, scale: Tensor | None = None
) -> Tensor:
    """Squeeze-excite, scale, residual and activation on a finished norm."""
    if se is None:
        return add_act(branch, residual, act, scale)
    mlp = "tracing" if symbolic(branch) else se_of(se)
    if not isinstance(mlp, str) and branch.dim() != 4:
        mlp = f"the input has {branch.dim()} dimensions, not 4"
    fits = not isinstance(mlp, str) and (residual is None or residual.shape == branch.shape)
    if not fits:
        if isinstance(mlp, str):
            observers.notify(observers.Event("squeeze_excite", "unfused", mlp))
        return add_act(se(branch), residual, act, scale)
    name = act_of(act)
    residual = None if residual is None else residual.to(branch.dtype)
    y = squeeze_excite(branch, mlp, residual, name or "identity", scale)
    return y if name is not None else act(y)


def _in_one_call(unit: Unit, state: State, residual: State | None = None) -> bool:
    """Whether running statistics are used and nobody asks for a gradient."""
    if isinstance(state, Pending) or isinstance(residual, Pending) or unit.norm.batch_stats:
        return False
    params = unit.conv.weight, unit.conv.bias, unit.norm.weight, unit.norm.bias
    return not wants_grad(state, residual, *params)


def _conv_bn_act(unit: Unit, x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    n, conv = unit.norm, unit.conv
    if x.device.type == "cpu" and autocasts(x, conv.weight):
        # The packed weight is the float32 one folded and rounded, once instead of every call.
        x, weight, bias = in_autocast(x), conv.weight, conv.bias
    else:
        x, weight, bias = operands(x, conv)
    residual = None if residual is None else residual.to(x.dtype)
    return conv_bn_act.op(
        x, weight, bias, residual, n.weight, n.bias, n.running_mean, n.running_var, n.eps,
        *unit.geometry, act,
    )  # fmt: skip
