"""``python -m benchmarks.roofline``: what a network costs at least, for each structure of passes.

A kernel's floor is ``max(flops / rate, bytes / bandwidth)``; kernels add up. Bytes and flops are
those that the ops themselves report (``benchmarks.costs``); traffic that no op of this library has
(the gradients of convolutions) is counted tensor by tensor below. R and W are one read and one
write of a whole activation. What is left out: reuse in caches, halos computed twice, launches.

Inference
    eager        convolution, batch norm, ReLU, addition and squeeze-excite each by themselves
    pointwise    convolution, then one pass for all that follows it (torch.compile)
    epilogue     one call a convolution: folded batch norm, addition and ReLU in its epilogue; a
                 squeeze-excite still reads its input twice. What this version runs on a CPU
    block        one launch a block, the stem with its pooling another: block input R, output W

Training (the optimiser included: SGD with momentum in float32, 22 bytes a parameter)
    eager        as above; backward: ReLU RRW, batch norm RR + RRW, the two gradients of each
                 convolution, and RRW to add up the gradients at a block's input
    pointwise    batch norm, addition and ReLU in two passes forward and two backward, with one bit
                 an element for the ReLU behind an addition; squeeze-excite in the same passes
    steps        what this version runs on a CPU: only raw results of convolutions are kept, so
                 batch norm and ReLU before a convolution are computed again in the backward
    prologue     as steps, but statistics in the convolution's epilogue, and batch norm and ReLU
                 in the next one's prologue, forward and backward
    barrier      as prologue, both gradients of a convolution in one kernel, and the block's tail in
                 the next block's first convolution: what batch norm's barriers leave
    ideal        each kept tensor written once and read once, nothing else
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import passes
from .costs import Costs, Kernel
from .networks import IMAGE, Network, network

INFERENCE = ("eager", "pointwise", "epilogue", "block")
TRAINING = ("eager", "pointwise", "steps", "prologue", "barrier", "ideal")
OURS = {False: "epilogue", True: "steps"}  # by whether it trains
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "se_resnet50")
NETWORKS += ("wide_resnet50_2", "resnext50_32x4d")


@dataclass(frozen=True)
class Hardware:
    """Bytes and flops a second."""

    bandwidth: float
    flops: float

    def seconds(self, flops: int, moved: int) -> float:
        """The floor of one kernel."""
        return max(flops / self.flops, moved / self.bandwidth)


H100 = Hardware(3.0e12, 798e12)  # measured copy bandwidth and bfloat16 matmul rate of an H100 SXM


@dataclass(frozen=True)
class Floor:
    """Seconds of one call at least; ``math`` is the arithmetic's share alone."""

    seconds: float
    math: float
    bytes: int
    flops: int
    launches: int


def kernels(
    net: Network, structure: str, train: bool, batch: int, dtype: torch.dtype
) -> list[Kernel]:
    """The kernels of one call in the given structure of passes.

    Raises:
        ValueError: there is no such structure.
    """
    names = TRAINING if train else INFERENCE
    if structure not in names:
        raise ValueError(f"structure: wanted one of {', '.join(names)}, got {structure!r}")
    make = (passes.TRAINING if train else passes.INFERENCE)[structure]
    return make(Costs(batch, dtype), net)


def floor(
    net: Network, structure: str, train: bool, batch: int, dtype: torch.dtype, hardware: Hardware
) -> Floor:
    found = kernels(net, structure, train, batch, dtype)
    seconds = (hardware.seconds(k.flops, k.bytes) for k in found)
    flops, moved = sum(k.flops for k in found), sum(k.bytes for k in found)
    return Floor(sum(seconds), flops / hardware.flops, moved, flops, len(found))


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    args = _arguments(argv)
    hardware = Hardware(args.bandwidth * 1e12, args.tflops * 1e12)
    console = Console(width=None if Console().is_terminal else 120)
    dtype = getattr(torch, args.dtype)
    for train, structures in ((False, INFERENCE), (True, TRAINING)):
        what = "training" if train else "inference"
        table = Table(
            title=f"{what}, batch {args.batch}, {args.dtype}: floor in ms, and MB an image",
            title_justify="left",
        )
        for column in ("network", "arithmetic", *structures):
            table.add_column(column, justify="left" if column == "network" else "right")
        for name in args.networks:
            floors = [
                floor(network(name, args.image), s, train, args.batch, dtype, hardware)
                for s in structures
            ]
            cells = [f"{1e3 * f.seconds:.2f}\n{f.bytes / args.batch / 1e6:.0f}" for f in floors]
            table.add_row(name, f"{1e3 * floors[0].math:.2f}", *cells)
        console.print(table)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="Floors of residual networks; the default hardware is an H100.",
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="of fusedres.models")
    parser.add_argument("--bandwidth", type=float, default=H100.bandwidth / 1e12, help="TB/s")
    parser.add_argument("--tflops", type=float, default=H100.flops / 1e12, help="TFLOP/s")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, default=IMAGE, help="height and width")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)
    for name in ("bandwidth", "tflops", "batch"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: wanted a number > 0, got {getattr(args, name)}")
    unknown = [name for name in args.networks if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown network {unknown[0]!r}; there are: {', '.join(NETWORKS)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
