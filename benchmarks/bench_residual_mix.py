"""``residual_mix``: stochastic depth with ReLU, and a highway network's gate."""

import pytest
import torch

from .op_cases import OPS, case
from .selection import full, select

SHAPES = select([(8, 256, 56, 56)], [(8, 512, 28, 28)])


@pytest.mark.parametrize("direction", select(["both"], ["forward", "backward"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["residual_mix, stochastic depth", "residual_mix, highway"])
def test_residual_mix(race, op, shape, dtype, direction):
    race(case(OPS[op], shape, dtype, direction, compiled=full()))
