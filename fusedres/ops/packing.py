"""Convolution weights with batch norm folded in, laid out by oneDNN for this CPU: the cache.

Entries belong to the memory of one weight and live as long as it does. One is used only while every
tensor it was made from is the same object at the same version with the same fingerprint: a training
step, ``load_state_dict`` or any in-place write makes a new one. Some writes pass by autograd's
version counter. Those of fused optimizers are looked for in the whole weight after each of their
steps, those through a larger tensor that holds the weight in every call. Of those through ``.data``
or to tensors made in inference mode, the fingerprint sees what touches a whole filter, input
channel or tap.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .convolution import Geometry
from .layouts import Layouts

Tensors = tuple[Tensor | None, ...]  # weight, bias, bn weight and bias, running mean and variance


@dataclass
class _Entry:
    stamp: tuple
    whole: int  # the fingerprint of every value
    steps: int  # of fused optimizers, when that was looked at
    sources: list[weakref.ref]  # to the memory of what was folded in: the entry goes with any of it
    layouts: dict[tuple, Layouts] = field(default_factory=dict)  # by dtype, eps and geometry


# By the memory of a weight, then by where the weight is in it and the tensors folded into it. Not
# by the tensor: torch.utils.swap_tensors refuses one that has weak references.
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()
_fused_steps = 0


def _count_fused_steps(optimizer, args, kwargs) -> None:
    global _fused_steps
    if any(group.get("fused") for group in optimizer.param_groups):
        _fused_steps += 1


register_optimizer_step_post_hook(_count_fused_steps)


def fold(weight, bias, bn_weight, bn_bias, mean, var, eps) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv, then batch norm; in float64."""
    scale = torch.rsqrt(var.double() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.double()
    return weight.double() * scale.view(-1, 1, 1, 1), shift


def folded_and_packed(
    weight: Tensor, sources: Tensors, eps: float, x: Tensor, dtype: torch.dtype, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """The folded weight, packed for inputs like ``x`` computed in ``dtype``, and the folded bias.

    Args:
        sources: (conv bias, bn weight, bn bias, running mean, running variance).
    """
    tensors = weight, *sources
    if not all(map(_has_fingerprint, tensors)):
        return _layouts(tensors, eps, dtype, geometry).like(x)
    stride, padding, dilation, groups = geometry
    kind = dtype, eps, *stride, *padding, *dilation, groups
    with _lock:
        layouts = _entry_of(tensors).layouts
        if kind not in layouts:
            layouts[kind] = _layouts(tensors, eps, dtype, geometry)
        return layouts[kind].like(x)


def _layouts(tensors: Tensors, eps: float, dtype: torch.dtype, geometry: Geometry) -> Layouts:
    weight, bias = fold(*tensors, eps)
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return Layouts(weight, bias.to(dtype), geometry)


def _entry_of(tensors: Tensors) -> _Entry:
    """What was made from these tensors as they are, or a new entry in its place."""
    weight = tensors[0]
    memory = weight.untyped_storage()
    shares = memory.nbytes() != weight.numel() * weight.element_size()
    versions = (None if t is None else (t.data_ptr(), _version(t)) for t in tensors)
    stamp = _fingerprint(tensors, whole=shares), *versions
    entries = _cache.setdefault(memory, {})
    key = weight.data_ptr(), *(None if t is None else id(t) for t in tensors)
    entry = entries.get(key)
    if entry is not None and entry.stamp == stamp:
        if entry.steps == _fused_steps or entry.whole == _fingerprint(tensors, whole=True):
            entry.steps = _fused_steps
            return entry
    for dead in [k for k, e in entries.items() if not all(ref() is not None for ref in e.sources)]:
        del entries[dead]
    sources = [weakref.ref(t.untyped_storage()) for t in tensors[1:] if t is not None]
    entries[key] = _Entry(stamp, _fingerprint(tensors, whole=True), _fused_steps, sources)
    return entries[key]


def _has_fingerprint(t: Tensor | None) -> bool:
    if t is None or t.is_contiguous():
        return True
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _fingerprint(tensors: Tensors, whole: bool) -> int:
    return torch.ops.fusedres_native.fingerprint(*tensors, whole)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version
