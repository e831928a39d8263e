"""``conv_bn_act`` in inference, on the convolutions of the networks."""

from .networks import network
from .suites import SHAPES_OF, convolutions, params

NETS = [network(name) for name in SHAPES_OF]
FIRST = network("resnet50").blocks[1]
INNER = [conv for net in NETS for conv in net.convs()]
LAST = [block.convs[-1] for net in NETS for block in net.blocks if not block.squeeze]


@params(convolutions("conv_bn_act", INNER, ("inference",), smoke=FIRST.convs[1:2]))
def test_conv_bn_act(race, spec):
    race(spec)


@params(convolutions("conv_bn_act+residual", LAST, ("inference",), smoke=FIRST.convs[2:]))
def test_conv_bn_act_residual(race, spec):
    race(spec)
