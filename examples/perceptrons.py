"""Trains three perceptrons of one depth on scikit-learn's digits: plain, residual, fully connected.

``--smoke`` takes three steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fusedres

WIDTH = 32


def networks(depth: int) -> dict[str, nn.Module]:
    plain = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    ends = [nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)]
    return {
        "plain": nn.Sequential(ends[0], *plain, ends[1]),
        "residual": nn.Sequential(
            nn.Linear(64, WIDTH), fusedres.ResidualMLP(WIDTH, depth), nn.Linear(WIDTH, 10)
        ),
        "cross-coupled": nn.Sequential(
            nn.Linear(64, WIDTH),
            fusedres.ResidualMLP(WIDTH, depth, cross_coupled=True),
            nn.Linear(WIDTH, 10),
        ),
        "all to all": fusedres.DenselyConnectedMLP(64, WIDTH, 10, depth),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--smoke", action="store_true", help="three steps only")
    args = parser.parse_args(argv)
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16).float(), torch.tensor(target)
    torch.manual_seed(0)
    for name, model in networks(3 if args.smoke else args.depth).items():
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(1 if args.smoke else args.epochs):
            batches = torch.randperm(1500).split(64)
            for batch in batches[:3] if args.smoke else batches:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        print(f"{name:14} loss {loss.item():.3f}, held-out accuracy {right:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
