"""Trains a small DenseNet on scikit-learn's digits, and shows what it keeps for the backward.

``--smoke`` takes three steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedres


def network(layers: int) -> nn.Sequential:
    """Two dense blocks with a transition between them, for images [N, 1, 8, 8]."""
    growth, channels = 12, 24
    first = channels + layers * growth
    last = first // 2 + layers * growth
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        fusedres.DenseBlock(layers, channels, bn_size=4, growth_rate=growth, drop_rate=0.0),
        fusedres.Transition(first, first // 2),
        fusedres.DenseBlock(layers, first // 2, bn_size=4, growth_rate=growth, drop_rate=0.0),
        fusedres.BatchNormAct2d(last),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 10),
    )


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that a forward keeps for the backward, parameters aside."""
    sizes, kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}, []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)  # so that no address is used twice
        sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(sizes.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="three steps only")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16).float().view(-1, 1, 8, 8), torch.tensor(target)
    images = images.contiguous(memory_format=torch.channels_last)
    for layers in (2, 4) if args.smoke else (4, 8, 16):
        size = kept_bytes(network(layers), images[:64])
        print(f"{layers:2} layers a block keep {size / 1e6:.1f} MB for the backward of 64 images")
    model = network(2 if args.smoke else 6)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
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
