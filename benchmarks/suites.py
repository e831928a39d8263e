"""What there is to measure: every benchmark by name, and which selections it belongs to.

``smoke`` takes minutes, ``table`` holds the work that goals are set for (``benchmarks.goals``),
``full`` is everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from . import conv_cases, model_cases, op_cases
from .cases import CHANNELS_LAST, NCHW, SHORT, Case
from .machine import devices, has_bf16_convolution
from .networks import IMAGE, Conv, network
from .peers import EAGER, ONNXRUNTIME, OPENVINO, Choice

BATCH = {"cpu": 8, "cuda": 256}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES_OF = ("resnet18", "resnet50", "se_resnet50")
Size = tuple[int, int]  # channels, and height = width


@dataclass(frozen=True)
class Spec:
    """One benchmark.

    Args:
        id: its name, unique; filters and results use it.
        make: builds its case against the chosen peers.
        slow: tens of seconds a call, so two rounds have to do.
    """

    id: str
    make: Callable[[Choice], Case]
    smoke: bool = False
    table: bool = False
    slow: bool = False

    def selected(self, selection: str) -> bool:
        return selection == "full" or getattr(self, selection)


def params(specs: Iterable[Spec]) -> pytest.MarkDecorator:
    """Parametrizes a benchmark; ``benchmarks/conftest.py`` takes those of the selection."""
    return pytest.mark.parametrize("spec", [pytest.param(s, id=s.id) for s in specs])


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (FP32, BF16, FP16) if device.type == "cuda" else (FP32, BF16)


def _suffix(device: torch.device) -> str:
    return "" if device.type == "cpu" else f"-{device.type}"


def _batch(batch: int, device: torch.device) -> int:
    """A GPU gets a batch that fills it; one image stays one, for its latency."""
    return batch if device.type == "cpu" or batch == 1 else BATCH[device.type]


# --- ops


def ops(
    name: str,
    sizes: Iterable[Size],
    *,
    table: Collection[Size] = (),
    directions: tuple[str, ...] = ("both", "forward", "backward"),
) -> list[Spec]:
    """An op of ``op_cases`` on each size; the first of ``table`` is in the smoke selection too."""
    found = []
    for device in devices():
        for channels, size in sizes:
            for dtype in _dtypes(device):
                for layout in (CHANNELS_LAST, NCHW):
                    for direction in directions:
                        shape = (BATCH[device.type], channels, size, size)
                        make = partial(_op_case, name, shape, dtype, direction, layout, device)
                        whole = direction == "both" and layout == CHANNELS_LAST
                        known = whole and (channels, size) in table and dtype != FP16
                        label = f"{name}-{direction}-{'x'.join(map(str, shape))}-{SHORT[dtype]}"
                        label += "" if layout == CHANNELS_LAST else f"-{layout}"
                        smoke = known and (channels, size) == next(iter(table))
                        found.append(Spec(label + _suffix(device), make, smoke, known))
    return found  # fmt: skip


def _op_case(name, shape, dtype, direction, layout, device, chosen) -> Case:
    return op_cases.case(
        op_cases.OPS[name], shape, dtype, direction, layout, device, chosen
    )  # fmt: skip


def inner_sizes() -> list[Size]:
    """Of activations behind a convolution that does not end a block."""
    nets = [network(name) for name in SHAPES_OF]
    shapes = [net.stem.y for net in nets]
    shapes += [conv.y for net in nets for block in net.blocks for conv in block.convs[:-1]]
    return _sizes(shapes)


def block_sizes(*names: str) -> list[Size]:
    """Of the blocks' results."""
    return _sizes(block.y for name in names for block in network(name).blocks)


def _sizes(shapes: Iterable) -> list[Size]:
    return list(dict.fromkeys(shape[:2] for shape in shapes))


# --- convolutions


