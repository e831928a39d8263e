"""Projection shortcuts of ResNet, of ResNet-D, and without a norm.

``python examples/projection_shortcut.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys

from _digits import compare, network
from torch import nn

import fusedres


def averaged(inplanes: int, planes: int, stride: int) -> nn.Module:
    """ResNet-D's: nothing is skipped (He et al. 2019, section 4.2)."""
    conv = nn.Conv2d(inplanes, planes, 1, bias=False)
    return nn.Sequential(nn.AvgPool2d(stride), conv, nn.BatchNorm2d(planes))


MODELS = {
    "convolution of stride 2": lambda: network(fusedres.BasicBlock),
    "average pool, convolution": lambda: network(fusedres.BasicBlock, project=averaged),
    "without a norm": lambda: network(
        fusedres.BasicBlock, project=lambda a, b, stride: nn.Conv2d(a, b, 1, stride)
    ),
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
