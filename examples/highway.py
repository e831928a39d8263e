"""Trains a deep highway network and its plain twin on scikit-learn's digits.

Twenty layers: the plain network does not start to learn, the highway carries its input through
gates that start almost closed. ``--smoke`` takes three steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedres

WIDTH = 48


def network(depth: int, highway: bool) -> nn.Sequential:
    def layer() -> nn.Module:
        if highway:
            return fusedres.Highway(WIDTH, gate_bias=-2.0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    hidden = [layer() for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), *hidden, nn.Linear(WIDTH, 10))


def openness(model: nn.Module, images: Tensor) -> list[float]:
    """The mean transform gate of every highway layer."""
    gates, x = [], images
    for module in model:
        if isinstance(module, fusedres.Highway):
            parts = F.linear(x, module.weight, module.bias)
            gates.append(torch.sigmoid(parts[:, WIDTH:]).mean().item())
        x = module(x)
    return gates


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="three steps only")
    args = parser.parse_args(argv)
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16).float(), torch.tensor(target)
    depth = 3 if args.smoke else args.depth
    for highway in (False, True):
        torch.manual_seed(0)
        model = network(depth, highway)
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(1 if args.smoke else args.epochs):
            batches = torch.randperm(1500).split(64)
            for batch in batches[:3] if args.smoke else batches:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        name = "highway" if highway else "plain"
        print(f"{name:8} {depth} layers: loss {loss.item():.3f}, held-out accuracy {right:.1%}")
    with torch.no_grad():
        gates = openness(model, images[1500:])
    print("mean gate of each layer:", " ".join(f"{g:.2f}" for g in gates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
