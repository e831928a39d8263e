"""``conv_bn_act`` in inference, on ResNet-50's shapes. Here torch.compile does not freeze."""

import pytest
import torch

from .conv_cases import conv_case
from .selection import full, label, select

# name, input, output channels, kernel, stride
CASES = select(
    [
        ("conv_bn_act", (8, 64, 56, 56), 64, 3, 1),
        ("conv_bn_act + residual", (8, 64, 56, 56), 256, 1, 1),
    ],
    [
        ("conv_bn_act", (8, 3, 224, 224), 64, 7, 2),
        ("conv_bn_act", (8, 256, 56, 56), 64, 1, 1),
        ("conv_bn_act", (8, 128, 56, 56), 128, 3, 2),
        ("conv_bn_act + residual", (8, 256, 14, 14), 1024, 1, 1),
        ("conv_bn_act", (8, 512, 7, 7), 512, 3, 1),
    ],
)


@pytest.mark.parametrize("dtype", select([torch.float32], [torch.bfloat16]))
@pytest.mark.parametrize("spec", CASES, ids=label)
def test_conv_bn_act(race, spec, dtype):
    name, shape, out, kernel, stride = spec
    race(conv_case(name, shape, out, kernel, dtype, stride, compiled=full()))
