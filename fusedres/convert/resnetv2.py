"""timm's pre-activation ResNets: blocks whose norms are batch norms with one activation for all.

They run as this library's own: the norm behind an addition finds its statistics with the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import observers
from ..blocks.chain import Scale
from ..blocks.preact import run_block
from ..blocks.preact_sum import Sum, norm_relu
from ..blocks.recognise import NormPart, hooked
from ..blocks.unit import materialise, track
from .forwards import norm_and_act
from .recipe import Recipe, loaded, recipe_of
from .timm import is_drop_path, row_scale


@dataclass(frozen=True)
class _Drops:
    """timm's DropPath in the form of this library's: every block runs, samples have factors."""

    draw: Scale | None

    def plan(self, x: Tensor) -> tuple[bool, Scale | None]:
        return True, self.draw


@dataclass(frozen=True)
class _Block:
    """A block as ``run_block`` sees it."""

    norm1: NormPart
    relu: str
    downsample: nn.Module | None
    drop_path: _Drops
    inner: tuple[tuple[nn.Module, NormPart], ...]
    last: nn.Module
    dropout: None = None
    residual: bool = True
    residual_scale: None = None

    @classmethod
    def of(cls, block: nn.Module) -> _Block | str:
        """The parts of timm's block, or why it must run as it is."""
        bottleneck = hasattr(block, "conv3")
        norms = [block.norm1, block.norm2, *([block.norm3] if bottleneck else [])]
        convs = [block.conv1, block.conv2, *([block.conv3] if bottleneck else [])]
        found = [norm_and_act(norm) for norm in norms]
        for norm, parts in zip(norms, found, strict=True):
            if parts is None:
                return hooked(norm) or f"{type(norm).__name__} is no batch norm and activation"
        acts = {act for _, act in found}
        if len(acts) > 1:
            return "the norms have different activations"
        drops = _drops_of(block.drop_path)
        if isinstance(drops, str):
            return drops
        parts = [part for part, _ in found]
        inner = tuple(zip(convs[:-1], parts[1:], strict=True))
        return cls(parts[0], *acts, block.downsample, drops, inner, convs[-1])


def _drops_of(module: nn.Module) -> _Drops | str:
    if (reason := hooked(module)) is not None:
        return reason
    if type(module) is nn.Identity:
        return _Drops(None)
    if not is_drop_path(module):
        return f"{type(module).__name__} is not timm's DropPath"
    drops = module.training and module.drop_prob
    return _Drops(row_scale(module) if drops else None)


def _advance(module: nn.Module, state: Sum, stats: bool) -> Sum:
    """``module(state)``, with the statistics of the result if wanted and the module can tell."""
    recipe = recipe_of(module)
    if recipe is None or recipe.forward not in _ADVANCES or hooked(module) is not None:
        return Sum(module(state.value))
    return _ADVANCES[recipe.forward](module, state, stats)


def _advance_block(block: nn.Module, state: Sum, stats: bool) -> Sum:
    found = _Block.of(block)
    if isinstance(found, str):
        observers.notify(observers.Event(type(block).__name__, "unfused", found))
        return Sum(block.original_forward(state.value))
    return run_block(found, state, found.inner, found.last, stats)


def _advance_stage(stage: nn.Module, state: Sum, stats: bool) -> Sum:
    blocks = stage.blocks
    plain = type(blocks).forward is nn.Sequential.forward and hooked(blocks) is None
    if stage.grad_checkpointing or not plain:
        return Sum(stage.original_forward(state.value))
    for i, block in enumerate(blocks):
        state = _advance(block, state, stats or i + 1 < len(blocks))
    return state


def preact_block(self: nn.Module, x: Tensor) -> Tensor:
    return _advance_block(self, Sum(x), False).value


def stage(self: nn.Module, x: Tensor) -> Tensor:
    return _advance_stage(self, Sum(x), False).value


def forward_features(self: nn.Module, x: Tensor) -> Tensor:
    state, stages = Sum(self.stem(x)), self.stages
    last = norm_and_act(self.norm)
    if type(stages).forward is not nn.Sequential.forward or hooked(stages) is not None:
        return self.norm(stages(state.value))
    for i, module in enumerate(stages):
        state = _advance(module, state, i + 1 < len(stages) or last is not None)
    if last is None:
        return self.norm(state.value)
    batches: list = []
    y = materialise(norm_relu(state, *last, batches))
    for batch in batches:
        track(*batch)
    return y


_ADVANCES = {preact_block: _advance_block, stage: _advance_stage}


def _has_batch_norms(block: nn.Module) -> bool:
    norm = loaded("timm.layers.norm_act.BatchNormAct2d")
    return norm is not None and isinstance(block.norm1, norm)


def _holds_such_blocks(module: nn.Module) -> bool:
    kinds = tuple(filter(None, (loaded(_MODELS + name) for name in _BLOCKS)))
    return any(isinstance(m, kinds) and _has_batch_norms(m) for m in module.modules())


_MODELS = "timm.models.resnetv2."
_BLOCKS = {
    "PreActBasic": "norm1 downsample conv1 conv2 norm2 drop_path",
    "PreActBottleneck": "norm1 downsample conv1 conv2 norm2 conv3 norm3 drop_path",
}
RECIPES = (
    *(
        Recipe(_MODELS + name, reads=reads, forward=preact_block, suits=_has_batch_norms)
        for name, reads in _BLOCKS.items()
    ),
    Recipe(
        _MODELS + "ResNetStage",
        reads="grad_checkpointing torch jit is_scripting checkpoint_seq blocks",
        forward=stage,
        suits=_holds_such_blocks,
    ),
    Recipe(
        _MODELS + "ResNetV2",
        reads="stem stages norm",
        forward=forward_features,
        method="forward_features",
        suits=_holds_such_blocks,
    ),
)
