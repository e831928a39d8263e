"""What a module means to the fused ops, or the reason they cannot stand in for it.

Every function returns the parameters of a module whose ``forward`` is known to the letter, or a
sentence that says why it must run as it is: hooks that would not be called, a subclass with a
forward of its own, a layer without a fused form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.convolution import Geometry


@dataclass(frozen=True)
class Norm:
    """A batch norm: per-channel parameters, and which statistics its mode calls for."""

    module: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_stats: bool


@dataclass(frozen=True)
class NormPart:
    """The norm alone of a batch norm module that also activates (timm's BatchNormAct2d).

    Whoever takes a module apart has looked at its hooks and at what follows the norm in it.
    """

    module: nn.BatchNorm2d

    def __call__(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self.module, x)


@dataclass(frozen=True)
class SE:
    """A squeeze-excite MLP; effective squeeze-excite has one layer, w2 is None."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    act: str
    gate: str
    pool: str = "mean"  # or "mean_max": half the mean and half the largest value

    @property
    def has_op(self) -> bool:
        """Whether ``squeeze_excite`` and ``bn_se_act`` compute it."""
        return self.w2 is not None and self.pool == "mean"


# As they were when this library was imported: a forward that is replaced on the class is no less
# another one than that of a subclass.
_CONV, _CONV_FORWARD = nn.Conv2d.forward, nn.Conv2d._conv_forward
_LINEAR = nn.Linear.forward
_NORM, _SYNC_NORM = _BatchNorm.forward, nn.SyncBatchNorm.forward

_ACTS: dict[type, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


_ACT_FORWARDS = {kind: kind.forward for kind in (*_ACTS, nn.LeakyReLU, nn.GELU)}


def symbolic(x) -> bool:
    """Whether x is traced: graphs of FX and TorchScript are for tools that know PyTorch's ops."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


def hooked(module: nn.Module) -> str | None:
    """A reason when a fused call would leave out a hook of ``module``, or read it too often."""
    if _global_hooks():
        return "global module hooks are set"
    if "parametrizations" in module._modules:  # each read of a weight computes it anew
        return f"{type(module).__name__} is parametrized"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{type(module).__name__} has hooks"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return f"{type(module).__name__} has a patched forward"
    return None


def only_listens(hook: Callable) -> Callable:
    """Mark a global module hook that may miss the modules inside a fused call."""
    hook.only_listens = True
    return hook


def _global_hooks() -> bool:
    # Not _has_any_global_hook(): it also counts the flags of hooks that have been removed.
    m = torch.nn.modules.module
    kinds = (
        m._global_forward_hooks,
        m._global_forward_pre_hooks,
        m._global_backward_hooks,
        m._global_backward_pre_hooks,
    )
    if not any(kinds):  # as nearly always, and asked of every module in every call
        return False
    return any(not hasattr(hook, "only_listens") for hooks in kinds for hook in hooks.values())


def geometry_of(conv: nn.Module) -> Geometry | str:
    """Stride, padding, dilation and groups of a plain 2-d convolution."""
    kind = type(conv)
    if not isinstance(conv, nn.Conv2d):
        return f"{kind.__name__} is not a Conv2d"
    if (reason := _does_more(conv)) is not None:
        return reason
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    padding = conv.padding
    if isinstance(padding, str):
        padding = _padding_of_name(conv)
        if padding is None:
            return "padding='same' with an even kernel is not symmetric"
    stride, padding, dilation = (_pair(v) for v in (conv.stride, padding, conv.dilation))
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return "its stride, padding or dilation is out of range"
    return stride, padding, dilation, conv.groups


def _does_more(conv: nn.Conv2d) -> str | None:
    kind = type(conv)
    if kind.forward is not _CONV or kind._conv_forward is not _CONV_FORWARD:
        return f"{kind.__name__} has a forward of its own"
    return hooked(conv)


def is_linear(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` is ``nn.functional.linear`` and no more."""
    return type(layer) is nn.Linear and nn.Linear.forward is _LINEAR and hooked(layer) is None


def _pair(value: Sequence[int]) -> list[int]:
    return [*value, *value] if len(value) == 1 else list(value)


def _padding_of_name(conv: nn.Conv2d) -> list[int] | None:
    if conv.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def norm_of(norm: nn.Module | NormPart) -> Norm | str:
    """The parameters of a batch norm with the semantics of nn.BatchNorm2d."""
    if isinstance(norm, NormPart):
        return _batch_norm(norm.module)
    kind = type(norm)
    if (reason := hooked(norm)) is not None:
        return reason
    if kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc":
        return Norm(
            norm, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, False
        )
    plain = isinstance(norm, nn.BatchNorm2d) and kind.forward is _NORM
    if isinstance(norm, nn.SyncBatchNorm) and kind.forward is _SYNC_NORM:
        if norm.training or norm.running_mean is None:
            return "SyncBatchNorm takes its statistics across processes in training"
    elif not plain:
        return f"{kind.__name__} is not a batch norm of this library or PyTorch"
    return _batch_norm(norm)


def _batch_norm(norm: nn.Module) -> Norm | str:
    has_stats = norm.running_mean is not None and norm.running_var is not None
    batch_stats = norm.training or not has_stats
    if not norm.eps >= 0 or (batch_stats and norm.eps == 0):
        return f"PyTorch refuses eps={norm.eps}"
    return Norm(
        norm, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, batch_stats
    )


def act_of(act: nn.Module | str | None) -> str | None:
    """The name of an activation the kernels have; None for one that must run by itself."""
    if act is None or isinstance(act, str):
        return act or "identity"
    if hooked(act) is not None or type(act).forward is not _ACT_FORWARDS.get(type(act)):
        return None
    if type(act) is nn.LeakyReLU and act.negative_slope == 0.01:
        return "leaky_relu"
    if type(act) is nn.GELU and act.approximate == "none":
        return "gelu"
    return _ACTS.get(type(act))


def se_of(se: nn.Module) -> SE | str:
    """The MLP of a squeeze-excite module, which tells it by ``squeeze_excite_parts()``."""
    kind = type(se)
    if not hasattr(kind, "squeeze_excite_parts"):
        return f"{kind.__name__} is not a squeeze-excite with a fused form"
    known = next(c for c in kind.__mro__ if "squeeze_excite_parts" in vars(c))
    if kind.forward is not known.forward:
        return f"{kind.__name__} has a forward of its own"
    return hooked(se) or se.squeeze_excite_parts()


def not_pointwise(layer: nn.Module) -> str | None:
    """A reason when a layer is more than a product with a matrix of channels."""
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.padding != (0, 0):
        return f"{type(layer).__name__} is not a plain 1x1 convolution"
    if not layer.kernel_size == layer.stride == (1, 1):
        return f"{type(layer).__name__} is not a plain 1x1 convolution"
    return _does_more(layer)


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
