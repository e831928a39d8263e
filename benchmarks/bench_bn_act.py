"""``bn_act``: batch norm, residual add and ReLU."""

import pytest
import torch

from .op_cases import OPS, case
from .selection import full, select

SHAPES = select([(8, 64, 56, 56)], [(8, 256, 56, 56), (8, 512, 28, 28), (8, 2048, 7, 7)])


@pytest.mark.parametrize("direction", select(["both"], ["forward", "backward"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["bn_act", "bn_act + residual"])
def test_bn_act(race, op, shape, dtype, direction):
    race(case(OPS[op], shape, dtype, direction, compiled=full()))
