"""How an op of this library is made known to PyTorch.

Every op has one schema under two names: ``fusedres::op`` is what the library calls, with fake
kernel, autograd and the choice of a backend in Python; ``fusedres_native::op`` is what the
compiled library implements. Both exist on a machine without the compiled library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch, observers, triton_kernels
from . import execution
from .execution import OwnKernel, Spec, Traffic

_public = torch.library.Library("fusedres", "DEF")
_native = torch.library.Library("fusedres_native", "DEF")
_native.define("cpu_isa() -> int")
_native.define("cuda_inside() -> str")
_native.define("cuda_launches() -> int")
_native.define(
    "fingerprint(Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor mean,"
    " Tensor var, bool whole) -> int"
)

PLAIN = (Tensor, torch.nn.Parameter)  # not wrapped, and with nothing of its own to say


@dataclass(frozen=True)
class Op:
    """A defined op, to be called with positional arguments.

    Plain tensors take the short way, straight to ``run`` or its autograd.Function: PyTorch's
    dispatcher costs 50 to 100 microseconds a call for an op that is written in Python. Whatever
    traces or wraps tensors (torch.compile, export, fake tensors) goes through the dispatcher.
    Inside torch.func's transforms and forward-mode differentiation an op is what it means: plain
    PyTorch.
    """

    dispatched: Callable
    run: Callable
    meaning: Callable | None
    function: type[torch.autograd.Function] | None
    spec: Spec

    def __call__(self, *args):
        graded, plain = False, not torch.compiler.is_compiling()
        for a in args:
            if isinstance(a, Tensor):
                graded = graded or a.requires_grad
                plain = plain and type(a) in PLAIN
        if not plain:
            return self.dispatched(*args)
        if self.meaning is not None and (transformed() or torch._C._is_tracing()):
            return self.meaning(*args)
        if not (graded and torch.is_grad_enabled()):
            return self.run(*args)
        if self.function is None:  # statistics: the op that uses them differentiates through them
            with torch.no_grad():
                return self.run(*args)
        return self.function.apply(*args)

    @property
    def traffic(self) -> Traffic | None:
        return self.spec.traffic

    def planned(self, x: Tensor) -> bool:
        """Whether a measured plan decides who runs this composed op on ``x``."""
        return execution.goes_by_plan(self.spec, dispatch.choose(self.spec.name, x), x)

    def in_parts(self, *args) -> bool:
        """Whether the plan leaves the op to the ops that it is made of."""
        return execution.plan(self.spec, dispatch.choose(self.spec.name, args[0]), args).run is None


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation wants more of an op than a backward."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def define(
    schema: str,
    *,
    fake: Callable,
    reference: Callable | None = None,
    traffic: Traffic | None = None,
    composed: Callable | None = None,
    fused_traffic: Traffic | None = None,
    own: OwnKernel | None = None,
    describe: Callable[..., dispatch.Choice] | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Op:
    """Define one op. Its first argument is a tensor, which decides on the backend.

    Args:
        schema: The op's schema without namespace.
        fake: Shapes, dtypes and strides of the results.
        reference: Plain PyTorch with the op's arguments and results, for the reference backend.
            A backward op has none: there the backward is autograd's own (``by_reference``).
        traffic: Memory traffic and flops as functions of the op's arguments.
        composed: For an op that is a composition of others: runs it on every backend.
        fused_traffic: Its traffic where one kernel does what other ops do in the composition.
        own: For a composed op: the library's CUDA kernel that does all of it.
        describe: For a composed op: what carries it out for these arguments, and why no better.
        backward, setup_context: The autograd formula, as for ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    _public.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    native = None
    if composed is None or own is not None:
        _native.define(schema if own is None else own.schema)
        native = getattr(torch.ops.fusedres_native, name)
    rival = native if composed is None else None  # a composed op has its plan

    spec = Spec(name, traffic, composed, fused_traffic, reference, own, native)

    def by_the_library(*args):
        return execution.on_cpu(native, name, *args)

    on_cpu = composed or by_the_library

    def run(*args):
        x = args[0]
        if dispatch.by_the_cpu_library(x) and not (observers.observed() or dispatch.autocasts(x)):
            return on_cpu(*args)
        choice = dispatch.choose_for(name, x, rival, args)
        on_triton = choice.backend == "triton" and triton_kernels.has(name)
        natively = not on_triton and execution.goes_by_plan(spec, choice, x)
        on_cuda = choice.backend == "native" and native is not None and x.device.type == "cuda"
        told = None
        if observers.observed() and traffic is not None and not (on_triton or natively):
            told = execution.event(name, traffic, describe(*args) if describe else choice, args)
            if not on_cuda:  # nor Triton: they count what they launch
                observers.notify(told)
        if on_triton:
            kernel = partial(execution.on_triton, spec, choice)
        elif natively:
            kernel = partial(execution.natively, spec, run)
        elif composed is not None:
            kernel = composed
        elif choice.backend == "native":
            if not on_cuda:
                return on_cpu(*args)
            kernel = partial(execution.launched, told, traffic, native, run, name, x)
        elif reference is None:
            raise RuntimeError(f"{name}: the reference's backward is autograd's own")
        else:
            kernel = reference
        if not dispatch.autocasts(x):
            return kernel(*args)
        # Autocast has done its casts before an op is called; inside they would be wrong.
        with torch.autocast(x.device.type, enabled=False):
            return kernel(*args)

    for key in ("CPU", "CUDA", "XPU", "MPS"):
        _public.impl(name, run, key)
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_public)
    dispatched = getattr(torch.ops.fusedres, name)
    meaning = composed or reference
    if backward is None:
        return Op(dispatched, run, meaning, None, spec)
    torch.library.register_autograd(
        f"fusedres::{name}", backward, setup_context=setup_context, lib=_public
    )

    def run_and_save(ctx, *args):
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    # Not with setup_context: PyTorch then inspects the signature, 50 to 80 us a call.
    parts = {"forward": staticmethod(run_and_save), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), parts)
    return Op(dispatched, run, meaning, function, spec)


def vjp(fn: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor) -> list:
    """Gradients of ``fn(*inputs)`` by autograd; differentiable again while gradients are on.

    This is the backward of the reference backend, and of every backend when a graph of the
    backward is wanted (double backward): the op's meaning is differentiated, not its kernel.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where one input was computed from another (or is it), the derivative by each is
        # through its own place in fn alone. The path between them is the caller's graph's.
        inputs = [
            None if t is None else t.view_as(t) if differentiable else t.detach() for t in inputs
        ]
        for t, need in zip(inputs, needed, strict=True):
            if need and not t.requires_grad:
                t.requires_grad_()
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        y = fn(*inputs)
        grads = torch.autograd.grad(
            y, wanted, dy, create_graph=differentiable, materialize_grads=True
        )
    grads = iter(grads)
    return [next(grads) if need else None for need in needed]


def by_reference(name: str, x: Tensor) -> bool:
    """Whether the backward of op ``name`` is to be autograd's derivative of the reference."""
    if torch.is_grad_enabled() or dispatch.choose(name, x).backend == "reference":
        return True
    backward = f"{name}_backward"
    if x.device.type == "cpu" or not hasattr(torch.ops.fusedres, backward):
        return False
    return dispatch.choose(backward, x).backend == "reference"


def empty_mask(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def numel_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
