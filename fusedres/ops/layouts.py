"""The layouts of a folded weight that oneDNN wants, one for many sizes of the input.

oneDNN takes a weight that was packed for another size, and can then be twenty times as slow; with a
weight that is not packed it packs it in every call, for about a fifth of the call. So a size is
packed for if it is one of the first, or when it comes again. There are few layouts: as soon as it
is known which one a size wants, no memory is spent on it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .convolution import Geometry

_AT_ONCE = 4  # sizes that are packed for when they come for the first time
_KNOWN = 4096  # sizes that are remembered


class Layouts:
    """Of one weight [O, I, KH, KW] and one geometry.

    Args:
        weight: channels_last; let go while only packed layouts are used.
        bias: [O]
    """

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry):
        self._plain: Tensor | None = weight
        self._bias, self._geometry = bias, geometry
        self._packed: list[Tensor] = []
        self._of_size: dict[torch.Size, Tensor] = {}
        self._seen: set[torch.Size] = set()

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight for inputs of the size of ``x``, and the bias."""
        size = x.shape
        found = self._of_size.get(size)
        return (self._find(size) if found is None else found), self._bias

    def _find(self, size: torch.Size) -> Tensor:
        if len(self._of_size) + len(self._seen) >= _KNOWN:
            self._of_size.clear()
            self._seen.clear()
        if self._plain is None:
            dense = self._packed[0].to_dense()
            self._plain = dense.contiguous(memory_format=torch.channels_last)
        if len(self._of_size) >= _AT_ONCE and size not in self._seen:
            self._seen.add(size)
            return self._plain
        packed = self._of_size[size] = self._pack(size)
        if len(self._of_size) < _AT_ONCE:
            self._plain = None
        return packed

    def _pack(self, size: torch.Size) -> Tensor:
        stride, padding, dilation, groups = self._geometry
        new = torch.ops.mkldnn._reorder_convolution_weight(
            self._plain, padding, stride, dilation, groups, list(size)
        )
        for packed in self._packed:
            if torch.equal(_bytes_of(packed), _bytes_of(new)):
                return packed
        self._packed.append(new)
        return new


def _bytes_of(packed: Tensor) -> Tensor:
    count = torch.ops.mkldnn._nbytes(packed)
    memory = (ctypes.c_uint8 * count).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.uint8)