def convolutions(
    name: str, convs: Iterable[Conv], directions: tuple[str, ...], smoke: Collection[Conv]
) -> list[Spec]:
    found = []
    for device in devices():
        for conv in dict.fromkeys(convs):
            for dtype in _dtypes(device):
                for direction in directions:
                    make = partial(_conv_case, name, conv, dtype, direction, device)
                    channels, size = conv.x[:2]
                    shape = f"{BATCH[device.type]}x{channels}x{size}x{size}"
                    label = f"{name}-{direction}-{shape}-to-{conv.y[0]}"
                    label += f"-k{conv.kernel}s{conv.stride}-{SHORT[dtype]}{_suffix(device)}"
                    quick = conv in smoke and dtype == FP32 and direction == directions[0]
                    found.append(Spec(label, make, smoke=quick))
    return found


def _conv_case(name, conv, dtype, direction, device, chosen) -> Case:
    return conv_cases.conv_case(
        name, conv, BATCH[device.type], dtype, direction=direction, device=device, chosen=chosen
    )


# --- blocks and networks

SLOW = "left out: seconds to minutes a call, as this CPU's oneDNN cannot convolve bfloat16"


def _crawls(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's own convolutions are aten's slow fallback."""
    return device.type == "cpu" and dtype == BF16 and not has_bf16_convolution()


def _choice(chosen: Choice, slow: bool) -> Choice:
    return chosen.only((EAGER, OPENVINO, ONNXRUNTIME), SLOW) if slow else chosen


def blocks(specs: Iterable[tuple], mode: str, smoke: Collection[str] = ()) -> list[Spec]:
    """Each of (class, input channels, planes, size), with the identity as shortcut."""
    found = []
    for device in devices():
        for name, inplanes, planes, size in specs:
            for dtype in _dtypes(device):
                batch = BATCH[device.type]
                work = model_cases.block(name, inplanes, planes, batch, size)
                label = f"{name}-{mode}-{batch}x{inplanes}x{size}x{size}-{SHORT[dtype]}"
                label += _suffix(device)
                slow = _crawls(dtype, device)
                make = partial(_model_case, work, mode, dtype, device, slow)
                found.append(Spec(label, make, smoke=label in smoke))
    return found


def models(
    mode: str,
    works: Iterable[tuple[str, int]],
    smoke: Collection[tuple[str, int]] = (),
    table: Collection[tuple[str, int]] = (),
    image: int = IMAGE,
) -> list[Spec]:
    """Whole networks: each of (name, batch)."""
    found = []
    for device in devices():
        listed: dict[tuple[str, int], set[tuple[str, int]]] = {}  # as run here: as listed
        for name, batch in works:
            listed.setdefault((name, _batch(batch, device)), set()).add((name, batch))
        for (name, batch), names in listed.items():
            for dtype in _dtypes(device):
                slow = _crawls(dtype, device)
                work = model_cases.network(name, batch, image)
                make = partial(_model_case, work, mode, dtype, device, slow)
                found.append(Spec(
                    f"{name}-{mode}-b{batch}-{SHORT[dtype]}{_suffix(device)}", make,
                    smoke=bool(names & set(smoke)) and dtype == FP32,
                    table=bool(names & set(table)) and dtype != FP16,
                    slow=slow and mode == "training",
                ))  # fmt: skip
    return found


def systems(works: Iterable[model_cases.Work]) -> list[Spec]:
    """Training steps of other residual systems' modules."""
    found = []
    for device in devices():
        for work in works:
            for dtype in _dtypes(device):
                label = f"{work.name}-training-{'x'.join(map(str, work.x))}-{SHORT[dtype]}"
                slow = _crawls(dtype, device)
                make = partial(_model_case, work, "training", dtype, device, slow)
                found.append(Spec(label + _suffix(device), make))
    return found


def _model_case(work, mode, dtype, device, slow, chosen) -> Case:
    make = model_cases.training_case if mode == "training" else model_cases.inference_case
    return make(work, dtype, device, _choice(chosen, slow))
