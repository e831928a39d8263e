"""timm: the blocks of EfficientNet, MobileNet and their kin; an addition without an activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .forwards import residual_block, run
from .recipe import Recipe
from .timm import drops_of

_NO_ACT = nn.Identity()


def _block(*names: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a block that applies these members in turn, and adds its input."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        body = [getattr(self, name) for name in names]
        if not self.has_skip:
            return run(x, body)
        drop_path, scale = drops_of(self)
        branch = dict(row_scale=scale, promotes=True)
        return residual_block(x, (*body, drop_path), skip=None, act=_NO_ACT, **branch)

    return forward


_BLOCKS = {
    "ConvBnAct": "conv bn1 aa",
    "DepthwiseSeparableConv": "conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2",
    "InvertedResidual": "conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3",
    "EdgeResidual": "conv_exp bn1 aa se conv_pwl bn2",
}
RECIPES = tuple(
    Recipe(
        f"timm.models._efficientnet_blocks.{name}",
        reads=f"{members} has_skip drop_path",
        forward=_block(*members.split()),
    )
    for name, members in _BLOCKS.items()
)
