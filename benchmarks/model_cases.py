"""Blocks and whole networks as cases: training step, inference, memory kept for the backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import fusedres

from . import plain
from .cases import Case, Memory, channels_last
from .floors import conv_seconds, traffic
from .machine import has_bf16_convolution
from .measure import Competitor, Truth
from .memory import allocations, saved_for_backward
from .peers import (
    COMPILE,
    EAGER,
    FREEZING,
    OURS,
    UNSELECTED,
    Missing,
    TrainingStep,
    compiled_training,
    frozen_inference,
    inference,
    openvino_inference,
    split,
    training,
)

NO_BF16 = (
    "oneDNN has no bfloat16 convolution on this CPU: eager and torch.compile run aten's fallback,"
    " ten to twenty times slower than float32, and fusedres convolves in float32; the ratio says"
    " little about other CPUs"
)


@dataclass(frozen=True)
class Work:
    """A module in both forms and its input.

    Args:
        plain, fused: makers of the two; their state dicts fit each other.
        x: shape of the input.
        leaf: whether the input requires grad in training, as a block's does.
    """

    name: str
    plain: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    x: tuple[int, ...]
    leaf: bool = False


def network(name: str, batch: int, size: int) -> Work:
    return Work(
        name, partial(plain.plain_network, name), getattr(fusedres.models, name),
        (batch, 3, size, size),
    )  # fmt: skip


def block(name: str, inplanes: int, planes: int, batch: int, size: int) -> Work:
    """A block with the identity as shortcut."""

    def make(maker: Callable[[], Callable[..., nn.Module]]) -> nn.Module:
        return maker()(inplanes, planes)

    return Work(
        name,
        partial(make, lambda: plain.plain_block(name)),
        partial(make, lambda: getattr(fusedres, name)),
        (batch, inplanes, size, size),
        leaf=True,
    )


def training_case(work: Work, dtype: torch.dtype, *, compiled: bool = True) -> Case:
    """Forward, loss and backward; bfloat16 as autocast over float32 parameters."""
    models = _Models(work, torch.float32)
    # A network's images arrive in float32; what reaches a block under autocast is bfloat16.
    x = models.input(dtype if work.leaf else torch.float32).requires_grad_(work.leaf)
    ours = training(OURS, models.make(work.fused), x, dtype)
    eager = _once(training(EAGER, models.make(work.plain), x, dtype))
    compile_peer = Missing(COMPILE, UNSELECTED)
    if compiled:
        compile_peer = compiled_training(models.make(work.plain), x, dtype)
    exact = models.make(work.plain).double()
    exact_x = x.detach().double().requires_grad_(work.leaf)
    ref = training("ref", exact, exact_x, torch.float32).results()
    gradients = frozenset(name for name in ref if name != "y")
    return _case(
        f"{work.name} training step", work, dtype, [ours, eager], [compile_peer],
        Truth(ref, eager.results(), gradients),
        partial(conv_seconds, models.make(work.plain), x, True, dtype),
        partial(memory_of_training, work, dtype),
    )  # fmt: skip


def inference_case(work: Work, dtype: torch.dtype, *, compiled: bool = True) -> Case:
    """Weights, statistics and input in ``dtype``; the statistics are those of real activations."""
    models = _Models(work, dtype)
    models.calibrate()
    x = models.input(dtype)
    plain_model = models.make(work.plain).eval()
    ours = inference(OURS, models.make(work.fused).eval(), x)
    eager = _once(inference(EAGER, plain_model, x))
    exact = copy.deepcopy(plain_model).double()
    ref = inference("ref", exact, x.double()).results()
    frozen = Missing(FREEZING, UNSELECTED)
    if compiled:
        frozen = frozen_inference(copy.deepcopy(plain_model), x)
    return _case(
        f"{work.name} inference", work, dtype, [ours, eager],
        [frozen, openvino_inference(plain_model, x)],
        Truth(ref, eager.results()),
        partial(conv_seconds, plain_model, x, False, dtype),
        partial(_memory_of_inference, ours, eager),
    )  # fmt: skip


def memory_of_training(work: Work, dtype: torch.dtype) -> dict[str, Memory]:
    """What one training step of either form keeps for its backward, and its peak."""
    models = _Models(work, torch.float32)
    x = models.input(dtype if work.leaf else torch.float32).requires_grad_(work.leaf)
    found = {}
    for name, make in ((OURS, work.fused), (EAGER, work.plain)):
        model = models.make(make)
        step = TrainingStep(model, model, x, dtype)
        saved = saved_for_backward(step.forward, (*model.parameters(), *model.buffers()))
        step()  # oneDNN's and the allocator's first-call memory
        step.clear()
        found[name] = Memory(allocations(step).peak, saved)
    return found


def _memory_of_inference(*competitors: Competitor) -> dict[str, Memory]:
    return {c.name: Memory(allocations(c.call).peak) for c in competitors}


class _Models:
    """Makes models that share one set of weights."""

    def __init__(self, work: Work, dtype: torch.dtype):
        torch.manual_seed(0)
        self.work, self.dtype = work, dtype
        self._source = work.plain().to(memory_format=torch.channels_last)

    def make(self, maker: Callable[[], nn.Module]) -> nn.Module:
        model = maker()
        model.load_state_dict(self._source.state_dict(), strict=True)
        return model.to(self.dtype).to(memory_format=torch.channels_last)

    def input(self, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(1)
        return channels_last(self.work.x, dtype)

    def calibrate(self) -> None:
        """Running statistics of one batch: with the initial ones activations grow with depth."""
        norms = [m for m in self._source.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self._source.train()(self.input(torch.float32))
        for norm in norms:
            norm.momentum = 0.1


def _once(competitor: Competitor) -> Competitor:
    """Its results computed only once: they serve as the yardstick, and then for its own check."""
    return Competitor(
        competitor.name, competitor.call, cache(competitor.results), competitor.prepare
    )


def _case(title, work, dtype, run, others, truth, floor, memory) -> Case:
    competitors, missing = split([*run, *others])
    size = "x".join(map(str, work.x))
    low = dtype != torch.float32
    kind = " bf16 autocast" if "training" in title else " bf16"
    return Case(
        title=f"{title} {size}{kind if low else ' fp32'}",
        competitors=competitors,
        missing=missing,
        truth=truth,
        traffic=traffic(competitors[0]),
        conv_seconds=floor,
        memory=memory,
        notes=[NO_BF16] if low and not has_bf16_convolution() else [],
    )
