"""Executions to compare with: eager, torch.compile, and what other libraries offer.

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
from torch import Tensor, nn
from torch.nn import functional as F

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


def compiled(function: Callable, device: torch.device, mode: str | None = None) -> Callable:
    """CUDA graphs, where they are used, are this harness's own, for every competitor alike."""
    needs_compiler(device)
    return torch.compile(function, mode=mode)


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


def compiled_op(name: str, mode: str | None, function, tensors, *args) -> Competitor:
    run = compiled(function, next(iter(tensors.values())).device, mode)
    return op_call(name, run, tensors, *args, is_compiled=True)


# --- modules: blocks and networks


def _logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def inference(name: str, model: nn.Module, x: Tensor) -> Competitor:
    def call() -> Tensor:
        return _logits(model, x)

    look = partial(inspect, call, x.shape[0], x.device)
    return Competitor(name, call, lambda: {"y": call()}, inspect=look)


def nchw_inference(model: nn.Module, x: Tensor) -> Competitor:
    """In PyTorch's default layout, on a copy of the input in that layout."""
    model = model.to(memory_format=torch.contiguous_format)
    own = x.contiguous()
    found = inference(EAGER_NCHW, model, own)
    return _with_copy(found, own, x)


def _with_copy(found: Competitor, own: Tensor, x: Tensor) -> Competitor:
    """Before each call the competitor's own copy of the input gets the present values."""

    def prepare() -> None:
        found.prepare()
        with torch.no_grad():
            own.copy_(x)

    return Competitor(found.name, found.call, found.results, prepare, found.note, found.inspect)


def compiled_inference(name: str, model: nn.Module, x: Tensor, mode: str | None) -> Competitor:
    run = compiled(model, x.device, mode)

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    look = partial(inspect, call, x.shape[0], x.device, compiled=True)
    return Competitor(name, call, lambda: {"y": call()}, inspect=look)


def frozen_inference(model: nn.Module, x: Tensor) -> Competitor:
    """Weights become constants: batch norm is folded and oneDNN's weights are prepacked."""
    from torch._inductor import config

    found = compiled_inference(FREEZING, model, x, None)

    def results() -> dict[str, Tensor]:
        # The first call compiles. Given to torch.compile as an option, freezing is silently not
        # applied (torch 2.13).
        with config.patch(freezing=True):
            return {"y": found.call()}

    return Competitor(FREEZING, found.call, results, inspect=found.inspect)


def _loss(y: Tensor) -> Tensor:
    """A scalar that every element of a block's result or of the logits reaches differently."""
    if y.dim() == 2:
        target = torch.arange(y.shape[0], device=y.device) % y.shape[1]
        return F.cross_entropy(y.float(), target)
    return y.float().square().mean()


class TrainingStep:
    """Forward, loss and backward of a module in training, without the optimiser.

    Args:
        module: its parameters receive the gradients.
        forward: what runs it (the module, or the module compiled).
        x: the input; a gradient for it is computed where it requires one.
    """

    def __init__(self, module: nn.Module, forward: Callable, x: Tensor, dtype: torch.dtype):
        self.module, self.run, self.x, self.dtype = module, forward, x, dtype

    def __call__(self) -> None:
        with autocast(self.x.device, self.dtype):
            loss = _loss(self.run(self.x))
        loss.backward()

    def clear(self) -> None:
        self.x.grad = None
        for p in self.module.parameters():
            p.grad = None

    def results(self) -> dict[str, Tensor]:
        """The result, and the gradients of each child module as one vector."""
        self.clear()
        with autocast(self.x.device, self.dtype):
            y = self.run(self.x)
        _loss(y).backward()
        found = {"y": y.detach()}
        if self.x.grad is not None:
            found["dx"] = self.x.grad
        for name, child in self.module.named_children():
            grads = [p.grad.flatten() for p in child.parameters()]
            if grads:
                found[f"d{name}"] = torch.cat(grads)
        return found


def training(
    name: str, module: nn.Module, x: Tensor, dtype: torch.dtype, run: Callable | None = None
) -> Competitor:
    """Args: run: executes the module; the module itself if None, else it counts as compiled."""
    step = TrainingStep(module, run or module, x, dtype)
    known = [*module.parameters(), *module.buffers(), x]
    look = partial(
        inspect, step, x.shape[0], x.device, exclude=known, saves=True, compiled=run is not None
    )
    return Competitor(name, step, step.results, step.clear, inspect=look)


def nchw_training(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Competitor:
    module = module.to(memory_format=torch.contiguous_format)
    own = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)
    return _with_copy(training(EAGER_NCHW, module, own, dtype), own, x)


def compiled_training(
    name: str, module: nn.Module, x: Tensor, dtype: torch.dtype, mode: str | None
) -> Competitor:
    return training(name, module, x, dtype, compiled(module, x.device, mode))
