"""``conv_stats``: a training convolution, the batch norm before it and statistics behind."""

from .networks import network
from .suites import SHAPES_OF, convolutions, params

BLOCKS = [block for name in SHAPES_OF for block in network(name).blocks]
CONVS = [conv for block in BLOCKS for conv in block.convs[1:]]
SMOKE = network("resnet50").blocks[1].convs[1:2]


@params(convolutions("conv_stats", CONVS, ("both", "forward", "backward"), SMOKE))
def test_conv_stats(race, spec):
    race(spec)
