"""Chooses the backend that runs an op. The only place that does.

Each backend answers ``can_run(op, x)`` with None, or with the reason it cannot; the first that
can is taken, in the order of ``BACKENDS``, unless the next was measured to be faster.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native, triton_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Ops that are a composition of PyTorch's convolution and another op where no kernel does it all,
# with the op whose kernel they need then.
COMPOSED = {"conv_stats": "bn_act", "conv_bn_act": "bn_act", "conv_grad": "bn_act_backward"}

# What the library implements only where it holds CUDA kernels.
CUDA_ONLY = (*COMPOSED, "cuda_launches")


def _native_can_run(op: str, x: Tensor) -> str | None:
    kind = x.device.type
    if kind == "cuda":
        reason = native.cuda_reason(COMPOSED.get(op, op), x.device.index)
        by_rule = reason is None and op in COMPOSED and forced_backend() != "native"
        if by_rule and _triton_can_run(op, x) is None:
            return "Triton's timer measures who convolves"
        return reason
    if kind != "cpu":
        return f"the library holds kernels for CPUs and NVIDIA GPUs, x is on {kind}"
    return native.load_error()


def own_kernel_reason(op: str, x: Tensor) -> str | None:
    """Why the library's CUDA kernel of a composed op cannot run on ``x``, or None."""
    if x.device.type != "cuda":
        return f"the kernel of {op} runs on NVIDIA GPUs, x is on {x.device.type}"
    if forced_backend() == "triton":
        return "the triton backend was asked for"
    return native.cuda_reason(op, x.device.index)


def _triton_can_run(op: str, x: Tensor) -> str | None:
    if op not in COMPOSED and not triton_kernels.has(op):
        return f"there is no Triton kernel for {op}"
    return triton_kernels.can_run(op, x, by_name=forced_backend() == "triton")


def _reference_can_run(op: str, x: Tensor) -> str | None:
    return None


BACKENDS: dict[str, Callable[[str, Tensor], str | None]] = {
    "native": _native_can_run,
    "triton": _triton_can_run,
    "reference": _reference_can_run,
}


@dataclass(frozen=True)
class Choice:
    """The backend an op runs on; why each backend before it could not, or what was measured."""

    backend: str
    reason: str | None = None


NATIVE = Choice("native")


class _State(threading.local):
    def __init__(self):
        self.forced: list[str] = []  # by the contexts that this thread is in, the innermost last
        self.threading: list[torch.autograd.set_multithreading_enabled] = []  # theirs
        self.step_by_step = False


_state = _State()
_defaults: list[backend] = []  # the last one's name is the default of the process
_warned: set[str] = set()


def forced_backend() -> str | None:
    """The backend that ``fusedres.backend`` asked for in this thread, or None for auto."""
    if not (_defaults or _state.forced):
        return None
    name = _state.forced[-1] if _state.forced else _default()
    return None if name == "auto" else name


def _default() -> str:
    newest = _defaults[-1:]  # a copy: another thread may withdraw it
    return newest[0].name if newest else "auto"


def by_the_cpu_library(x: Tensor) -> bool:
    """Whether any op on ``x`` is the CPU library's: the short answer to nearly every ``choose``."""
    known = x.device.type == "cpu" and x.dtype in DTYPES and forced_backend() is None
    return known and native.load_error() is None


def choose(op: str, x: Tensor) -> Choice:
    """The backend that runs ``op`` on ``x``.

    Raises:
        TypeError: no backend has this dtype.
        RuntimeError: a backend was asked for by name and cannot run this.
    """
    if by_the_cpu_library(x):
        return NATIVE
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"x: wanted a dtype among {wanted}, got {x.dtype}")
    forced = forced_backend()
    if forced is not None:
        reason = BACKENDS[forced](op, x)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run {op}: {reason}")
        return Choice(forced)
    reasons = []
    for name, can_run in BACKENDS.items():
        reason = can_run(op, x)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if reasons:
        _warn_of_the_choice(name, x, reasons)
    return Choice(name, "; ".join(reasons) or None)


def choose_for(op: str, x: Tensor, native_kernel: Callable | None, args: tuple) -> Choice:
    """``choose``; between the library's CUDA kernel and Triton's the faster, where it was measured.

    Args:
        native_kernel: of the library, run with the op's ``args``; None if it is no rival of Triton.
    """
    choice = choose(op, x)
    if choice.backend == "native" and native_kernel is not None and _contested(op, x):
        return Choice(*triton_kernels.faster(op, x, native_kernel, args))
    return choice


def _contested(op: str, x: Tensor) -> bool:
    """Whether Triton can run what the library can, and measurements may prefer it."""
    if x.device.type != "cuda" or not triton_kernels.decides(x.device.index):
        return False
    return forced_backend() is None and x.numel() > 0 and _triton_can_run(op, x) is None


