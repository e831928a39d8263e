"""Squeeze-excite and its variants before a block's addition (Hu et al. 2018).

``python examples/squeeze_excite.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare, network

import fusedres


class Block(fusedres.BasicBlock):
    """BasicBlock with any squeeze-excite module: its tail takes ``se`` in."""

    def __init__(self, make, inplanes: int, planes: int, *args):
        super().__init__(inplanes, planes, *args)
        self.se = make(planes)


SQUEEZES = {
    "squeeze-excite": lambda c: fusedres.SqueezeExcite(c, c // 4),
    "hard sigmoid, mean and max": lambda c: fusedres.SqueezeExcite(
        c, c // 4, gate="hard_sigmoid", pool="mean_max"
    ),
    "effective squeeze-excite": fusedres.EffectiveSqueezeExcite,
}
MODELS = {"without": lambda: network(fusedres.BasicBlock)}
MODELS |= {name: partial(network, partial(Block, make)) for name, make in SQUEEZES.items()}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
