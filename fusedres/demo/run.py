"""``python -m fusedres demo``: one network trained twice, with plain and with fused blocks.

The images are the handwritten digits that ship inside scikit-learn. Both runs start from the same
weights, see the same batches in the same order, and are compared in accuracy, numbers, time and
memory; then the trained plain checkpoint is loaded into the fused network and both are compared in
inference. The exit code is 0 when every check below holds, 1 when one fails, and 2 when it cannot
start: a package is missing, or the folder for its files cannot be made.

What is checked, and why so:

- Both runs name at least 97% of the 360 test images rightly.
- Training, exactly: the first steps are repeated in float64. Two float32 runs of one network part
  quickly whatever executes them, PyTorch against itself with another thread count included: a
  rounding difference turns the sign of some ReLU's input, and the gradient jumps. So their
  difference over a whole run says little, and is shown without being judged. In float64 the
  rounding is 2^29 times smaller and such a flip does not happen within a few steps. The fused run
  may then leave the plain one by 2^-29 times what PyTorch's own float32 run leaves its float64 run
  by, plus one rounding a step. A wrong formula would be off by many orders of magnitude more.
- Inference: a network in inference is continuous in its weights, so there float32 is judged: the
  fused logits may be twice as far from the float64 ones as PyTorch's are, plus four roundings of
  the largest logit.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..blocks import BasicBlock, SEBasicBlock
from ..report import explain
from . import measure
from .networks import DigitsNet, PlainBasicBlock, PlainSEBasicBlock
from .traffic import training_traffic

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
LEAST_ACCURACY = 0.97
ROUNDS = 15
MIB = 2**20


@dataclass(frozen=True)
class Inference:
    """The trained plain checkpoint, run by both networks on the test images."""

    plain_error: float
    fused_error: float
    allowed: float


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    missing = [pip for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'fusedres[demo]'", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out: cannot make the folder: {error}", file=sys.stderr)
        return 2
    return _run(args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fusedres demo", description="Plain against fused blocks."
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images (8)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--out", type=Path, default=Path("fusedres-demo"), help="folder for files")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs: wanted at least 1, got {args.epochs}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


def networks(seed: int) -> tuple[DigitsNet, DigitsNet]:
    """The plain and the fused network, initialised alike by the same seed."""
    torch.manual_seed(seed)
    plain = DigitsNet(PlainBasicBlock, PlainSEBasicBlock)
    torch.manual_seed(seed)
    fused = DigitsNet(BasicBlock, SEBasicBlock)
    pairs = zip(plain.state_dict().items(), fused.state_dict().items(), strict=True)
    for (name, a), (other, b) in pairs:
        if name != other or not torch.equal(a, b):
            raise RuntimeError(f"the networks differ before training: {name} and {other}")
    return plain, fused


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from . import plots, tables
    from .stages import Stages

    console = Console()
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    images = measure.load_images().to(device)
    plain, fused = (m.to(device, memory_format=torch.channels_last) for m in networks(args.seed))
    console.print(
        f"{len(images.train_y)} training and {len(images.test_y)} test images of 16x16; "
        f"{sum(p.numel() for p in plain.parameters()):,} parameters; float32 on {_name(device)}"
    )
    with Stages(console) as stages:
        first, losses = _train_all(stages, plain, fused, images, args)
        accuracies = [measure.accuracy(m, images) for m in (plain, fused)]
        weights = measure.largest_difference(list(plain.parameters()), list(fused.parameters()))
        checkpoint = args.out / "plain.pt"
        torch.save(plain.state_dict(), checkpoint)
        served = networks(args.seed)[1].to(device, memory_format=torch.channels_last)
        served.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
        inference = compare_inference(plain, served, images)
        figures = _figures(stages, plain, fused, served, images)

    console.print(tables.training(accuracies, losses, weights))
    console.print(tables.exactness(first, inference))
    console.print(tables.cost(figures))
    batch = measure.channels_last(images.train_x[: measure.BATCH])
    console.print(tables.explanation(explain(fused.train(), batch)))
    plots.loss_curves(args.out / "loss_curves.png", *losses)
    plots.speed_chart(args.out / "speed.png", figures, f"Digits network on {_name(device)}")
    for name in ("loss_curves.png", "speed.png", "plain.pt"):
        console.print(f"saved {args.out / name}", highlight=False, soft_wrap=True)
    return tables.verdict(console, accuracies, LEAST_ACCURACY, first, inference)


def _train_all(stages, plain, fused, images, args):
    """The first steps in both precisions, then both whole trainings."""
    step = stages.begin("exactness, float64", 4 * measure.FIRST_STEPS)
    first = measure.compare_first_steps(plain, fused, images, args.seed, step)
    steps = args.epochs * measure.steps_per_epoch(images)
    losses = []
    for name, model in (("plain PyTorch blocks", plain), ("fusedres blocks", fused)):
        step = stages.begin(name, steps)
        training = measure.Training(model, images, steps=steps, batch=measure.BATCH, seed=args.seed)
        losses.append([])
        for _ in range(steps):
            losses[-1].append(training.step())
            step(f"loss {losses[-1][-1]:.4f}")
    return first, losses


def compare_inference(plain: nn.Module, fused: nn.Module, images: measure.Images) -> Inference:
    x = measure.channels_last(images.test_x)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double().eval()(x.double())
        logits = [model.eval()(x).double() for model in (plain, fused)]
    errors = [(y - exact).abs().max().item() for y in logits]
    floor = 4 * torch.finfo(x.dtype).eps * exact.abs().max().item()
    return Inference(*errors, allowed=2 * errors[0] + floor)


def _figures(stages, plain, fused, served, images):
    """Time, memory, kernels and traffic of both networks on the same batch."""
    from .plots import Bars

    x = measure.channels_last(images.train_x[: measure.BATCH])
    y = images.train_y[: measure.BATCH]
    both = plain, fused
    calls = (
        [measure.training_call(m, x, y) for m in both],
        [measure.inference_call(m, x) for m in (plain, served)],
    )
    on_round = stages.begin("timing, taking turns", len(calls) * measure.all_rounds(ROUNDS))
    step, infer = (measure.median_seconds(pair, ROUNDS, on_round) for pair in calls)
    saved = [measure.saved_for_backward(m, x, y) / MIB for m in both]
    traffic = [training_traffic(copy.deepcopy(m).train(), x, y) for m in both]
    figures = [
        Bars("training step", "ms", *(1e3 * t for t in step)),
        Bars("inference", "ms", *(1e3 * t for t in infer)),
        Bars("kept for backward", "MiB", *saved),
        Bars("memory traffic of a step", "MiB", *(t.bytes / MIB for t in traffic)),
        Bars("kernels of a step", "calls", *(t.kernels for t in traffic)),
    ]
    if x.is_cuda:
        peak = [measure.peak_cuda_bytes(m, x, y) / MIB for m in both]
        figures.insert(3, Bars("peak memory of a step", "MiB", *peak))
    return figures


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
