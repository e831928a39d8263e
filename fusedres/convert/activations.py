"""Names of activations and gates; other libraries' own classes for PyTorch's functions included."""

from __future__ import annotations

from torch import nn

from ..blocks import recognise
from .recipe import loaded

_PEERS = {
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
    "timm.layers.activations_me.SwishMe": "silu",
    "timm.layers.activations_me.HardSwishMe": "hardswish",
    "timm.layers.activations_me.HardSigmoidMe": "hard_sigmoid",
    "transformers.activations.SiLUActivation": "silu",
}
_GATES = ("sigmoid", "hard_sigmoid")
_known: dict[type, str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}


def learn_loaded_peers() -> None:
    """Take in the activation classes of the libraries imported by now.

    Done when a model is fused, so that a forward only looks a type up: torch.compile traces that.
    """
    for peer, name in _PEERS.items():
        if (kind := loaded(peer)) is not None:
            _known[kind] = name


def act_name(module: nn.Module | None) -> str | None:
    """The name of an activation that the ops may apply in place of the module, else None."""
    if module is None or recognise.hooked(module) is not None:
        return None
    name = _known.get(type(module)) or recognise.act_of(module)
    return None if name in _GATES else name


def gate_name(module: nn.Module) -> str | None:
    """The name of a squeeze-excite gate that the ops may apply in place of the module."""
    name = _known.get(type(module)) if recognise.hooked(module) is None else None
    return name if name in _GATES else None
