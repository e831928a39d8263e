"""Pre-activation blocks: norm and ReLU come before each convolution (He et al. 2016b).

What a block adds is a convolution's raw result; the sum's statistics, which the first norm of the
next block needs, are taken while the sum is written, and travel with it as a ``Sum`` where blocks
follow one another in a ``PreActStage``. The norm itself is applied as the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks, dispatch
from ..layout import conv_memory_format, dense
from ..ops import bn_act, conv_bn_act, conv_stats, residual_add
from ..ops.convolution import conv_shape
from .chain import Scale, add_act, step, symbolic
from .drop_path import DropPath, set_shortcut
from .recognise import act_of, geometry_of, hooked, norm_of, wants_grad
from .residual_scale import ResidualScale
from .resnet import conv1x1, conv3x3
from .training import NO_PROLOGUE
from .unit import (
    Batch,
    Pending,
    State,
    materialise,
    misfit,
    operands,
    track,
    value,
)


@dataclass(frozen=True)
class Sum:
    """A block's result and, where a norm will want them, its mean and variance."""

    value: Tensor  # [N, C, H, W]
    mean: Tensor | None = None  # [C]
    var: Tensor | None = None  # [C]


def advance(module: nn.Module, state: Sum, stats: bool) -> Sum:
    """``module(state)``, with the statistics of the result if wanted and the module can tell."""
    known = type(module).forward in (_BASIC, _BOTTLENECK, _STAGE)  # not one of a subclass's own
    if not known or hooked(module) is not None or symbolic(state.value):
        return Sum(module(state.value))
    return module.advance(state, stats)


def norm_relu(state: Sum, norm: nn.Module, act: nn.Module, batches: list[Batch]) -> State:
    """``act(norm(.))`` of a sum: pending in training, one pass in inference."""
    x = state.value
    found = "FX tracing" if symbolic(x) else norm_of(norm)
    name = act_of(act)
    if not isinstance(found, str):
        found = _norm_misfit(x, found.weight, found.running_mean) or found
    if isinstance(found, str) or name is None:
        reason = found if isinstance(found, str) else f"{type(act).__name__} has no fused form"
        dispatch.notify(dispatch.Event("norm", "unfused", reason))
        return act(norm(x))
    if not found.batch_stats:
        pending = Pending(x, found, name, found.running_mean, found.running_var)
        return pending if wants_grad(x, found.weight, found.bias) else materialise(pending)
    checks.more_than_one_value(x)
    mean, var = state.mean, state.var
    if mean is None:
        mean, var = bn_act.stats_op(dense(x.detach()))
    batches.append((found, mean, var, x.shape))
    return Pending(x, found, name, mean, var)


def _norm_misfit(x: Tensor, *params: Tensor | None) -> str | None:
    if x.dim() != 4 or x.dtype not in dispatch.DTYPES:
        return f"the input has {x.dim()} dimensions of {x.dtype}"
    if any(p is not None and (len(p) != x.shape[1] or p.device != x.device) for p in params):
        return "the norm does not fit the input"
    return None


def add_convolution(
    state: State,
    conv: nn.Module,
    residual: Tensor | None,
    scale: Scale | None,
    stats: bool,
    scaling: ResidualScale | None = None,
) -> Sum:
    """``scale * conv(state) + residual``: the end of a block."""
    if scaling is not None and hooked(scaling) is not None:
        branch = add_convolution(state, conv, None, None, False).value
        return Sum(scaling(branch, residual, scale and scale(branch)))
    geometry = "FX tracing" if symbolic(value(state)) else geometry_of(conv)
    if not isinstance(geometry, str):
        geometry = misfit(conv, value(state)) or geometry
    if isinstance(geometry, str):
        dispatch.notify(dispatch.Event("conv", "unfused", geometry))
        return _added(conv(materialise(state)), residual, scale, scaling)
    x, weight, bias = operands(value(state), conv)
    shape = conv_shape(x, weight, geometry)
    fits = residual is not None and (residual.shape, residual.dtype) == (shape, x.dtype)
    if residual is None or not fits:
        prologue = state.prologue if isinstance(state, Pending) else NO_PROLOGUE
        own = stats and residual is None and scale is None and scaling is None
        y, mean, var = conv_stats.op(x, *prologue, weight, bias, *geometry, own)
        return Sum(y, mean, var) if own else _added(y, residual, scale, scaling)
    plain = scale is None and scaling is None and isinstance(state, Tensor)
    if plain and not wants_grad(x, weight, bias, residual):
        identity = _identity_norm(weight)
        y = conv_bn_act.op(x, weight, bias, residual, *identity, 0.0, *geometry, "identity")
        return Sum(y)
    prologue = state.prologue if isinstance(state, Pending) else NO_PROLOGUE
    y = dense(conv_stats.op(x, *prologue, weight, bias, *geometry, False)[0])
    if not dispatch.has_kernel("residual_add", y, instead="residual_mix"):
        return _added(y, residual, scale, scaling)
    residual = residual.contiguous(memory_format=conv_memory_format(x, weight))
    rows = None if scale is None else scale(y).view(-1, 1)
    gain = shortcut_gain = None
    if scaling is not None:
        gain, factor = scaling.weight.expand(y.shape[1]), scaling.of_shortcut(y)
        shortcut_gain = None if factor is None else factor.expand(y.shape[1])
    none, numbers = (None,) * 3, (False, False, 0.0, 0.0, "identity", False, stats)
    maps = (gain, *none), (shortcut_gain, *none)
    y, _, mean, var = residual_add.op(y, *maps[0], residual, *maps[1], rows, *numbers)
    return Sum(y, mean, var) if stats else Sum(y)


