"""Argument checks of the public functions: errors name the argument, the wanted and the got."""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor

from . import dispatch, reference


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(x).__name__}")
    if x.dtype not in dispatch.DTYPES:
        raise TypeError(f"{name}: wanted a floating-point tensor, got {x.dtype}")


def at_least_2d(name: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name}: wanted at least 2 dimensions [N, C, ...], got {tuple(x.shape)}")


def per_channel(name: str, p: Tensor | None, channels: int) -> None:
    # PyTorch's own type and wording (F.batch_norm).
    if p is not None and p.numel() != channels:
        raise RuntimeError(f"{name} should contain {channels} elements not {p.numel()}")


def same_device(name: str, p: Tensor | None, x: Tensor) -> None:
    if p is not None and p.device != x.device:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, wanted {x.device} (as the"
            f" input), got {p.device}"
        )


def like(name: str, other: Tensor | None, x: Tensor) -> None:
    """``other`` has the shape, dtype and device of the input ``x``."""
    if other is None:
        return
    floating(name, other)
    if other.shape != x.shape:
        raise ValueError(
            f"{name}: wanted shape {tuple(x.shape)} (the input's), got {tuple(other.shape)}"
        )
    if other.dtype != x.dtype:
        raise TypeError(f"{name}: wanted dtype {x.dtype} (the input's), got {other.dtype}")
    same_device(name, other, x)


def matrix(name: str, w: Tensor, rows: int | None, cols: int | None) -> Tensor:
    """A [rows, cols] weight, given so or as that of a 1x1 convolution; None is any size."""
    floating(name, w)
    wanted = f"[{rows or 'R'}, {cols or 'R'}] or that with two trailing ones"
    if w.dim() not in (2, 4) or tuple(w.shape[2:]) not in ((), (1, 1)):
        raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(w.shape)}")
    if (rows or w.shape[0], cols or w.shape[1]) != tuple(w.shape[:2]):
        raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(w.shape)}")
    return w.flatten(1)


def one_of(name: str, value: str, choices) -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name}: wanted one of {wanted}, got {value!r}")


def activation(name: str, act: str) -> None:
    one_of(name, act, reference.ACTIVATIONS)


def probability(name: str, p: float) -> None:
    try:
        fits = 0 <= p <= 1
    except TypeError:
        kind = type(p).__name__
        raise TypeError(f"{name}: wanted a probability from 0 to 1, got {kind}") from None
    if not fits:
        raise ValueError(f"{name}: wanted a probability from 0 to 1, got {p}")


def size(name: str, value: int, least: int = 1) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: wanted a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: wanted a number >= {least}, got {value}")


def finite(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: wanted a finite number, got {value}")


def layer_input(name: str, x: Tensor, weight: Tensor) -> None:
    """The input of a layer that has no peer in PyTorch to raise for it."""
    floating(name, x)
    if x.device != weight.device:
        raise RuntimeError(f"{name}: wanted device {weight.device} (the weight's), got {x.device}")
    if x.dtype != weight.dtype and not dispatch.autocasts(x):
        raise TypeError(f"{name}: wanted dtype {weight.dtype} (the weight's), got {x.dtype}")


def bn_numbers(momentum: float | None, eps: float, training: bool = False) -> None:
    if momentum is not None and not momentum >= 0:
        raise ValueError(f"momentum: wanted None or a number >= 0, got {momentum}")
    if not eps >= 0 or (training and eps == 0):  # PyTorch, too, refuses 0 in training
        raise ValueError(f"eps: wanted a number {'>' if training else '>='} 0, got {eps}")


def more_than_one_value(x: Tensor) -> None:
    # PyTorch's own type and wording (F.batch_norm).
    if x.shape[0] * x.shape[2:].numel() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps) -> None:
    """The arguments that every batch norm function takes."""
    floating("input", x)
    at_least_2d("input", x)
    bn_numbers(momentum, eps, training)
    params = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    for name, p in params.items():
        if p is not None:
            floating(name, p)
        per_channel(name, p, x.shape[1])
        same_device(name, p, x)
    if training:
        more_than_one_value(x)
    elif running_mean is None or running_var is None:
        # PyTorch's own type and wording.
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when training=False"
        )


def squeeze_excite(x, w1, b1, w2, b2, act, gate, post_act) -> tuple[Tensor, Tensor]:
    """The arguments that every squeeze-excite function takes; returns w1 and w2 as matrices."""
    channels = x.shape[1]
    w1 = matrix("w1", w1, None, channels)
    w2 = matrix("w2", w2, channels, w1.shape[0])
    per_channel("b1", b1, w1.shape[0])
    per_channel("b2", b2, channels)
    for name, p in dict(w1=w1, b1=b1, w2=w2, b2=b2).items():
        if p is not None:
            floating(name, p)
        same_device(name, p, x)
    activation("act", act)
    activation("post_act", post_act)
    one_of("gate", gate, reference.GATES)
    return w1, w2


def no_grad_wanted(op: str, **tensors: Tensor | None) -> None:
    """An inference-only path must not be asked for gradients it does not have."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"{op} is for inference and has no derivative: wanted {name} without"
                f" requires_grad (or torch.no_grad()), got one that requires grad; for gradients"
                f" use fusedres.ConvBNAct2d, or conv2d and fusedres.functional.batch_norm_act"
            )
