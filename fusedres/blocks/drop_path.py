"""Stochastic depth: whole residual branches dropped at random in training (Huang et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from .chain import Scale
from .recognise import hooked, symbolic
from .residual_scale import ResidualScale

MODES = ("row", "batch")


class DropPath(nn.Module):
    """``x * s / (1 - p)``, s zero with probability p, in training; x itself in evaluation.

    By itself it is torchvision's StochasticDepth and timm's DropPath, with their random numbers. In
    a block (``drop_path=``) it is no pass of its own: s is a factor in the pass that adds the
    shortcut, and in mode "batch" a dropped branch is not run at all (its norms do not count the
    batch, its parameters get no gradient). A subclass with a forward of its own is called on the
    branch's result, and so are hooks, but for mode "batch".

    Args:
        p: probability of dropping.
        mode: "row" draws for each image, "batch" once for all.
        scale_by_keep: divide what is kept by 1 - p, so that the expected value stays.
        generator: draws from it instead of PyTorch's global one. Activation checkpointing replays
            the global one only.

    Raises:
        ValueError: p outside [0, 1]; an unknown mode.
        TypeError: p is no number, generator none; in the forward x is not floating-point.

    Source: Huang et al. 2016, section 3.
    """

    def __init__(
        self,
        p: float = 0.0,
        mode: str = "row",
        scale_by_keep: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        checks.probability("p", p)
        checks.one_of("mode", mode, MODES)
        if not isinstance(generator, torch.Generator | None):
            kind = type(generator).__name__
            raise TypeError(f"generator: wanted a torch.Generator or None, got {kind}")
        self.p, self.mode, self.scale_by_keep = p, mode, scale_by_keep
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [N, ...]; returns the same shape and dtype."""
        if not self.active:
            return x
        if not symbolic(x):
            checks.floating("x", x)
            if x.dim() < 1:
                raise ValueError("x: wanted at least 1 dimension [N, ...], got ()")
        return x * self.factors(x).to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def factors(self, x: Tensor) -> Tensor:
        """Draws the factor of each image: [N]."""
        if self.mode == "row":
            return self._draw(x, x.shape[0])
        return self._draw(x, 1).expand(x.shape[0])

    def plan(self, x: Tensor) -> tuple[bool, Scale | None]:
        """Whether a block runs its branch for this ``x``, and what draws the branch's factors."""
        if not self.active:
            return True, None
        traced = torch.compiler.is_compiling() or symbolic(x)
        if self.mode == "row" or traced:  # a trace cannot leave the branch out
            return True, self.factors
        factor = self._draw(x, 1)
        return bool(factor), lambda branch: factor.expand(branch.shape[0])

    def _draw(self, x: Tensor, number: int) -> Tensor:
        keep = 1.0 - self.p
        # Drawn in x's dtype, for the numbers of the peers; divided in one that can hold 1 / keep.
        drawn = x.new_empty(number).bernoulli_(keep, generator=self.generator)
        drawn = drawn.to(torch.promote_types(x.dtype, torch.float32))
        return drawn / keep if keep > 0 and self.scale_by_keep else drawn

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}, mode={self.mode!r}"


def drop_path_of(drop_path: float | DropPath | nn.Module) -> DropPath | None:
    """A block's ``drop_path`` argument as a module, None where it drops nothing.

    Raises:
        TypeError: neither a number nor a DropPath.
        ValueError: a number outside [0, 1].
    """
    if isinstance(drop_path, DropPath):
        return drop_path
    if not isinstance(drop_path, int | float):
        kind = type(drop_path).__name__
        raise TypeError(f"drop_path: wanted a probability or a fusedres.DropPath, got {kind}")
    checks.probability("drop_path", drop_path)
    return DropPath(drop_path) if drop_path else None


def set_shortcut(
    block: nn.Module,
    channels: int,
    downsample: nn.Module | None,
    drop_path: float | DropPath,
    residual: bool,
    residual_scale: ResidualScale | None = None,
) -> None:
    """Gives a block the attributes that say what its branch is added to, and when.

    Args:
        channels: of the branch's result.

    Raises:
        TypeError: a residual_scale that is none; a residual that is not True or False.
        ValueError: a residual_scale of other channels or another dim; a downsample, drop_path or
            residual_scale in a block that has no shortcut.
    """
    if not isinstance(residual, bool):
        raise TypeError(f"residual: wanted True or False, got {residual!r}")
    if not isinstance(residual_scale, ResidualScale | None):
        kind = type(residual_scale).__name__
        raise TypeError(f"residual_scale: wanted a fusedres.ResidualScale or None, got {kind}")
    if residual_scale is not None and residual_scale.dim != 1:
        raise ValueError(f"residual_scale: wanted dim=1 in a block, got {residual_scale.dim}")
    if residual_scale is not None and residual_scale.weight.numel() not in (1, channels):
        found = residual_scale.weight.numel()
        raise ValueError(f"residual_scale: wanted 1 or {channels} channels, got {found}")
    if not residual and (downsample is not None or drop_path or residual_scale is not None):
        raise ValueError(
            "residual: wanted True with a downsample, drop_path or residual_scale, got False"
        )
    block.residual_scale = residual_scale
    block.downsample = downsample
    block.drop_path = drop_path_of(drop_path)
    block.residual = residual


def drop_plan(block: nn.Module, x: Tensor) -> tuple[bool, Scale | None]:
    """Whether the branch of ``block`` runs for this x, and what draws its factors."""
    return (True, None) if block.drop_path is None else block.drop_path.plan(x)


def must_call_drop_path(block: nn.Module) -> str | None:
    """A reason to call the block's drop path, not to leave its factors to a pass of the tail."""
    module = block.drop_path
    if not isinstance(module, nn.Module):  # none, or what a converter read from a peer's
        return None
    if type(module).forward is not DropPath.forward:
        return f"{type(module).__name__} has a forward of its own"
    return hooked(module) if module.mode == "row" else None  # "batch" is drawn before the branch


def must_call_scale(block: nn.Module) -> str | None:
    """A reason to call the block's residual scale, not to leave it to a pass of the tail."""
    module = block.residual_scale
    if module is None:
        return None
    if type(module).forward is not ResidualScale.forward:
        return f"{type(module).__name__} has a forward of its own"
    return hooked(module)


def check_drop_path(rate: float, mode: str) -> None:
    """A network's ``drop_path_rate`` and ``drop_path_mode``."""
    checks.probability("drop_path_rate", rate)
    checks.one_of("drop_path_mode", mode, MODES)


def linear_decay(rate: float, blocks: int) -> list[float]:
    """Each block's probability, from 0 for the first to ``rate`` for the last.

    timm's form of Huang et al. 2016, equation 4, which starts at ``rate / blocks``.
    """
    return [rate * i / max(1, blocks - 1) for i in range(blocks)]
