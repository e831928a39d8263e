"""Single residual blocks with the identity as shortcut: training step and inference."""

from .suites import blocks, params

# name, input channels, planes, size
BLOCKS = (
    ("BasicBlock", 64, 64, 56),
    ("BasicBlock", 256, 256, 14),
    ("Bottleneck", 256, 64, 56),
    ("Bottleneck", 1024, 256, 14),
    ("SEBasicBlock", 64, 64, 56),
    ("SEBottleneck", 256, 64, 56),
    ("SEBottleneck", 1024, 256, 14),
)


@params(blocks(BLOCKS, "training", smoke=("SEBottleneck-training-8x256x56x56-fp32",)))
def test_block_training(race, spec):
    race(spec)


@params(blocks(BLOCKS, "inference", smoke=("BasicBlock-inference-8x64x56x56-fp32",)))
def test_block_inference(race, spec):
    race(spec)
