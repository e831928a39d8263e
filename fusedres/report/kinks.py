"""How far the gradients of a float64 network move when roundings fall the other way.

A gradient is no continuous function of a network's roundings: a ReLU whose input is within
rounding of zero passes or stops its gradient by chance, and a max-pool picks one of two nearly
equal pixels. One such choice changes the gradients behind it by far more than roundings do.
Here every function with a kink takes its derivative a little to either side of its input: as far
as PyTorch in the tested dtype was off at that place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Names of functions whose derivative jumps, with and without the underscore of the in-place form.
_POINTWISE = {"relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid"}
_POOLS = {"max_pool2d", "_max_pool2d", "adaptive_max_pool2d"}


class Kinks:
    """Records the inputs of kinks in one execution, and moves those of another one to its sides.

    The two must run the same modules in the same order.
    """

    def __init__(self):
        self._recorded: list[Tensor] = []
        self._side = 0.0

    def recording(self) -> TorchFunctionMode:
        """Forward passes inside are the one that is measured."""
        return _Mode(self._record)

    def moving(self) -> TorchFunctionMode:
        """Backward passes of a forward pass inside can be taken on either side."""
        todo = iter(self._recorded)
        return _Mode(lambda name, fn, z: self._move(name, fn, z, next(todo, None)))

    @contextlib.contextmanager
    def side(self, sign: float) -> Iterator[None]:
        """Derivatives in backward passes inside are those on this side; outside, the true ones."""
        self._side = sign
        try:
            yield
        finally:
            self._side = 0.0

    def _record(self, name: str, fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        self._recorded.append(z.detach().clone())  # what follows may overwrite z
        return fn(z)

    def _move(
        self, name: str, fn: Callable[[Tensor], Tensor], z: Tensor, other: Tensor | None
    ) -> Tensor:
        if other is None or other.shape != z.shape or not z.numel():
            return fn(z)
        # The largest error of the tensor: several times that of most elements, in any execution.
        reach = (other.to(z) - z.detach()).abs().max()
        if name in _POOLS:  # neighbours must part: each pixel goes its own way
            random = torch.Generator().manual_seed(0)
            share = 2 * torch.rand(z.shape, generator=random, dtype=z.dtype) - 1
            offset = reach * share.to(z.device)
        else:  # an exact zero (a ReLU of a ReLU) is one in every execution
            offset = torch.where(z.detach() == 0, 0.0, reach)
        return _Moved.apply(z, fn, offset, lambda: self._side)


class _Moved(torch.autograd.Function):
    """``fn(z)`` with the derivative that fn has at ``z + side * offset``."""

    @staticmethod
    def forward(ctx, z, fn, offset, side):
        ctx.save_for_backward(z, offset)
        ctx.fn, ctx.side = fn, side
        return fn(z)

    @staticmethod
    def backward(ctx, dy):
        z, offset = ctx.saved_tensors
        side = ctx.side()
        moved = z.detach() if side == 0 else z + side * offset  # an offset may be infinite
        with torch.enable_grad():
            y = ctx.fn(moved.requires_grad_())
        return torch.autograd.grad(y, moved, dy)[0], None, None, None


class _Mode(TorchFunctionMode):
    """Hands every call of a function with a kink to ``handle(name, fn, input)``."""

    def __init__(self, handle: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]):
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        plain = name.removesuffix("_")
        known = plain in _POINTWISE or (name in _POOLS and not kwargs.get("return_indices"))
        if not known or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        in_place = kwargs.pop("inplace", False) or name != plain
        z, *rest = args
        if plain in _POINTWISE and rest and rest[-1] is True:  # inplace, given by position
            in_place = rest.pop()

        def fn(x: Tensor) -> Tensor:
            return func(x.clone() if name != plain else x, *rest, **kwargs)

        if not in_place:
            return self._handle(plain, fn, z)
        return z.copy_(self._handle(plain, fn, z.clone()))
