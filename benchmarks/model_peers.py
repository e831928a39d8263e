"""Executions of blocks and networks: eager in both layouts, torch.compile in its modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inspection import inspect
from .measure import Competitor
from .peers import EAGER_NCHW, FREEZING, autocast, compiled


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


def compiled_inference(
    name: str, model: nn.Module, x: Tensor, mode: str | None, **how
) -> Competitor:
    run = compiled(model, x.device, mode, **how)

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    look = partial(inspect, call, x.shape[0], x.device, compiled=True)
    return Competitor(name, call, lambda: {"y": call()}, inspect=look)


def frozen_inference(model: nn.Module, x: Tensor) -> Competitor:
    """Weights become constants: batch norm is folded and oneDNN's weights are prepacked."""
    from torch._inductor import config

    # As an option alone freezing is silently not applied (torch 2.13); without the option this
    # would run the code that torch.compile made of the same class before.
    found = compiled_inference(FREEZING, model, x, None, options={"freezing": True})

    def results() -> dict[str, Tensor]:
        with config.patch(freezing=True):  # the first call compiles
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
    step = TrainingStep(module, module if run is None else run, x, dtype)
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
