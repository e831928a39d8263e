"""Executions to compare with: eager, torch.compile, torch.compile with freezing, OpenVINO.

All take channels_last inputs and the same weights. One that this machine lacks is reported as
missing, by name and with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .machine import has_bf16_convolution
from .measure import Competitor

EAGER = "eager channels_last"
COMPILE = "torch.compile"
FREEZING = "torch.compile + freezing"
OPENVINO = "OpenVINO"
OURS = "fusedres"
UNSELECTED = "left out of this selection, because compiling takes long"


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here."""

    name: str
    reason: str


Peer = Competitor | Missing


def autocast(dtype: torch.dtype):
    """bfloat16 autocast, or nothing in float32."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def split(peers: Sequence[Peer]) -> tuple[list[Competitor], dict[str, str]]:
    """Those that can run, and why the others cannot."""
    missing = {p.name: p.reason for p in peers if isinstance(p, Missing)}
    return [p for p in peers if isinstance(p, Competitor)], missing


def no_compiler() -> str | None:
    """Why torch.compile cannot run here, or None."""
    from torch._inductor import config

    compilers = [c for c in config.cpp.cxx if c]
    if any(shutil.which(c) for c in compilers):
        return None
    return f"no C++ compiler ({', '.join(compilers)})"


# --- functions of tensors: the ops


def op_call(
    name: str,
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    dy: Tensor | None,
    direction: str,
    dtype: torch.dtype,
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
    pending: list[Tensor] = []

    def forward() -> Tensor:
        with autocast(dtype), contextlib.nullcontext() if dy is not None else torch.no_grad():
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

    if direction == "backward":
        return Competitor(
            name, lambda: backward(pending.pop()), results, lambda: pending.append(forward())
        )
    return Competitor(name, both if direction == "both" else forward, results)


def compiled_op(function: Callable[..., Tensor], *args) -> Peer:
    reason = no_compiler()
    return Missing(COMPILE, reason) if reason else op_call(COMPILE, torch.compile(function), *args)


# --- modules: blocks and networks


def _logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def inference(name: str, model: nn.Module, x: Tensor) -> Competitor:
    return Competitor(name, lambda: _logits(model, x), lambda: {"y": _logits(model, x)})


def frozen_inference(model: nn.Module, x: Tensor) -> Peer:
    """Weights become constants: batch norm is folded and oneDNN's weights are prepacked."""
    reason = no_compiler()
    if reason:
        return Missing(FREEZING, reason)
    from torch._inductor import config

    compiled = torch.compile(model)

    def call() -> Tensor:
        with torch.no_grad():  # freezing wants this rather than inference mode
            return compiled(x)

    def results() -> dict[str, Tensor]:
        # The first call compiles. Given to torch.compile as an option, freezing is silently not
        # applied (torch 2.13).
        with config.patch(freezing=True):
            return {"y": call()}

    return Competitor(FREEZING, call, results)


def openvino_inference(model: nn.Module, x: Tensor) -> Peer:
    """OpenVINO's CPU plugin on the torch model, tuned for latency, with as many threads as torch.

    It gets an NCHW input, its native order. Weights and input of a bfloat16 model reach it as the
    same values in float32, with bfloat16 as the precision hint.
    """
    if importlib.util.find_spec("openvino") is None:
        return Missing(OPENVINO, "not installed: pip install -r requirements/bench.txt")
    import openvino

    low = x.dtype == torch.bfloat16
    precision = "bf16" if low and has_bf16_convolution() else "f32"
    example = x.float().contiguous()
    plain = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with torch.no_grad():
        converted = openvino.convert_model(plain, example_input=example)
    converted.reshape(list(example.shape))
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    array = example.numpy()

    def call():
        return compiled(array, share_inputs=True, share_outputs=True)[0]

    note = "in float32: this CPU has no bfloat16 in oneDNN" if low and precision == "f32" else None
    return Competitor(OPENVINO, call, lambda: {"y": torch.from_numpy(call()).clone()}, note=note)


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

    def forward(self) -> Tensor:
        with autocast(self.dtype):
            return _loss(self.run(self.x))

    def __call__(self) -> None:
        self.forward().backward()

    def clear(self) -> None:
        self.x.grad = None
        for p in self.module.parameters():
            p.grad = None

    def results(self) -> dict[str, Tensor]:
        """The result, and the gradients of each child module as one vector."""
        self.clear()
        with autocast(self.dtype):
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


def training(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Competitor:
    step = TrainingStep(module, module, x, dtype)
    return Competitor(name, step, step.results, step.clear)


def compiled_training(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Peer:
    reason = no_compiler()
    if reason:
        return Missing(COMPILE, reason)
    step = TrainingStep(module, torch.compile(module), x, dtype)
    return Competitor(COMPILE, step, step.results, step.clear)
