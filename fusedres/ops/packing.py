"""Convolution weights with batch norm folded in, laid out by oneDNN for this CPU: the cache.

An entry belongs to one weight tensor and lives as long as it does. It is used only while every
tensor it was made from is the same object at the same version with the same fingerprint: a
training step, ``load_state_dict`` or any in-place write makes a new one. Writes through ``.data``
bypass autograd's version counter, and tensors made in inference mode have none; the fingerprint
catches the writes that touch a whole filter, input channel or tap.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .convolution import Geometry

_SIZES_KEPT = 4  # input sizes that one weight is packed for


@dataclass
class _Entry:
    stamp: tuple
    packed: dict = field(default_factory=dict)  # by dtype, eps and geometry, then by input size


_cache = WeakTensorKeyDictionary()
_lock = threading.Lock()


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
    weight: Tensor, sources: tuple[Tensor | None, ...], eps: float,
    x: Tensor, dtype: torch.dtype, geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The folded weight, packed for inputs like ``x`` computed in ``dtype``, and the folded bias.

    Args:
        sources: (conv bias, bn weight, bn bias, running mean, running variance).
    """
    tensors = (weight, *sources)
    stamp = _stamp(tensors)
    if stamp is None:
        return _pack(tensors, eps, x, dtype, geometry)
    stride, padding, dilation, groups = geometry
    kind = dtype, eps, *stride, *padding, *dilation, groups
    with _lock:
        entry = _cache.get(weight)
        if entry is None or entry.stamp != stamp:
            entry = _cache[weight] = _Entry(stamp)
        sizes = entry.packed.setdefault(kind, {})
        packed = sizes.get(x.shape)
        if packed is None and len(sizes) < _SIZES_KEPT:
            packed = sizes[x.shape] = _pack(tensors, eps, x, dtype, geometry)
        elif packed is None:
            # oneDNN takes a weight packed for another size, and reorders it where it has to.
            packed = next(reversed(sizes.values()))
    return packed


def _stamp(tensors: tuple[Tensor | None, ...]) -> tuple | None:
    """What must not change while a packed weight is used; None where that cannot be told."""
    weight = tensors[0]
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense or any(t is not None and not t.is_contiguous() for t in tensors[1:]):
        return None
    versions = tuple(None if t is None else (id(t), t.data_ptr(), _version(t)) for t in tensors)
    return torch.ops.fusedres_native.fingerprint(*tensors), *versions


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _pack(tensors, eps, x, dtype, geometry) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    weight, bias = fold(*tensors, eps)
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    size = list(x.shape)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, size
    )
    return packed, bias.to(dtype)
