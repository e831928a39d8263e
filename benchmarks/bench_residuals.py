"""Dense blocks, transformer residuals, highway, LSTM cell and perceptrons against their peers.

``python benchmarks/bench_residuals.py [NAME ...]`` interleaves the competitors in one process,
checks that they agree, and prints the median of each with the ratio to ours; under pytest each case
is one benchmark. Steps are forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres

Step = Callable[[], Tensor]
Competitors = dict[str, Step]


def step_of(module: nn.Module, *inputs: Tensor) -> Step:
    """A training step's forward and backward; returns the output."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def step() -> Tensor:
        module.zero_grad()
        y = module(*leaves)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        return y

    return step


class EagerAddNorm(nn.Module):
    def __init__(self, norm: nn.Module, dropout: float):
        super().__init__()
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + self.dropout(x))


class EagerHighway(nn.Module):
    """A layer for the transform and one for the gate, as highway networks are usually written."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        self.h, self.t = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        return torch.relu(self.h(x)) * t + x * (1 - t)

    def copy_to(self, fused: nn.Module) -> nn.Module:
        with torch.no_grad():
            fused.weight.copy_(torch.cat([self.h.weight, self.t.weight]))
            fused.bias.copy_(torch.cat([self.h.bias, self.t.bias]))
        return fused


class EagerDenseMLP(fusedres.DenselyConnectedMLP):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.output(x)


def twin(fused: nn.Module, plain: nn.Module) -> nn.Module:
    fused.load_state_dict(plain.state_dict())
    return fused


def add_norm(dropout: float, dtype=torch.float32) -> Competitors:
    x, residual = torch.randn(2, 8, 512, 768).to(dtype)
    norm = nn.LayerNorm(768, dtype=dtype)
    ours = twin(fusedres.AddLayerNorm(768, dropout=dropout, dtype=dtype), norm)
    peer = EagerAddNorm(norm, dropout)
    return {"fusedres": step_of(ours, x, residual), "eager": step_of(peer, x, residual)}


def encoder_layer(norm_first: bool) -> Competitors:
    options = dict(dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first)
    peer = nn.TransformerEncoderLayer(384, 6, 1536, **options)
    ours = twin(fusedres.TransformerEncoderLayer(384, 6, 1536, **options), peer)
    x = torch.randn(8, 197, 384)
    return {"fusedres": step_of(ours, x), "nn": step_of(peer, x)}


def dense_block(layers: int, channels: int, size: int) -> Competitors:
    peer = _torchvision_densenet()
    options = dict(bn_size=4, growth_rate=32, drop_rate=0.0)
    plain = peer._DenseBlock(layers, channels, **options)
    efficient = peer._DenseBlock(layers, channels, **options, memory_efficient=True)
    x = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
    return {
        "fusedres": step_of(twin(fusedres.DenseBlock(layers, channels, **options), plain), x),
        "torchvision": step_of(plain, x),
        "torchvision, memory_efficient": step_of(twin(efficient, plain), x),
    }


def densenet121() -> Competitors:
    peer = _torchvision_densenet()
    plain = peer.densenet121()
    x = torch.randn(4, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    models = {
        "fusedres": twin(fusedres.models.densenet121(), plain),
        "torchvision": plain,
        "torchvision, memory_efficient": twin(peer.densenet121(memory_efficient=True), plain),
    }
    return {n: step_of(m.to(memory_format=torch.channels_last), x) for n, m in models.items()}


def _torchvision_densenet():
    """torchvision beside a CPU-only torch: its wheel's library does not load there."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # it does load, or somebody has defined them
    _KEPT.append(library)
    import torchvision.models.densenet as peer

    return peer


_KEPT: list[torch.library.Library] = []


def highway_linear() -> Competitors:
    peer = EagerHighway(lambda: nn.Linear(512, 512))
    x = torch.randn(1024, 512)
    return {"fusedres": step_of(peer.copy_to(fusedres.Highway(512)), x), "eager": step_of(peer, x)}


def highway_conv() -> Competitors:
    peer = EagerHighway(lambda: nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(8, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    ours = peer.copy_to(fusedres.HighwayConv2d(64))
    return {"fusedres": step_of(ours, x), "eager": step_of(peer, x)}


def lstm_cell() -> Competitors:
    peer = nn.LSTMCell(256, 256)
    ours = twin(fusedres.ResidualLSTMCell(256, 256), peer)
    x = torch.randn(64, 256)
    return {"fusedres": step_of(ours, x), "nn": step_of(peer, x)}


def dense_mlp() -> Competitors:
    peer = EagerDenseMLP(256, 128, 10, 12)
    ours = twin(fusedres.DenselyConnectedMLP(256, 128, 10, 12), peer)
    x = torch.randn(1024, 256)
    return {"fusedres": step_of(ours, x), "eager": step_of(peer, x)}


CASES: dict[str, Callable[[], Competitors]] = {
    "AddLayerNorm 4096x768": lambda: add_norm(0.0),
    "AddLayerNorm 4096x768 dropout": lambda: add_norm(0.1),
    "AddLayerNorm 4096x768 bf16": lambda: add_norm(0.0, torch.bfloat16),
    "TransformerEncoderLayer post-norm": lambda: encoder_layer(False),
    "TransformerEncoderLayer pre-norm": lambda: encoder_layer(True),
    "DenseBlock 6 layers 56x56": lambda: dense_block(6, 64, 56),
    "DenseBlock 12 layers 28x28": lambda: dense_block(12, 128, 28),
    "DenseNet-121 128x128": densenet121,
    "Highway 512": highway_linear,
    "HighwayConv2d 64": highway_conv,
    "ResidualLSTMCell 256": lstm_cell,
    "DenselyConnectedMLP": dense_mlp,
}


def interleaved(
    competitors: Competitors, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each; one round runs all of them, so that noise meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, step in competitors.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def check(competitors: Competitors) -> None:
    """The same seed gives the same output, and a first call is out of the way."""
    outputs = []
    for step in competitors.values():
        torch.manual_seed(0)
        outputs.append(copy.copy(step().detach()))
    for other in outputs[1:]:
        scale = other.abs().max()
        error = (outputs[0] - other).abs().max() / scale
        assert error <= 1e3 * torch.finfo(other.dtype).eps, f"the competitors disagree: {error}"


@pytest.mark.parametrize("name", CASES)
def test_residuals(name, benchmark):
    competitors = CASES[name]()
    check(competitors)
    medians = interleaved(competitors, 5)
    ours = medians.pop("fusedres")
    benchmark.extra_info.update({f"ratio to {n}": t / ours for n, t in medians.items()})
    benchmark.pedantic(competitors["fusedres"], rounds=5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="the process's time on one thread: for a machine that has other work",
    )  # fmt: skip
    args = parser.parse_args(argv)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    for name in args.names or CASES:
        if name not in CASES:
            parser.error(f"unknown case {name!r}; there are: {', '.join(CASES)}")
        competitors = CASES[name]()
        check(competitors)
        medians = interleaved(competitors, args.rounds, clock)
        ours = medians["fusedres"]
        figures = (f"{n} {1e3 * t:.2f} ms ({t / ours:.2f}x)" for n, t in medians.items())
        print(f"{name}: {', '.join(figures)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