def _added(
    branch: Tensor,
    residual: Tensor | None,
    scale: Scale | None,
    scaling: ResidualScale | None = None,
) -> Sum:
    factors = scale and scale(branch)
    if scaling is not None:
        branch, residual = scaling.of_branch(branch), residual * scaling.shortcut
    if residual is not None and residual.dtype != branch.dtype:
        branch = branch.to(torch.promote_types(branch.dtype, residual.dtype))  # a + b
    return Sum(add_act(branch, residual, None, factors))


_constants: dict[tuple, tuple[None, None, Tensor, Tensor]] = {}


def _identity_norm(weight: Tensor) -> tuple[None, None, Tensor, Tensor]:
    """A norm that changes nothing. The same tensors each time: a packed weight knows its norm."""
    key = weight.shape[0], weight.device
    if key not in _constants:
        with torch.inference_mode(False):
            zeros = torch.zeros(weight.shape[0], device=weight.device)
            _constants[key] = None, None, zeros, torch.ones_like(zeros)
    return _constants[key]


class PreActBasicBlock(nn.Module):
    """``shortcut + conv2(relu(norm2(conv1(h))))`` with ``h = relu(norm1(x))`` (He et al. 2016b).

    The shortcut is x itself, or ``downsample(h)``. Submodules norm1, conv1, norm2, conv2: timm's
    PreActBasic.

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for BasicBlock.
        downsample: module for the shortcut, applied to h (a 1x1 convolution without norm).
        dropout: probability of dropout before conv2 (Wide ResNet, Zagoruyko and Komodakis 2016).
        drop_path, residual, residual_scale: as for BasicBlock.

    Raises:
        ValueError, NotImplementedError, TypeError: as BasicBlock; a dropout outside [0, 1].
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dropout: float = 0.0,
        drop_path: float | DropPath = 0.0,
        residual: bool = True,
        residual_scale: ResidualScale | None = None,
    ):
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError("PreActBasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in PreActBasicBlock")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: wanted a probability from 0 to 1, got {dropout}")
        norm_layer = norm_layer or nn.BatchNorm2d
        set_shortcut(self, downsample, drop_path, residual, residual_scale)
        self.norm1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.norm2 = norm_layer(planes)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]."""
        return self.advance(Sum(x), False).value

    def advance(self, state: Sum, stats: bool) -> Sum:
        """``forward`` with what is known of its input, and with its result's statistics."""
        inner = ((self.conv1, self.norm2),)
        return _block(self, state, inner, self.conv2, stats)

    def zero_init_last(self) -> None:
        """Start as the identity: the last convolution's weight is set to zero."""
        nn.init.zeros_(self.conv2.weight)


class PreActBottleneck(nn.Module):
    """Pre-activation around 1x1, 3x3 and 1x1 convolutions; timm's PreActBottleneck.

    Arguments as for PreActBasicBlock, without dropout; groups, base_width and dilation as for
    Bottleneck. The stride is on the 3x3 convolution.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        drop_path: float | DropPath = 0.0,
        residual: bool = True,
        residual_scale: ResidualScale | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        set_shortcut(self, downsample, drop_path, residual, residual_scale)
        self.norm1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.norm2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.norm3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU()
        self.stride = stride
        self.dropout = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        return self.advance(Sum(x), False).value

    def advance(self, state: Sum, stats: bool) -> Sum:
        """``forward`` with what is known of its input, and with its result's statistics."""
        inner = (self.conv1, self.norm2), (self.conv2, self.norm3)
        return _block(self, state, inner, self.conv3, stats)

    def zero_init_last(self) -> None:
        """Start as the identity: the last convolution's weight is set to zero."""
        nn.init.zeros_(self.conv3.weight)


def _block(
    block: nn.Module,
    state: Sum,
    inner: tuple[tuple[nn.Module, nn.Module], ...],
    last: nn.Module,
    stats: bool,
) -> Sum:
    """Both blocks' forward: norm1, (conv, norm) for each inner pair, the last conv, the sum."""
    batches: list[Batch] = []
    runs, scale = (True, None) if block.drop_path is None else block.drop_path.plan(state.value)
    if not runs and block.downsample is None:
        return state
    x: State = norm_relu(state, block.norm1, block.relu, batches)
    stats = stats and bool(batches)  # the next block's norm will be in the mode of this one's
    residual = state.value if block.residual else None
    if block.downsample is not None:
        x = materialise(x)  # two convolutions read it
        residual = block.downsample(x)
    if runs:
        for conv, norm in inner:
            x = step(x, conv, norm, block.relu, batches)
        drop = block.dropout
        if drop is not None and (drop.training or hooked(drop) is not None):
            x = drop(materialise(x))
        y = add_convolution(x, last, residual, scale, stats, block.residual_scale)
    else:
        y = Sum(residual)
    for batch in batches:  # last: an error above leaves the running statistics as they were
        track(*batch)
    return y


class PreActStage(nn.Module):
    """Pre-activation blocks one after the other; the submodule is ``blocks`` (timm's keys)."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The last block's result."""
        return self.advance(Sum(x), False).value

    def advance(self, state: Sum, stats: bool) -> Sum:
        """``forward`` with what is known of its input, and with its result's statistics."""
        for i, block in enumerate(self.blocks):
            state = advance(block, state, stats or i + 1 < len(self.blocks))
        return state


_BASIC, _BOTTLENECK = PreActBasicBlock.forward, PreActBottleneck.forward
_STAGE = PreActStage.forward
