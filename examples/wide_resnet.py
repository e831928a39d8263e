"""Wide residual networks: the same depth, more channels (Zagoruyko and Komodakis 2016).

``python examples/wide_resnet.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare

import fusedres

MODELS = {
    f"WRN-10-{width}, dropout {dropout}": partial(
        fusedres.models.WideResNet, 10, width, num_classes=10, dropout=dropout
    )
    for width, dropout in ((1, 0.0), (2, 0.0), (2, 0.3))
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
