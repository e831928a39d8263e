"""Bytes and flops of single kernels, from the ops' own ``bytes_moved`` and ``flops``.

The formulas are called with tensors on the meta device, which have shapes and dtypes but no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.layout import mask_shape
from fusedres.ops import bn_act, bn_se_act, conv_bn_act, conv_stats, residual_add, squeeze_excite
from fusedres.ops.define import Op

from .networks import Conv, Network, Shape

EPS = 1e-5


@dataclass(frozen=True)
class Kernel:
    """One pass over its operands. ``op`` is the library's name for it where it has one."""

    op: str
    flops: int
    bytes: int


class Costs:
    """What each kernel costs for a batch of ``batch`` in ``dtype``."""

    def __init__(self, batch: int, dtype: torch.dtype):
        self.batch, self.dtype = batch, dtype

    def tensor(self, shape: Shape) -> Tensor:
        made = torch.empty((self.batch, *shape), dtype=self.dtype, device="meta")
        return made.to(memory_format=torch.channels_last)

    def bytes(self, shape: Shape) -> int:
        """One activation, read or written once."""
        return self.tensor(shape).nbytes

    def bits(self, shape: Shape) -> int:
        """A mask of one bit an element."""
        return torch.empty(mask_shape(self.tensor(shape)), dtype=torch.uint8, device="meta").nbytes

    def weight(self, c: Conv) -> Tensor:
        return torch.empty(c.weight, dtype=self.dtype, device="meta")

    def _mlp(self, channels: int, squeeze: int) -> tuple[Tensor, None, Tensor, None]:
        w1 = torch.empty((squeeze, channels), device="meta")
        return w1, None, w1.mT, None

    # --- convolutions

    def conv(self, c: Conv) -> Kernel:
        """Forward, the operand read and the result written once."""
        geometry = [c.stride] * 2, [c.padding] * 2, [1, 1], c.groups
        before = None, None, None, None, False, EPS, "identity"
        args = self.tensor(c.x), *before, self.weight(c), None, *geometry, True
        return _kernel("conv_stats", conv_stats.op, args)

    def dgrad(self, c: Conv, *extra: int) -> Kernel:
        """The gradient of the operand: the same traffic the other way round."""
        forward = self.conv(c)
        return Kernel("conv_grad", forward.flops, forward.bytes + sum(extra))

    def wgrad(self, c: Conv, *extra: int) -> Kernel:
        """The gradient of the weight: reads both activations, writes it in float32."""
        operands = self.bytes(c.x) + self.bytes(c.y) + 4 * self.weight(c).numel()
        return Kernel("wgrad", self.conv(c).flops, operands + sum(extra))

    def conv_bn_act(self, c: Conv, residual: bool, act: str = "relu") -> Kernel:
        geometry = [c.stride] * 2, [c.padding] * 2, [1, 1], c.groups
        other = self.tensor(c.y) if residual else None
        norm = None, None, None, None, EPS
        args = self.tensor(c.x), self.weight(c), None, other, *norm, *geometry, act
        return _kernel("conv_bn_act", conv_bn_act.op, args)

    # --- batch norm, squeeze-excite and what follows them

    def stats(self, y: Shape) -> Kernel:
        return _kernel("bn_stats", bn_act.stats_op, (self.tensor(y),))

    def tail(
        self, y: Shape, squeeze: int = 0, *, residual: bool, act: str = "relu", mask: bool = False,
        batch_stats: bool = True, stats_given: bool = False, eager: bool = False,
    ) -> Kernel:  # fmt: skip
        """Batch norm, squeeze-excite if ``squeeze``, addition and activation, forward."""
        x, other = self.tensor(y), self.tensor(y) if residual else None
        stats = (torch.empty(y[0], device="meta"),) * 2 if stats_given else (None, None)
        if squeeze:
            mlp = self._mlp(y[0], squeeze)
            names = "relu", "sigmoid", act
            args = x, None, None, *mlp, other, *stats, batch_stats, EPS, *names, mask
            return _kernel("bn_se_act", bn_se_act.op, args, eager)
        args = x, None, None, other, *stats, batch_stats, EPS, act, mask
        return _kernel("bn_act", bn_act.op, args, eager)

    def tail_backward(
        self, y: Shape, squeeze: int = 0, *, mask: bool, dresidual: bool, act: str = "relu",
        eager: bool = False,
    ) -> Kernel:  # fmt: skip
        x = self.tensor(y)
        bits = torch.empty(self.bits(y) if mask else 0, dtype=torch.uint8, device="meta")
        if squeeze:
            w1 = self._mlp(y[0], squeeze)[0]
            names = "relu", "sigmoid", act
            kept = *[None] * 5, bits  # mean, var, and what the MLP left
            args = x, x, None, None, w1, None, None, *kept, True, EPS, *names, dresidual
            return _kernel("bn_se_act_backward", bn_se_act.backward_op, args, eager)
        args = x, x, None, None, None, None, None, bits, True, EPS, act, dresidual
        return _kernel("bn_act_backward", bn_act.backward_op, args, eager)

    def projected_tail(self, y: Shape) -> list[Kernel]:
        """Forward and backward where the shortcut's raw result has a batch norm of its own."""
        x, mask = self.tensor(y), torch.empty(self.bits(y), dtype=torch.uint8, device="meta")
        norm = *[None] * 2, *[torch.empty(y[0], device="meta")] * 2
        numbers = True, True, EPS, EPS, "relu"
        forward = x, *norm, x, *norm, None, *numbers, True, False
        backward = x, x, *norm, x, *norm, None, mask, *numbers, True, True, True
        return [
            _kernel("residual_add", residual_add.op, forward),
            _kernel("residual_add_backward", residual_add.backward_op, backward),
        ]

    def squeeze_excite(self, y: Shape, squeeze: int) -> Kernel:
        """Squeeze-excite with residual and ReLU on a finished batch norm, in inference."""
        x = self.tensor(y)
        args = x, *self._mlp(y[0], squeeze), x, "relu", "sigmoid", "relu", False
        return _kernel("squeeze_excite", squeeze_excite.op, args)

    # --- the ends of the network

    def max_pool(self, net: Network, index_bytes: int = 0) -> Kernel:
        pooled = self.batch * torch.Size(net.pooled).numel()
        moved = self.bytes(net.stem.y) + self.bytes(net.pooled) + index_bytes * pooled
        return Kernel("max_pool", 0, moved)

    def classifier(self, net: Network, train: bool) -> Kernel:
        """Mean over the pixels and the last layer; in training forward and backward."""
        weights = net.features[0] * net.classes
        flops = 2 * self.batch * weights
        size = self.dtype.itemsize
        if not train:
            return Kernel("classifier", flops, self.bytes(net.features) + size * weights)
        return Kernel(
            "classifier", 3 * flops, 2 * self.bytes(net.features) + (2 * size + 4) * weights
        )


def _kernel(name: str, op: Op, args: tuple, eager: bool = False) -> Kernel:
    moved = op.traffic.eager_bytes if eager else op.traffic.bytes_moved
    return Kernel(name, op.traffic.flops(*args), moved(*args))
