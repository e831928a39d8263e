"""``squeeze_excite`` with residual add and ReLU."""

import pytest
import torch

from .op_cases import OPS, case
from .selection import full, select

SHAPES = select([(8, 256, 56, 56)], [(8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)])


@pytest.mark.parametrize("direction", select(["both"], ["forward", "backward"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_squeeze_excite(race, shape, dtype, direction):
    race(case(OPS["squeeze_excite + residual"], shape, dtype, direction, compiled=full()))
