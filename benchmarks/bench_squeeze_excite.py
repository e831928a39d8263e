"""``squeeze_excite`` with residual add and ReLU."""

from .suites import block_sizes, ops, params


@params(ops("squeeze_excite+residual", block_sizes("se_resnet50"), table=((256, 56), (1024, 14))))
def test_squeeze_excite(race, spec):
    race(spec)
