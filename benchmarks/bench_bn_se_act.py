"""``bn_se_act``: batch norm, squeeze-excite, residual add and ReLU."""

from .suites import block_sizes, ops, params


@params(ops("bn_se_act+residual", block_sizes("se_resnet50"), table=((256, 56), (1024, 14))))
def test_bn_se_act(race, spec):
    race(spec)
