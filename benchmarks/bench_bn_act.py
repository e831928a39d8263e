"""``bn_act``: batch norm, residual add and ReLU."""

from .suites import block_sizes, inner_sizes, ops, params

ENDS = block_sizes("resnet18", "resnet50")


@params(ops("bn_act", inner_sizes()))
def test_bn_act(race, spec):
    race(spec)


@params(ops("bn_act+residual", ENDS, table=((64, 56), (256, 56))))
def test_bn_act_residual(race, spec):
    race(spec)
