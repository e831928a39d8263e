"""Trains a small vision transformer of fused encoder layers on scikit-learn's digits.

Each 8x8 digit is 16 patches of 2x2 pixels. ``--smoke`` takes three steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedres

PATCHES, PATCH, WIDTH = 16, 4, 48


class DigitTransformer(nn.Module):
    """Pre-norm layers with stochastic depth, and the mean over the patches."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.position = nn.Parameter(torch.zeros(PATCHES, WIDTH))
        self.layers = nn.ModuleList(
            fusedres.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True,
                norm_first=True, drop_path=0.1 * i / depth,
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 64] -> logits [N, 10]."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PATCH)
        x = self.embed(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="three steps only")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16 - 0.3).float(), torch.tensor(target)
    model = DigitTransformer(2 if args.smoke else 4)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for epoch in range(1 if args.smoke else args.epochs):
        batches = torch.randperm(1500).split(64)
        for batch in batches[:3] if args.smoke else batches:
            loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            right = (model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held-out accuracy {right:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
