"""Pre-activation residual blocks beside the original ones (He et al. 2016b).

``python examples/preactivation.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys

from _digits import compare, network
from torch import nn

import fusedres


def bare(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)  # what it reads is normalised


MODELS = {
    "original": lambda: network(fusedres.BasicBlock),
    "pre-activation": lambda: network(fusedres.PreActBasicBlock, project=bare),
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
