"""ResNeXt: a grouped 3x3 convolution in the bottleneck (Xie et al. 2017).

``python examples/resnext.py``; ``--smoke`` takes two steps.
"""

from __future__ import annotations

import sys
from functools import partial

from _digits import compare, network
from torch import nn

import fusedres


def bottleneck(inplanes: int, planes: int, *args, **options) -> nn.Module:
    return fusedres.Bottleneck(inplanes, planes // 4, *args, **options)


MODELS = {
    f"{groups} groups": partial(
        network, partial(bottleneck, groups=groups, base_width=64 // groups)
    )
    for groups in (1, 4)
}


def main(argv: list[str] | None = None) -> int:
    return compare(__doc__, MODELS, argv)


if __name__ == "__main__":
    sys.exit(main())
