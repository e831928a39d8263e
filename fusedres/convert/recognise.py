"""Which modules can be exchanged: the recipes of every library, and the search among them."""

from __future__ import annotations

from collections import Counter

from torch import nn

from . import (
    efficientnet,
    huggingface,
    plain,
    plain_residuals,
    resnetv2,
    sequential,
    timm,
    torchvision,
    transformer,
)
from .recipe import Recipe, loaded, recipe_of

FUSING: tuple[Recipe, ...] = (
    *torchvision.RECIPES,
    *timm.RECIPES,
    *resnetv2.RECIPES,
    *efficientnet.RECIPES,
    *huggingface.RECIPES,
    *sequential.RECIPES,
    *transformer.RECIPES,
)
UNFUSING: tuple[Recipe, ...] = (*plain.RECIPES, *plain_residuals.RECIPES)


def fusing_recipe(module: nn.Module) -> Recipe | None:
    """The recipe by which ``fuse`` would run a module of another library, or None."""
    return _find(module, FUSING)


def unfusing_recipe(module: nn.Module) -> Recipe | None:
    """The recipe by which ``unfuse`` would run a module of this library, or None."""
    return _find(module, UNFUSING)


def recipe_for_class(kind: type) -> Recipe | None:
    """The recipe that replaces the forward of ``kind``, or None."""
    return next((recipe for recipe in (*FUSING, *UNFUSING) if recipe.replaces(kind)), None)


def why_left_alone(module: nn.Module) -> str | None:
    """Why modules directly inside ``module`` run by themselves; None where it is fused itself."""
    kind = type(module)
    if is_fused(module):
        return None
    if recipe_of(module) in UNFUSING or fusing_recipe(module) is not None:
        return "call fusedres.fuse on the model"
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return f"{kind.__name__} holds no convolution followed by a batch norm"
    for recipe in FUSING:
        peer = loaded(recipe.peer)
        if peer is None or peer is nn.Sequential or not issubclass(kind, peer):
            continue
        if recipe.replaces(kind):
            return f"this {kind.__name__} is of a form that fuse does not take"
        return f"{kind.__name__}.{recipe.method} is not the code of {peer.__name__} that fuse knows"
    return f"fuse does not know {kind.__name__}"


def is_fused(module: nn.Module) -> bool:
    """Whether a module runs on fused ops: since ``fuse``, or as one of this library's own."""
    return recipe_of(module) in FUSING or unfusing_recipe(module) is not None


def kinds(model: nn.Module) -> str:
    """What a model is made of, for an error message: ``"2 Linear, ReLU"``."""
    leaves = [type(m).__name__ for m in model.modules() if not any(m.children())]
    counts = Counter(leaves).most_common()
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in counts)


def _find(module: nn.Module, recipes: tuple[Recipe, ...]) -> Recipe | None:
    if recipe_of(module) is not None:
        return None
    recipe = next((r for r in recipes if r.replaces(type(module))), None)
    return recipe if recipe is not None and recipe.accepts(module) else None
