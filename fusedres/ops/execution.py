"""How an op is carried out on a GPU: its launchers, its plan, launches that are refused.

Observers hear how many kernels were launched; on a CPU an op is one call, which ``define`` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from .. import dispatch, observers, triton_kernels
from .. import native as library


@dataclass(frozen=True)
class Traffic:
    """What one call of an op costs: bytes of memory moved, by us and by eager, and flops."""

    bytes_moved: Callable[..., int]
    eager_bytes: Callable[..., int]
    flops: Callable[..., int]
    launches: int = 1
    # Of the CUDA kernels that keep tiles on the chip: how many they are, and the bytes that saves.
    held: tuple[int, Callable[..., int]] | None = None

    def moved(self, launches: int, *args) -> int:
        """The bytes that so many CUDA kernels move."""
        saved = 0
        if self.held is not None and launches == self.held[0]:
            saved = self.held[1](*args)
        return self.bytes_moved(*args) - saved


@dataclass(frozen=True)
class OwnKernel:
    """The library's CUDA kernel of a composed op, a convolution."""

    schema: str  # the op's, with ``int variant`` behind it
    convolution: Callable[..., tuple]  # x, weight and geometry among the op's arguments


@dataclass(frozen=True)
class Spec:
    """What ``on_triton`` and ``natively`` need of an op: ``define``'s arguments."""

    name: str
    traffic: Traffic | None
    composed: Callable | None
    fused_traffic: Traffic | None
    reference: Callable | None
    own: OwnKernel | None
    native: Callable | None

    def own_kernel(self, args: tuple) -> tuple[Callable[[int], object] | None, str | None]:
        """Runs a composed op's own CUDA kernel in a variant; or None, and why it cannot run."""
        reason = dispatch.own_kernel_reason(self.name, args[0])
        return (partial(self.native, *args) if reason is None else None), reason


def on_cpu(native: Callable, name: str, *args):
    """The library's CPU kernels."""
    try:
        return native(*args)
    except RuntimeError as error:
        raise library.explained(name, args[0], error) from None


def launched(
    told: observers.Event | None,
    traffic: Traffic | None,
    native: Callable,
    run: Callable,
    name: str,
    x: Tensor,
    *args,
):
    """The library's CUDA kernels; where a launch is refused, ``run`` on the next backend."""
    before = library.cuda_launches() if told else 0
    try:
        result = native(*args)
    except RuntimeError as error:
        dispatch.hand_over(name, x, library.explained(name, x, error))
        return run(*args)
    if told:
        count = library.cuda_launches() - before
        observers.notify(replace(told, launches=count, bytes_moved=traffic.moved(count, *args)))
    return result


def goes_by_plan(op: Spec, choice: dispatch.Choice, x: Tensor) -> bool:
    """Whether a plan decides who runs the op on the chosen backend."""
    if op.composed is None:
        return False
    natively = op.own is not None and choice.backend == "native" and x.device.type == "cuda"
    return natively or (choice.backend == "triton" and triton_kernels.has(op.name))


def plan(op: Spec, choice: dispatch.Choice, args: tuple):
    """Who runs a composed op on the chosen backend, as a ``kernels.ways.Plan``."""
    kernel, reason = op.own_kernel(args)
    if choice.backend == "native":
        by_name = dispatch.forced_backend() == "native"
        return triton_kernels.ways().native_plan(
            kernel, reason, *op.own.convolution(*args), by_name
        )
    return triton_kernels.plan(op.name, partial(_unobserved, op.composed, *args), kernel, args)


def natively(op: Spec, run: Callable, *args):
    """A composed op's own CUDA kernel or its composition, and tell the observers which."""
    found = plan(op, dispatch.Choice("native"), args)
    told = None
    if observers.observed():
        traffic = op.traffic if found.run is None else op.fused_traffic
        told = event(op.name, traffic, dispatch.Choice(found.by, found.why), args)
    if found.run is not None:
        return launched(
            told, op.fused_traffic, lambda *_: found.run(), run, op.name, args[0], *args
        )
    if told:
        observers.notify(told)
    return op.composed(*args)


def on_triton(op: Spec, choice: dispatch.Choice, *args):
    """Run the op by its launcher, or as its plan says, and tell the observers of it."""
    traffic, observed = op.traffic, observers.observed() and op.traffic is not None
    if op.composed is None:
        kernel = partial(triton_kernels.launcher(op.name), *args)
    else:
        found = plan(op, choice, args)
        choice, kernel = dispatch.Choice(found.by, found.why), found.run
        traffic = op.traffic if kernel is None else op.fused_traffic
    if kernel is None:  # its parts speak for themselves
        if observed:
            observers.notify(event(op.name, traffic, choice, args))
        return op.composed(*args)
    if not observed:
        return _or_next(op, kernel, choice, args)[0]
    with triton_kernels.counted() as kernels:
        result, choice = _or_next(op, kernel, choice, args)
    told = event(op.name, traffic, choice, args)
    observers.notify(replace(told, launches=len(kernels)) if kernels else told)
    return result


def _or_next(op: Spec, kernel: Callable, choice: dispatch.Choice, args: tuple) -> tuple:
    """What ``kernel`` returns, or another backend where the GPU cannot run it; and which it was."""
    try:
        return kernel(), choice
    except triton_kernels.misfits() as error:
        # Where Triton was chosen for its speed the library can run the op too.
        natively = dispatch.choose(op.name, args[0]).backend == "native"
        by, instead = ("native", op.native) if natively else ("reference", op.reference)
        if instead is None or dispatch.forced_backend() is not None:
            raise
        runs = by if natively else "plain PyTorch"
        dispatch.warn_once(f"fusedres runs {runs}: triton: {error}")
        return instead(*args), dispatch.Choice(by, f"triton: {error}")


def _unobserved(fn: Callable, *args):
    with observers.unobserved():
        return fn(*args)


def event(name: str, traffic: Traffic, choice: dispatch.Choice, args: tuple) -> observers.Event:
    """What observers hear of one call."""
    return observers.Event(
        op=name,
        backend=choice.backend,
        reason=choice.reason,
        launches=traffic.launches,
        bytes_moved=traffic.bytes_moved(*args),
        eager_bytes=traffic.eager_bytes(*args),
        flops=traffic.flops(*args),
    )
