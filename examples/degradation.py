"""The degradation problem (He et al. 2016, figure 1), reproduced on a CPU in minutes.

Plain and residual networks of growing depth are trained in the same way on scikit-learn's digits.
With batch norm neither has vanishing signals; still the deeper plain networks have the higher
*training* error, which is not overfitting, and the residual ones have not. The two differ in
nothing but the shortcut.

``python examples/degradation.py --plot degradation.png``
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedres

WIDTH = 16


def network(blocks: int, residual: bool) -> nn.Sequential:
    return nn.Sequential(
        fusedres.ConvBNAct2d(1, WIDTH, 3, stride=2),
        *(fusedres.BasicBlock(WIDTH, WIDTH, residual=residual) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, 10),
    )


def training_error(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains the model; the share of the training images that it gets wrong in the last epoch."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        wrong = 0
        for batch in torch.randperm(len(images)).split(128):
            logits = model(images[batch])
            wrong += (logits.argmax(1) != labels[batch]).sum().item()
            optimiser.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimiser.step()
        schedule.step()
    return wrong / len(images)


def draw(depths: list[int], errors: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(depths, [100 * v for v in values], marker="o", label=name)
    axes.set(xlabel="convolutions", ylabel="training error, %", title="Digits, last epoch")
    axes.legend()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=8)
    add("--blocks", type=int, nargs="+", default=[2, 8, 16], help="two convolutions each")
    add("--seeds", type=int, default=1, help="networks of each kind; the mean counts")
    add("--plot", metavar="FILE", help="draw the errors into this file")
    add("--smoke", action="store_true", help="two tiny networks, two steps each")
    args = parser.parse_args(argv)
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 8 - 1).float().view(-1, 1, 8, 8), torch.tensor(target)
    images = images.contiguous(memory_format=torch.channels_last)
    blocks, epochs = args.blocks, args.epochs
    if args.smoke:
        blocks, epochs, images, labels = [1, 2], 1, images[:256], labels[:256]
    depths = [1 + 2 * n for n in blocks]
    errors: dict[str, list[float]] = {"plain": [], "residual": []}
    for n, depth in zip(blocks, depths, strict=True):
        for name, found in errors.items():
            total = 0.0
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                total += training_error(network(n, name == "residual"), images, labels, epochs)
            found.append(total / args.seeds)
        print(
            f"{depth:3} convolutions: training error"
            f" plain {errors['plain'][-1]:.1%}, residual {errors['residual'][-1]:.1%}",
            flush=True,
        )
    if args.plot:
        draw(depths, errors, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
