"""What a call must cost at least: its ops at the machine's rates, its convolutions at oneDNN's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusedres import observers

from .clock import Clock
from .costs import Kernel
from .machine import has_bf16_convolution
from .measure import Competitor
from .roofline import Hardware

Shape = tuple[int, ...]


def ops_floor(
    competitor: Competitor, hardware: Hardware, unreported: Sequence[Kernel] = ()
) -> float | None:
    """The floors of the ops that the competitor's call reports, added up.

    A composed op (a convolution) reports itself and the passes that it is made of here. None on
    the reference backend, whose backward is PyTorch's own and reports nothing.

    Args:
        unreported: what the call does besides, unless an op of that name is reported.
    """
    events: list[observers.Event] = []
    competitor.prepare()
    with observers.observe(events.append):
        competitor.call()
    if any(e.backend == "reference" for e in events):
        return None
    reported = {e.op for e in events}
    others = [k for k in unreported if k.op not in reported]
    return sum(
        [hardware.seconds(e.flops, e.bytes_moved) for e in events]
        + [hardware.seconds(k.flops, k.bytes) for k in others]
    )


@dataclass(frozen=True)
class Conv:
    """One convolution of a network, as the library that carries it out sees it."""

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


def conv_seconds(
    model: nn.Module, x: torch.Tensor, train: bool, dtype: torch.dtype, clock: Clock
) -> float:
    """Time of the convolutions alone: prepacked in inference, with their backward in training.

    In float32 where a CPU has no bfloat16 convolution.
    """
    if x.device.type == "cpu" and dtype == torch.bfloat16 and not has_bf16_convolution():
        dtype = torch.float32
    total = 0.0
    for conv, count in convolutions(model, x).items():
        call = (_training_call if train else _inference_call)(conv, dtype, x.device)
        total += count * clock.typical(call)
    return total


def _operands(conv: Conv, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    made = (torch.randn(s, dtype=dtype, device=device) for s in (conv.x, conv.weight))
    return [t.to(memory_format=torch.channels_last) for t in made]


def _inference_call(conv: Conv, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x, w = _operands(conv, dtype, device)
    if device.type == "cuda":
        geometry = conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
        return lambda: torch.ops.aten.convolution(x, w, None, *geometry)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(w, *geometry, conv.x)
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, None, *geometry, "none", [], "")


def _training_call(conv: Conv, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x, w = _operands(conv, dtype, device)
    geometry = conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    dy = torch.ops.aten.convolution(x, w, None, *geometry)
    which = [conv.needs_dx, True, False]

    def call() -> None:
        torch.ops.aten.convolution(x, w, None, *geometry)
        torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, which)

    return call
