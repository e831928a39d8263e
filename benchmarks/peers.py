"""Executions to compare with, by name; and those of single ops: eager and torch.compile.

Each maker returns a Competitor on the case's own inputs and weights, or raises ``Unavailable`` with
the reason: then the peer is reported as missing, by name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor

from .inspection import inspect
from .measure import Competitor

OURS = "fusedres"
EAGER = "eager channels_last"
EAGER_NCHW = "eager NCHW"
COMPILE = "torch.compile"
MAX_AUTOTUNE = "torch.compile max-autotune"
FREEZING = "torch.compile + freezing"
OPENVINO = "OpenVINO"
ONNXRUNTIME = "onnxruntime"
TENSORRT = "TensorRT"
CUDNN = "cuDNN through torch"
CUDNN_FRONTEND = "cuDNN frontend"
APEX = "apex"
UNSELECTED = "left out of this run (--peers)"


class Unavailable(Exception):
    """A peer cannot run here; the message is the reason."""


Maker = Callable[[], Competitor]


class Choice:
    """Which peers a run asks for, by patterns of their names; every pattern list must agree."""

    def __init__(self, patterns: Sequence[str] = ("*",), reason: str = UNSELECTED):
        self._filters = [(tuple(patterns), reason)]

    def only(self, patterns: Sequence[str], reason: str) -> Choice:
        """The same without the peers that ``patterns`` leave out for ``reason``."""
        narrower = Choice()
        narrower._filters = [*self._filters, (tuple(patterns), reason)]
        return narrower

    def why_not(self, name: str) -> str | None:
        """The reason why a peer is left out, or None."""
        for patterns, reason in self._filters:
            if not any(fnmatch(name, pattern) for pattern in patterns):
                return reason
        return None


ALL = Choice()


def make(makers: Mapping[str, Maker], chosen: Choice) -> tuple[list[Competitor], dict[str, str]]:
    """Those that can run, and why the others cannot."""
    found, missing = [], {}
    for name, maker in makers.items():
        reason = chosen.why_not(name)
        if reason is not None:
            missing[name] = reason
            continue
        try:
            found.append(maker())
        except Unavailable as unavailable:
            missing[name] = str(unavailable)
        except Exception as error:  # another library's builder: its errors have no common class
            line = (str(error).strip() or "no message").splitlines()[0]
            missing[name] = f"it could not be built: {type(error).__name__}: {line}"
    return found, missing


def autocast(device: torch.device, dtype: torch.dtype):
    """Autocast in a reduced precision, or nothing in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def needs_compiler(device: torch.device) -> None:
    """Raises Unavailable where torch.compile cannot run."""
    from torch._inductor import config
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise Unavailable("Triton is not installed")
        return
    compilers = [c for c in config.cpp.cxx if c]
    if not any(shutil.which(c) for c in compilers):
        raise Unavailable(f"no C++ compiler ({', '.join(compilers)})")


def compiled(function: Callable, device: torch.device, mode: str | None = None, **how) -> Callable:
    """``torch.compile`` of a function or module.

    CUDA graphs, where they are used, are this harness's own, for every competitor alike. Two
    compilations of one class that ask for the same would share their code.
    """
    needs_compiler(device)
    return torch.compile(function, mode=mode, **how)


AUTOTUNE_MODE = "max-autotune-no-cudagraphs"


# --- functions of tensors: the ops


def op_call(
    name: str,
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    dy: Tensor | None,
    direction: str,
    dtype: torch.dtype,
    *,
    is_compiled: bool = False,
) -> Competitor:
    """``function(**tensors)`` forward, backward, or both, in one competitor's own buffers.

    Args:
        tensors: those that require grad are differentiated; running statistics are copied.
        dy: the gradient of the result; None for inference.
        direction: "inference", "forward", "backward" or "both".
        dtype: of the autocast region.
    """
    tensors = {k: t.clone() if k.startswith("running_") else t for k, t in tensors.items()}
    wanted = {k: t for k, t in tensors.items() if t.requires_grad}
    first = next(iter(tensors.values()))
    pending: list[Tensor] = []

    def forward() -> Tensor:
        grad = contextlib.nullcontext() if dy is not None else torch.no_grad()
        with autocast(first.device, dtype), grad:
            return function(**tensors)

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(wanted.values()), dy)

    def both() -> tuple[Tensor, ...]:
        return backward(forward())

    def results() -> dict[str, Tensor]:
        y = forward()
        found = {"y": y.detach()}
        if dy is not None:
            found |= {f"d{k}": g for k, g in zip(wanted, backward(y), strict=True)}
        return found

    def keep_graph() -> None:
        pending[:] = [forward()]

    prepare = keep_graph if direction == "backward" else lambda: None
    call = {"both": both, "backward": lambda: backward(pending.pop())}.get(direction, forward)
    saves = dy is not None and direction != "backward"
    look = partial(
        inspect, call, first.shape[0], first.device,
        exclude=parameters(tensors), saves=saves, compiled=is_compiled,
    )  # fmt: skip
    return Competitor(name, call, results, prepare, inspect=look)


def parameters(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that are a layer's, by their names: weights and biases."""
    names = "weight", "bias", "conv_weight", "w1", "b1", "w2", "b2", "running_mean", "running_var"
    return [t for k, t in tensors.items() if k in names]


def compiled_op(name: str, mode: str | None, function, tensors, **how) -> Competitor:
    run = compiled(function, next(iter(tensors.values())).device, mode)
    return op_call(name, run, tensors, **how, is_compiled=True)
