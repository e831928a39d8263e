"""Blocks and whole networks as cases: training step and inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import fusedres

from . import model_peers, peers, plain, roofline, runtimes
from .cases import CPU, SHORT, Case, activation, redraw
from .floors import conv_seconds
from .machine import has_bf16_convolution
from .measure import Competitor, Truth
from .networks import network as shapes_of
from .peers import ALL, EAGER, OURS, Choice, Maker
from .roofline import Hardware

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


def training_case(
    work: Work,
    dtype: torch.dtype,
    device: torch.device = CPU,
    chosen: Choice = ALL,
) -> Case:
    """Forward, loss and backward; reduced precision as autocast over float32 parameters."""
    models = _Models(work, torch.float32, device)
    # A network's images arrive in float32; what reaches a block under autocast is reduced.
    x = models.input(dtype if work.leaf else torch.float32).requires_grad_(work.leaf)
    ours = model_peers.training(OURS, models.make(work.fused), x, dtype)
    eager = _once(model_peers.training(EAGER, models.make(work.plain), x, dtype))
    nchw = _once(model_peers.nchw_training(models.make(work.plain), x, dtype))

    def compiled(name: str, mode: str | None) -> Maker:
        return lambda: model_peers.compiled_training(name, models.make(work.plain), x, dtype, mode)

    makers: dict[str, Maker] = {
        EAGER: lambda: eager,
        peers.EAGER_NCHW: lambda: nchw,
        peers.COMPILE: compiled(peers.COMPILE, None),
        peers.MAX_AUTOTUNE: compiled(peers.MAX_AUTOTUNE, peers.AUTOTUNE_MODE),
    }
    if x.dim() != 4:  # rows have one layout
        del makers[peers.EAGER_NCHW]
    exact = models.make(work.plain).double()
    exact_x = x.detach().double().requires_grad_(work.leaf)
    with _without_cudnn():
        ref = model_peers.training("ref", exact, exact_x, torch.float32).results()
    gradients = frozenset(name for name in ref if name != "y")
    case = _case(work, "training", dtype, device, x, ours, makers, chosen)
    # A rounding can turn the sign of a ReLU's input, and a gradient jumps: the two layouts are both
    # PyTorch's own, and neither's jumps are better than the other's.
    yardsticks = [eager.results()]
    if nchw.name in makers and chosen.why_not(nchw.name) is None:
        yardsticks.append(nchw.results())
    case.truth = Truth(ref, {k: [found[k] for found in yardsticks] for k in ref}, gradients)
    if x.dim() == 4:
        case.conv_seconds = partial(conv_seconds, models.make(work.plain), x, True, dtype)
    return case


def inference_case(
    work: Work,
    dtype: torch.dtype,
    device: torch.device = CPU,
    chosen: Choice = ALL,
) -> Case:
    """Weights, statistics and input in ``dtype``; the statistics are those of real activations."""
    models = _Models(work, dtype, device)
    models.calibrate()
    x = models.input(dtype)
    plain_model = models.make(work.plain).eval()
    ours = model_peers.inference(OURS, models.make(work.fused).eval(), x)
    eager = _once(model_peers.inference(EAGER, plain_model, x))

    def another(maker: Callable[..., Competitor], *args) -> Maker:
        return lambda: maker(copy.deepcopy(plain_model), x, *args)

    def compiled(name: str, mode: str | None) -> Maker:
        model = copy.deepcopy(plain_model)
        return lambda: model_peers.compiled_inference(name, model, x, mode)

    makers: dict[str, Maker] = {
        EAGER: lambda: eager,
        peers.EAGER_NCHW: another(model_peers.nchw_inference),
        peers.COMPILE: compiled(peers.COMPILE, None),
        peers.MAX_AUTOTUNE: compiled(peers.MAX_AUTOTUNE, peers.AUTOTUNE_MODE),
        peers.FREEZING: another(model_peers.frozen_inference),
    }
    if device.type == "cuda":
        makers[peers.TENSORRT] = another(runtimes.tensorrt)
    else:
        makers[peers.OPENVINO] = another(runtimes.openvino)
        makers[peers.ONNXRUNTIME] = another(runtimes.onnxruntime)
    exact = copy.deepcopy(plain_model).double()
    with _without_cudnn():
        ref = model_peers.inference("ref", exact, x.double()).results()
    case = _case(work, "inference", dtype, device, x, ours, makers, chosen)
    case.truth = Truth(ref, eager.results())
    case.conv_seconds = partial(conv_seconds, plain_model, x, False, dtype)
    return case


class _Models:
    """Makes models that share one set of weights."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(0)
        self.work, self.dtype, self.device = work, dtype, device
        self._source = work.plain().to(device, memory_format=torch.channels_last)

    def make(self, maker: Callable[[], nn.Module]) -> nn.Module:
        model = maker()
        model.load_state_dict(self._source.state_dict(), strict=True)
        return model.to(self.device, self.dtype).to(memory_format=torch.channels_last)

    def input(self, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(1)
        return activation(self.work.x, dtype).to(self.device)

    def calibrate(self) -> None:
        """Running statistics of one batch: with the initial ones activations grow with depth."""
        norms = [m for m in self._source.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self._source.train()(self.input(torch.float32))
        for norm in norms:
            norm.momentum = 0.1


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """The float64 reference is PyTorch's own convolution on every device."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def _once(competitor: Competitor) -> Competitor:
    """Its results computed only once: they serve as the yardstick, and then for its own check."""
    return Competitor(
        competitor.name, competitor.call, cache(competitor.results), competitor.prepare,
        inspect=competitor.inspect,
    )  # fmt: skip


def _case(work, mode, dtype, device, x, ours, makers, chosen) -> Case:
    """Everything but the truth and what depends on it."""
    found, missing = peers.make(makers, chosen)
    kind = SHORT[dtype]
    if mode == "training" and dtype != torch.float32:
        kind += " autocast"
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not has_bf16_convolution()
    case = Case(
        title=f"{work.name} {mode} {'x'.join(map(str, work.x))} {kind}",
        device=device,
        dtype=dtype,
        competitors=[ours, *found],
        missing=missing,
        truth=Truth({}, {}),
        facts={
            "network": work.name, "mode": mode, "batch": work.x[0], "dtype": SHORT[dtype],
        },
        refresh=partial(redraw, [x]),
        notes=[NO_BF16] if slow else [],
    )  # fmt: skip
    if not work.leaf:
        case.floor = partial(_floor, work, mode == "training", dtype)
        case.floor_of = f"roofline, structure {roofline.OURS[mode == 'training']!r}"
    return case


def _floor(work: Work, train: bool, dtype: torch.dtype, hardware: Hardware) -> float:
    """The optimiser is not timed, so it is not in this floor."""
    net = shapes_of(work.name, work.x[-1])
    structure = roofline.OURS[train]
    kernels = roofline.kernels(net, structure, train, work.x[0], dtype)
    counted = (k for k in kernels if k.op != "optimiser")
    return sum(hardware.seconds(k.flops, k.bytes) for k in counted)
