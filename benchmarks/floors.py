"""What a call must cost at least: its fused passes at copy speed, its convolutions at oneDNN's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fusedres import dispatch

from .machine import CacheFlush, has_bf16_convolution
from .measure import Competitor, summarise, timed

CONV_ROUNDS = 3
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """Memory traffic of one call of ours: of everything but the convolutions themselves.

    ``eager_bytes`` is what PyTorch's own ops would move for the same work.
    """

    bytes_moved: int
    eager_bytes: int
    launches: int


def traffic(competitor: Competitor) -> Traffic | None:
    """What the ops report while the competitor runs once; None where the reference backend runs.

    There the backward is PyTorch's own and nobody counts its passes.
    """
    events: list[dispatch.Event] = []
    competitor.prepare()
    with dispatch.observe(events.append):
        competitor.call()
    own = [e for e in events if e.backend != "unfused" and not e.op.startswith("conv_")]
    if any(e.backend == "reference" for e in own):
        return None
    return Traffic(
        sum(e.bytes_moved for e in own),
        sum(e.eager_bytes for e in own),
        sum(e.launches for e in own),
    )


@dataclass(frozen=True)
class Conv:
    """One convolution of a network, as oneDNN sees it."""

    x: Shape
    weight: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int
    needs_dx: bool


def convolutions(model: nn.Module, x: torch.Tensor) -> Counter[Conv]:
    """The convolutions over more than one pixel in a forward of a plain ``model``, with counts."""
    found: Counter[Conv] = Counter()
    model, shape_only = copy.deepcopy(model).to("meta"), x.detach().to("meta")

    def record(m: nn.Conv2d, args, output) -> None:
        if output.shape[2:].numel() > 1:
            needs_dx = bool(found) or x.requires_grad
            shapes = tuple(args[0].shape), tuple(m.weight.shape)
            found[Conv(*shapes, m.stride, m.padding, m.dilation, m.groups, needs_dx)] += 1

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(record)
    model.to(x.dtype)(shape_only)
    return found


def conv_seconds(model: nn.Module, x: torch.Tensor, train: bool, dtype: torch.dtype) -> float:
    """Time of the convolutions alone: prepacked in inference, with their backward in training.

    In float32 where oneDNN has no bfloat16 convolution.
    """
    if dtype == torch.bfloat16 and not has_bf16_convolution():
        dtype = torch.float32
    flush = CacheFlush()
    total = 0.0
    for conv, count in convolutions(model, x).items():
        call = (_training_call if train else _inference_call)(conv, dtype)
        call()
        seconds = [timed(call, flush) for _ in range(CONV_ROUNDS)]
        total += count * summarise(seconds).median
    return total


def _operands(conv: Conv, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = conv.x, conv.weight
    x, w = (torch.randn(s, dtype=dtype).to(memory_format=torch.channels_last) for s in shapes)
    return x, w


def _inference_call(conv: Conv, dtype: torch.dtype) -> Callable[[], object]:
    x, w = _operands(conv, dtype)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(w, *geometry, conv.x)
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, None, *geometry, "none", [], "")


def _training_call(conv: Conv, dtype: torch.dtype) -> Callable[[], object]:
    x, w = _operands(conv, dtype)
    geometry = conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    dy = torch.ops.aten.convolution(x, w, None, *geometry)
    which = [conv.needs_dx, True, False]

    def call() -> None:
        torch.ops.aten.convolution(x, w, None, *geometry)
        torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, which)

    return call
