"""Products with a weight, in autocast's dtype, and by float32 where the CPU has none in x's.

The detour is ``conv_stats``'s (ops/convolution.py): operands are kept as they came, for a matrix as
an image of one column whose pixels are the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import dispatch
from ..ops import conv_stats
from ..ops.convolution import Geometry, upcasts
from ..ops.define import PLAIN, transformed
from .recognise import is_linear
from .training import NO_PROLOGUE
from .unit import autocasts, in_autocast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``nn.functional.linear`` of a matrix."""
    x, weight, bias = _operands(x, weight, bias)
    plain = weight.dtype == x.dtype and type(weight) in PLAIN and type(x) in PLAIN
    if torch.compiler.is_compiling() or not (plain and upcasts(x) and x.numel()):
        return nn.functional.linear(x, weight, bias)
    image = x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2)
    point = [1, 1], [0, 0], [1, 1], 1
    y = _convolution(image, weight[:, :, None, None], bias, point)
    return y.permute(0, 2, 3, 1).reshape(len(x), -1)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of a layer that may be an nn.Linear: by ``linear`` where that is another way."""
    reduced = torch.get_autocast_dtype("cpu") if dispatch.autocasts(x) else None
    if torch.compiler.is_compiling() or not upcasts(x, reduced) or not is_linear(layer):
        return layer(x)
    return linear(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])


def same_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of x's size."""
    padding = [weight.shape[2] // 2] * 2
    return _convolution(*_operands(x, weight, bias), ([1, 1], padding, [1, 1], 1))


def adds_in_place(*tensors: Tensor) -> bool:
    """Whether the others can be added to the first where that lies: a pass and a tensor less.

    Autocast does not convert the operands of an operation in place, and vmap may have to make its
    result larger.
    """
    plain = len({t.dtype for t in tensors}) == 1 and not dispatch.autocasts(tensors[0])
    return plain and not torch.compiler.is_compiling() and not transformed()


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return conv_stats.op(x, *NO_PROLOGUE, weight, bias, *geometry, False)[0]


def _operands(x: Tensor, weight: Tensor, bias: Tensor | None):
    if not autocasts(x, weight):
        return x, weight, bias
    return in_autocast(x), in_autocast(weight), in_autocast(bias)
