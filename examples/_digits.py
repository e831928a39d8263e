"""What the convolutional examples share: scikit-learn's digits, and a training run on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedres

TRAINING_IMAGES = 1500  # of 1,797; the rest is held out


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 16, 16], scaled up from 8x8 and grey, and their labels."""
    data, target = load_digits(return_X_y=True)
    images = torch.tensor(data / 16).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(target)


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    """The usual projection shortcut: a 1x1 convolution and a batch norm."""
    conv = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


def network(block: Callable[..., nn.Module], depth: int = 1, project=projection) -> nn.Sequential:
    """Three stages of ``depth`` blocks with 16, 32 and 64 channels, for images [N, 3, 16, 16].

    Args:
        block: called with inplanes, planes, stride and the shortcut's module or None.
        project: makes that module of inplanes, planes and stride; None for no module.
    """
    layers: list[nn.Module] = [fusedres.ConvBNAct2d(3, 16, 3)]
    inplanes = 16
    for planes in (16, 32, 64):
        for _ in range(depth):
            stride = 1 if inplanes == planes else 2
            shortcut = project(inplanes, planes, stride) if project and stride == 2 else None
            layers.append(block(inplanes, planes, stride, shortcut))
            inplanes = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, epochs: int, smoke: bool) -> tuple[float, float]:
    """Trains with SGD; the last loss and the accuracy on held-out digits."""
    images, labels = digits()
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(1 if smoke else epochs):
        batches = torch.randperm(TRAINING_IMAGES).split(16 if smoke else 64)
        for batch in batches[:2] if smoke else batches:
            loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    held_out = slice(TRAINING_IMAGES, TRAINING_IMAGES + 32 if smoke else None)
    with torch.no_grad():
        right = (model.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    return loss.item(), right.item()


def compare(doc: str, models: dict[str, Callable[[], nn.Module]], argv: list[str] | None) -> int:
    """Trains each model from the same seed and prints a line on it."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="two steps on a few images")
    args = parser.parse_args(argv)
    for name, make in models.items():
        torch.manual_seed(0)
        model = make().to(memory_format=torch.channels_last)
        loss, right = train(model, args.epochs, args.smoke)
        print(f"{name:28} loss {loss:.3f}, held-out accuracy {right:.1%}")
    return 0
