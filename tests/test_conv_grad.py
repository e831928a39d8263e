"""conv_grad: the gradient through a convolution and the norm and activation before it."""

from __future__ import annotations

import pytest
import torch

import test_conv_stats as forward
from accuracy import assert_as_accurate_as_eager
from cases import CONVS, Conv, arrange, randn, values_per_channel
from fusedres import reference
from fusedres.ops.conv_grad import op as conv_grad

EPS = 1e-5
NAMES = "dx", "dbn_weight", "dbn_bias", "h"


def arguments(conv: Conv, dtype, batch_stats: bool, act: str, make_h: bool = True) -> tuple:
    t = forward.tensors_of(conv, dtype, "running")
    if batch_stats:
        t["mean"], t["var"] = reference.bn_stats(t["x"])
    norm = t["bn_weight"], t["bn_bias"], t["mean"], t["var"], batch_stats, EPS, act
    dy = arrange(randn(conv.out, dtype), conv.layout)
    return dy, t["weight"], t["x"], *norm, *conv.geometry, make_h


def by_autograd(dy, weight, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, *geometry):
    """The op's results as PyTorch finds them, in x's dtype."""
    x, bn_weight, bn_bias = (t.detach().requires_grad_() for t in (x, bn_weight, bn_bias))
    with torch.enable_grad():
        h, _ = reference.bn_act(x, bn_weight, bn_bias, None, mean, var, batch_stats, eps, act)
        h = h.to(x.dtype)
        y = torch.conv2d(h, weight, None, *geometry)
    return *torch.autograd.grad(y, (x, bn_weight, bn_bias), dy), h.detach()


def check(args: tuple) -> None:
    found = conv_grad(*args)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in args[:-1]]
    wanted, eager = by_autograd(*doubles), by_autograd(*args[:-1])
    weight, x = args[1:3]
    counts = weight[0].numel(), values_per_channel(x), values_per_channel(x), 1
    for name, ours, ref, theirs, count in zip(NAMES, found, wanted, eager, counts, strict=True):
        assert_as_accurate_as_eager(ours, ref, theirs, count=count, name=name)


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("case", ["3x3", "3x3_nhwc_stride", "grouped_nhwc", "1x1_images"])
def test_the_composition_is_what_autograd_finds(case, batch_stats):
    check(arguments(CONVS[case], torch.float32, batch_stats, "silu"))
