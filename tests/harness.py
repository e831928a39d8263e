"""Runs an op against the reference: values, gradients, memory formats, bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from accuracy import assert_as_accurate_as_eager
from fusedres import reference

Tensors = dict[str, "Tensor | None"]


def gradients(
    fn: Callable[..., Tensor], tensors: Tensors, dy: Tensor | None = None, constants: Iterable = ()
) -> dict[str, Tensor]:
    """``fn``'s result as "y", and the gradient of every tensor not among ``constants`` as "d<name>"."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name not in constants)
        for name, t in tensors.items()
    }
    y = fn(**leaves)
    dy = gradient_like(y) if dy is None else dy
    wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def gradient_like(y: Tensor) -> Tensor:
    """The same random gradient for every execution of a test, in every thread."""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(11))
    return torch.empty_like(y).copy_(noise.to(y.dtype))


def double(tensors: Tensors) -> Tensors:
    return {n: None if t is None else t.detach().double() for n, t in tensors.items()}


def check(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: Tensors,
    *,
    constants: Iterable = (),
    sums: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """Values, gradients, format and untouched inputs of ``fused`` against ``plain``'s.

    Args:
        sums: how many elements a gradient is a sum of, by the name of its tensor.
    """
    before = copy.deepcopy(tensors)
    versions = {n: t._version for n, t in tensors.items() if t is not None}
    poison_free_memory(tensors)
    out = gradients(fused, tensors, constants=constants)
    for name, t in tensors.items():
        if t is not None:
            assert t._version == versions[name], f"{name} was written to"
            assert same_bits(t, before[name]), f"{name} has changed"
    eager = gradients(plain, tensors, constants=constants)
    dy = gradient_like(eager["y"]).double()
    ref = gradients(plain, double(tensors), dy, constants=constants)
    assert out.keys() == eager.keys()
    assert_same_format(out["y"], eager["y"])
    acc = reference.acc_dtype(eager["y"].dtype)
    for name, value in out.items():
        count = (sums or {}).get(name[1:], 1)
        if acc == torch.float64:
            # The reference has eager's own roundings here, so eager's error reads as zero: what
            # follows from the sums is given their floor.
            count = max(count, *(sums or {"": 1}).values())
        found = value, eager[name]
        if torch.finfo(value.dtype).eps < torch.finfo(acc).eps:
            found = tuple(t.to(acc) for t in found)  # float32 sums, handed out as float64
        assert_as_accurate_as_eager(
            found[0], ref[name], found[1], gradient=name != "y", count=count, name=name
        )
    return out


def check_derivatives(
    fn: Callable[..., Tensor], tensors: Tensors, constants: Iterable = ()
) -> None:
    """First and second derivatives against finite differences, in float64, in random directions."""
    names = [n for n, t in tensors.items() if t is not None and n not in constants]
    fixed = {n: t for n, t in tensors.items() if n not in names}
    inputs = [tensors[n].detach().requires_grad_() for n in names]

    def of_inputs(*args):
        return fn(**dict(zip(names, args, strict=True)), **fixed)

    torch.autograd.gradcheck(of_inputs, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(of_inputs, inputs, fast_mode=True)


def poison_free_memory(tensors: Tensors) -> None:
    """Leave NaN in the memory that the allocator is about to hand out, scratch space included."""
    for t in tensors.values():
        if t is not None:
            held = [torch.full_like(t, float("nan")) for _ in range(3)]
            del held


def assert_same_format(out: Tensor, eager: Tensor) -> None:
    """The strides PyTorch's own result has (of dimensions whose stride means anything)."""
    if out.numel():
        strides = [
            [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (out, eager)
        ]
        assert strides[0] == strides[1], f"strides {out.stride()}, PyTorch's {eager.stride()}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of shape, dtype and bits: NaN equals NaN, 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), f"{name} differs"


def assert_same_at_any_thread_count(fn: Callable[..., Tensor], tensors: Tensors, **kwargs) -> None:
    """Bitwise equal from run to run, with 1, 2 and 3 threads."""
    first = gradients(fn, tensors, **kwargs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(gradients(fn, tensors, **kwargs), first)


def assert_same_non_finite(out: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """NaN, Inf and -Inf stand exactly where PyTorch has them."""
    assert out.keys() == eager.keys()
    for name in out:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            found, wanted = kind(out[name]), kind(eager[name])
            assert torch.equal(found, wanted), f"{name}: {kind.__name__}"


class Unchanged:
    """Asserts that an error left everything as it was."""

    def __init__(self, *things):
        self._things = [t for t in things if t is not None]
        self._before = [self._values(t) for t in self._things]

    @staticmethod
    def _values(thing) -> dict[str, Tensor]:
        if isinstance(thing, torch.nn.Module):
            return {n: t.clone() for n, t in thing.state_dict().items()}
        return {"": thing.detach().clone()}

    def __enter__(self) -> Unchanged:
        return self

    def __exit__(self, *exc) -> None:
        for thing, before in zip(self._things, self._before, strict=True):
            assert_same_bits(self._values(thing), before)
