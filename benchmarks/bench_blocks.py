"""Single residual blocks with the identity as shortcut: training step and inference."""

import pytest
import torch

from .model_cases import block, inference_case, training_case
from .selection import full, label, select

# name, input channels, planes, batch, size
BLOCKS = select(
    [("BasicBlock", 64, 64, 8, 56), ("SEBottleneck", 256, 64, 8, 56)],
    [
        ("Bottleneck", 256, 64, 8, 56),
        ("SEBasicBlock", 64, 64, 8, 56),
        ("Bottleneck", 1024, 256, 8, 14),
        ("SEBottleneck", 1024, 256, 8, 14),
    ],
)
DTYPES = select([torch.float32], [torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", BLOCKS, ids=label)
def test_block_training(race, spec, dtype):
    race(training_case(block(*spec), dtype, compiled=full()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", BLOCKS, ids=label)
def test_block_inference(race, spec, dtype):
    race(inference_case(block(*spec), dtype, compiled=full()))
