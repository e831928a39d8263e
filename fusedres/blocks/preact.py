"""Pre-activation blocks: norm and ReLU come before each convolution (He et al. 2016b).

What a block adds is a convolution's raw result; the sum's statistics, which the first norm of the
next block needs, are taken while the sum is written, and travel with it as a ``Sum`` where blocks
follow one another in a ``PreActStage``. The norm itself is applied as the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import checks, observers
from .chain import step
from .drop_path import DropPath, drop_plan, must_call_drop_path, must_call_scale, set_shortcut
from .preact_sum import Sum, add_by_module, add_convolution, norm_relu
from .recognise import NormPart, hooked, symbolic
from .residual_scale import ResidualScale
from .resnet import conv1x1, conv3x3
from .unit import Batch, State, materialise, track_all


def advance(module: nn.Module, state: Sum, stats: bool) -> Sum:
    """``module(state)``, with the statistics of the result if wanted and the module can tell."""
    known = type(module).forward in (_BASIC, _BOTTLENECK, _STAGE)  # not one of a subclass's own
    if not known or hooked(module) is not None or symbolic(state.value):
        return Sum(module(state.value))
    return module.advance(state, stats)


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
        checks.probability("dropout", dropout)
        norm_layer = norm_layer or nn.BatchNorm2d
        set_shortcut(self, planes, downsample, drop_path, residual, residual_scale)
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
        return run_block(self, state, inner, self.conv2, stats)

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
        out = planes * self.expansion
        set_shortcut(self, out, downsample, drop_path, residual, residual_scale)
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
        return run_block(self, state, inner, self.conv3, stats)

    def zero_init_last(self) -> None:
        """Start as the identity: the last convolution's weight is set to zero."""
        nn.init.zeros_(self.conv3.weight)


def run_block(
    block,
    state: Sum,
    inner: tuple[tuple[nn.Module, nn.Module | NormPart], ...],
    last: nn.Module,
    stats: bool,
) -> Sum:
    """Both blocks' forward: norm1, (conv, norm) for each inner pair, the last conv, the sum.

    Args:
        block: has norm1, relu, downsample, drop_path, dropout, residual and residual_scale.
    """
    batches: list[Batch] = []
    calls_drop = must_call_drop_path(block)
    calls = calls_drop or must_call_scale(block)
    runs, scale = (True, None) if calls_drop else drop_plan(block, state.value)
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
        if calls is None:
            y = add_convolution(x, last, residual, scale, stats, block.residual_scale)
        else:
            observers.notify(observers.Event("shortcut", "unfused", calls))
            branch = add_convolution(x, last, None, scale, False).value
            branch = block.drop_path(branch) if calls_drop else branch
            y = add_by_module(branch, residual, block.residual_scale)
    else:
        y = Sum(residual)
    track_all(batches)  # last: an error above leaves the running statistics as they were
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
