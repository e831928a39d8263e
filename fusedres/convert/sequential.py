"""``nn.Sequential`` and its subclasses that hold a convolution followed by a batch norm."""

from __future__ import annotations

from torch import Tensor, nn

from .forwards import run
from .recipe import Recipe


def members(module: nn.Sequential) -> list[nn.Module]:
    return list(module)


def forward(self: nn.Sequential, x: Tensor) -> Tensor:
    return run(x, self)


def _holds_a_run(module: nn.Sequential) -> bool:
    from .recognise import fusing_recipe  # which needs this file's recipe

    children = list(module)
    for first, second in zip(children, children[1:], strict=False):
        if isinstance(first, nn.Conv2d) and _is_batch_norm(second):
            return True
    # Around sequential children that hold one: the run then goes on across their borders.
    recipes = [fusing_recipe(child) for child in children]
    return any(recipe is not None and recipe.members is not None for recipe in recipes)


def _is_batch_norm(module: nn.Module) -> bool:
    # By name: the frozen batch norms of torchvision, timm and others share no base class.
    return any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)


RECIPES = (
    Recipe(
        "torch.nn.modules.container.Sequential",
        reads="",
        forward=forward,
        suits=_holds_a_run,
        members=members,
    ),
)
