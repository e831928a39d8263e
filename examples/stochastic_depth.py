"""Stochastic depth: residual branches dropped at random (Huang et al. 2016).

``python examples/stochastic_depth.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare, network

import fusedres

DROPS = {
    "without": 0.0,
    "each image, 0.2": fusedres.DropPath(0.2),
    "the whole batch, 0.2": fusedres.DropPath(0.2, "batch"),
}
MODELS = {
    name: partial(network, partial(fusedres.BasicBlock, drop_path=drop), 2)
    for name, drop in DROPS.items()
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
