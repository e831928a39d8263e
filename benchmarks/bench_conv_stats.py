"""``conv_stats``: a training convolution, the batch norm before it and statistics behind."""

import pytest
import torch

from .conv_cases import conv_case
from .selection import full, label, select

# input, output channels, kernel, stride
CASES = select(
    [((8, 64, 56, 56), 64, 3, 1)],
    [
        ((8, 64, 56, 56), 256, 1, 1),
        ((8, 128, 56, 56), 128, 3, 2),
        ((8, 256, 14, 14), 1024, 1, 1),
        ((8, 512, 7, 7), 512, 3, 1),
    ],
)


@pytest.mark.parametrize("dtype", select([torch.float32], [torch.bfloat16]))
@pytest.mark.parametrize("spec", CASES, ids=label)
def test_conv_stats(race, spec, dtype):
    shape, out, kernel, stride = spec
    race(conv_case("conv_stats", shape, out, kernel, dtype, stride, compiled=full()))
