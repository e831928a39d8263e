"""``residual_mix``: stochastic depth with ReLU, and a highway network's gate."""

from .suites import block_sizes, ops, params

SIZES = block_sizes("resnet50")


@params(ops("stochastic_depth", SIZES))
def test_stochastic_depth(race, spec):
    race(spec)


@params(ops("highway", SIZES))
def test_highway(race, spec):
    race(spec)
