"""The same network with its shortcuts and without them (He et al. 2016, figure 6).

``python examples/plain_network.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare, network

import fusedres

MODELS = {}
for depth in (1, 3):
    MODELS[f"residual, {3 * depth} blocks"] = partial(network, fusedres.BasicBlock, depth)
    plain = partial(fusedres.BasicBlock, residual=False)
    MODELS[f"plain, {3 * depth} blocks"] = partial(network, plain, depth, project=None)


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
