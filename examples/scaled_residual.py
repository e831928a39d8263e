"""Scaled residuals: LayerScale, SkipInit, x / L; ReZero is SkipInit without norms.

``python examples/scaled_residual.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare, network
from torch import nn

import fusedres

BLOCKS = 6


def block(scale, inplanes: int, planes: int, *args) -> nn.Module:
    return fusedres.BasicBlock(inplanes, planes, *args, residual_scale=scale(planes))


SCALES = {
    "no scale": lambda c: None,
    "LayerScale": lambda c: fusedres.ResidualScale(c, init=0.1),
    "SkipInit": lambda c: fusedres.ResidualScale(),
    "x / L + f(x)": lambda c: fusedres.ResidualScale(
        init=1.0, shortcut=1 / BLOCKS, learnable=False
    ),
}
MODELS = {
    name: partial(network, partial(block, scale), BLOCKS // 3) for name, scale in SCALES.items()
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