def hand_over(op: str, x: Tensor, error: RuntimeError) -> None:
    """Take the native backend from ``op`` on the device of ``x``, whose launch ended in ``error``.

    That is safe where the launch was refused: nothing has run, and ops write to nothing of the
    caller's. It is left to the caller where a backend was asked for by name, and while a CUDA graph
    is captured, which a refused launch spoils.

    Raises:
        RuntimeError: ``error``, where the next backend cannot take over.
    """
    safe = native.REFUSED in str(error) and not torch.cuda.is_current_stream_capturing()
    if forced_backend() is not None or not safe:
        raise error
    reason = native.refuse(op, x.device.index, error)
    fix = "after memory was freed, a new process" if "out of memory" in reason else "a new process"
    told = f"fusedres no longer runs {op} natively on {x.device}: {reason}"
    warn_once(f"{told}. Another backend takes over; {fix} tries again")
    # The reference's backward is autograd's own: it needs the reference's forward, the next time.
    if op.endswith("_backward") and choose(op, x).backend == "reference":
        raise error


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x`` (devices like meta have none)."""
    if x.device.type == "cpu":
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _warn_of_the_choice(name: str, x: Tensor, reasons: list[str]) -> None:
    """Say once what a user can mend: no library, a GPU that it or Triton does not cover."""
    told = []
    if x.device.type == "cpu" and name == "reference":
        told = reasons[:1]
    elif x.device.type == "cuda":
        if native.uncovered(x.device.index) is not None:
            told = reasons[:1]
        if name == "reference" and x.dtype != torch.float64:  # float64 belongs there
            told = [*told, reasons[1]]
    if told and not _warned.issuperset(told):
        _warned.update(told)
        runs = "plain PyTorch" if name == "reference" else name
        warn_once(f"fusedres runs {runs}: {'; '.join(told)}")


def has_kernel(op: str, x: Tensor, instead: str) -> bool:
    """Whether ``op`` is as good a choice as ``instead``: both have a kernel for ``x``, or none."""
    if torch.compiler.is_compiling():  # which traces no look-up of libraries
        return x.device.type == "cpu"
    return _runs_on_a_kernel(op, x) or not _runs_on_a_kernel(instead, x)


def as_one_node(ops: Iterable[str], x: Tensor) -> bool:
    """Whether a block that strings ``ops`` together on ``x`` runs as one autograd node.

    It does where each has a kernel for its forward and its backward: autograd differentiates the
    reference step by step, and so do a compiler and torch.func, who never ask.
    """
    if _state.step_by_step:
        return False
    kinds = ("",) if x.device.type == "cpu" else ("", "_backward")
    return all(_runs_on_a_kernel(op + kind, x) for op in ops for kind in kinds)


@contextlib.contextmanager
def step_by_step() -> Iterator[None]:
    """Blocks of this thread run as one autograd node a step op, for comparison."""
    before, _state.step_by_step = _state.step_by_step, True
    try:
        yield
    finally:
        _state.step_by_step = before


def _runs_on_a_kernel(op: str, x: Tensor) -> bool:
    """``choose`` without its errors and warnings, which belong to the op that is then called."""
    forced = forced_backend()
    names = BACKENDS if forced is None else (forced,)
    return any(name != "reference" and BACKENDS[name](op, x) is None for name in names)


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class backend(contextlib.ContextDecorator):  # noqa: N801  (used as a function: fusedres.backend)
    """Run every op on one backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    As a function it sets the default of the process; as a context manager it holds for the
    current thread until the end of the block, and then restores what was before. A backward that is
    started inside the block runs in this thread too, on a GPU as well.

    Raises:
        ValueError: the name is not one of the four.
        RuntimeError: (from an op) the named backend cannot run it; the reason is in the message.
    """

    def __init__(self, name: str):
        if name != "auto" and name not in BACKENDS:
            wanted = ", ".join(repr(n) for n in ("auto", *BACKENDS))
            raise ValueError(f"name: wanted one of {wanted}, got {name!r}")
        self.name = name
        _defaults.append(self)

    def _withdraw(self) -> None:
        # Used as a context or a decorator, the choice is not the process's after all.
        with contextlib.suppress(ValueError):
            _defaults.remove(self)

    def __call__(self, function: Callable) -> Callable:
        self._withdraw()
        return super().__call__(function)

    def __repr__(self) -> str:
        return f"fusedres.backend({self.name!r})"

    def __enter__(self) -> backend:
        self._withdraw()
        _state.forced.append(self.name)
        _state.threading.append(torch.autograd.set_multithreading_enabled(False))
        return self

    def __exit__(self, *exc) -> None:
        _state.forced.pop()
        _state.threading.pop().__exit__(None, None, None)


def backends() -> dict[str, str | None]:
    """Every backend: None when it is available here, else the reason it is not."""
    return {name: available_on(name)[1] for name in BACKENDS}


def available_on(name: str) -> tuple[torch.device | None, str | None]:
    """A device of this machine that backend ``name`` runs on; or None, and the reason."""
    reason = None
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        probe = torch.empty(0, device=device)
        reason = BACKENDS[name]("bn_act", probe)
        if reason is None:
            return probe.device, None
    return None, reason
