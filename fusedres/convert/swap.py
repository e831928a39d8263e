"""``fuse`` and ``unfuse``: exchange the classes of modules, nothing else.

A fused module's class is a subclass of its own class that overrides one method. Parameters,
buffers, hooks, the training flag, ``isinstance`` and every attribute stay what they were, and
``unfuse`` has nothing to undo but the class.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .activations import learn_loaded_peers
from .recipe import Recipe, recipe_of
from .recognise import (
    FUSING,
    UNFUSING,
    fusing_recipe,
    is_fused,
    kinds,
    recipe_for_class,
    unfusing_recipe,
)


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Run the blocks of ``model`` on fused ops: the same parameters, the same results.

    Recognised are the residual blocks of torchvision, timm and transformers (ResNet, ResNeXt,
    Wide ResNet, SENet, RegNet), their stems, torchvision's DenseNet, ``nn.Sequential`` runs of
    convolution, batch norm and activation, squeeze-excite modules wherever they stand, and
    ``nn.TransformerEncoderLayer``. Inside a block, what has no fused op runs as the module it is.
    A subclass that overrides ``forward`` is left alone.

    Args:
        model: any module; wrappers such as DataParallel are looked through.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The fused model: ``model`` itself when ``inplace``. Its state dict has the same keys.
        Fusing a fused model changes nothing.

    Raises:
        TypeError: ``model`` is not a module, or is a ScriptModule, whose code is compiled.
        ValueError: ``model`` holds nothing that can be fused.
    """
    _check_module(model)
    learn_loaded_peers()
    modules = list(model.modules())
    if not any(is_fused(m) or recipe_of(m) or fusing_recipe(m) for m in modules):
        raise ValueError(
            "model: wanted residual blocks of torchvision, timm or transformers, convolutions "
            "followed by a batch norm in an nn.Sequential, squeeze-excite modules, or "
            "nn.TransformerEncoderLayer, "
            f"got a {type(model).__name__} of {kinds(model)}"
        )
    model = model if inplace else copy.deepcopy(model)
    swaps = [(m, type(m).derived_from) for m in model.modules() if recipe_of(m) in UNFUSING]
    swaps += [(m, derived_class(type(m))) for m in model.modules() if fusing_recipe(m)]
    _exchange(swaps)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The exact inverse of ``fuse``: every module gets its original class back, for export.

    Blocks of this library itself run on PyTorch's modules alone, under the same state dict, until
    ``fuse`` is called on them.

    Args:
        model: any module; one without fused modules is returned as it is.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The model without fused modules: ``model`` itself when ``inplace``.

    Raises:
        TypeError: ``model`` is not a module, or is a ScriptModule.
        ValueError: something else has since changed the class of a fused module.
    """
    _check_module(model)
    for name, m in model.named_modules():
        if recipe_of(m) is not None and "derived_from" not in vars(type(m)):
            raise ValueError(
                f"model: wanted modules of the classes that fuse gave them, got {name or 'model'} "
                f"of a class {type(m).__name__} that was derived later; undo that first"
            )
    model = model if inplace else copy.deepcopy(model)
    swaps = [(m, type(m).derived_from) for m in model.modules() if recipe_of(m) in FUSING]
    swaps += [(m, derived_class(type(m))) for m in model.modules() if unfusing_recipe(m)]
    _exchange(swaps)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model: wanted a torch.nn.Module in Python, got a ScriptModule; "
            "fuse or unfuse the model before torch.jit.script or torch.jit.trace"
        )


def _exchange(swaps: list[tuple[nn.Module, type]]) -> None:
    """Gives each module its new class, or, on any error, none of them."""
    before = [type(module) for module, _ in swaps]
    try:
        for module, kind in swaps:
            module.__class__ = kind
    except BaseException:
        for (module, _), kind in zip(swaps, before, strict=True):
            module.__class__ = kind
        raise


@functools.cache
def derived_class(original: type) -> type:
    """The subclass of ``original`` that runs its recipe. One for all its instances.

    It keeps the name: transformers decides by class name where a model may be split.
    """
    recipe = recipe_for_class(original)
    prefix = "Fused" if recipe in FUSING else "Unfused"
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_get_name": lambda self: prefix + original.__name__,
        "fusedres_recipe": recipe,
        "derived_from": original,
        "original_forward": getattr(original, recipe.method),
        recipe.method: _fused_method(original, recipe) if recipe in FUSING else recipe.forward,
    }
    if recipe.se is not None:
        members["squeeze_excite_parts"] = recipe.se  # by which ``chain`` takes it into its tail
    return types.new_class(original.__name__, (original,), exec_body=lambda ns: ns.update(members))


def _fused_method(original: type, recipe: Recipe) -> Callable[..., Tensor]:
    unfused, fused = getattr(original, recipe.method), recipe.forward
    _, name, *_ = inspect.signature(unfused).parameters

    @functools.wraps(unfused)
    def forward(self: nn.Module, *args, **kwargs) -> Tensor:
        inputs = args if args or name not in kwargs else (kwargs[name],)
        # Tracers record the original's code: their graphs are for tools that know PyTorch's ops.
        symbolic = torch.jit.is_tracing() or any(isinstance(x, fx.Proxy) for x in inputs)
        if recipe.arguments and not symbolic:
            return fused(self, *args, **kwargs)
        if symbolic or len(inputs) != 1 or len(args) + len(kwargs) != 1:
            return unfused(self, *args, **kwargs)
        return fused(self, inputs[0])

    return forward


def _reduce_ex(self: nn.Module, protocol: int) -> tuple:
    """Pickles as the original class: a derived one has no importable name."""
    original = type(self).derived_from
    make, args, *state = original.__reduce_ex__(self, protocol)
    if "derived_from" not in vars(type(self)):  # a class derived from a derived one
        return make, args, *state
    return _rebuild, (original,), *state


def _rebuild(original: type) -> nn.Module:
    learn_loaded_peers()
    # Another release of the peer may run code that no recipe knows: then the original it is.
    kind = original if recipe_for_class(original) is None else derived_class(original)
    return kind.__new__(kind)
