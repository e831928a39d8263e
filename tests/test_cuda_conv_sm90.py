"""The convolution kernels of sm_90a (tensor copies, wgmma), on the host simulator."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
import test_conv_bn_act as inference
import test_conv_stats as training
from accuracy import assert_as_accurate_as_eager
from cases import Conv, misaligned, values_per_channel
from cuda_host import ORDERS, CudaError
from cuda_ops import cuda_on_host
from fusedres import reference, triton_kernels
from harness import Unchanged, double, same_bits

KERNEL = "conv_sm90_kernel"
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# The columns of a tile; tiles have 128 pixels, steps 64 channels. What each case has that others
# have not: steps that channels do not fill, tiles that span images, more tiles than SMs (4) ...
CASES = {
    "1x1": (64, Conv((2, 72, 9, 7), (40, 72, 1, 1), padding=(0, 0), bias=True)),
    "1x1_many_tiles": (64, Conv((1, 8, 40, 16), (136, 8, 1, 1), padding=(0, 0))),
    "1x1_stride": (128, Conv((3, 16, 9, 8), (24, 16, 1, 1), stride=(2, 2), padding=(0, 0))),
    "3x3": (64, Conv((2, 64, 9, 10), (64, 64, 3, 3))),
    "3x3_stride": (128, Conv((2, 24, 11, 8), (136, 24, 3, 3), stride=(2, 2))),
    "3x3_dilated": (64, Conv((1, 8, 11, 9), (8, 8, 3, 3), padding=(2, 2), dilation=(2, 2))),
    "3x3_unpadded": (256, Conv((1, 136, 5, 6), (264, 136, 3, 3), padding=(0, 0))),
    "row": (64, Conv((2, 8, 5, 12), (16, 8, 1, 3), stride=(1, 2), padding=(0, 1))),
    "column": (64, Conv((2, 8, 12, 5), (16, 8, 4, 2), stride=(3, 1), padding=(3, 1), dilation=(1, 3))),
    "one_pixel": (128, Conv((5, 64, 1, 1), (72, 64, 3, 3))),
}  # fmt: skip
OPTIONS = {"3x3": dict(act="identity"), "1x1_stride": dict(act="silu"), "row": dict(residual=False)}


def options_of(case):
    return dict(act="relu", residual=True) | OPTIONS.get(case, {})


def conv_bn_act(conv, act, tensors):
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    return cuda_ops.conv_bn_act(*(tensors[n] for n in names), 1e-5, *conv.geometry, act)


def check_conv_bn_act(conv, act, tensors):
    out = conv_bn_act(conv, act, tensors)
    eager, ref = (inference.run_plain(conv, act, **t) for t in (tensors, double(tensors)))
    assert_as_accurate_as_eager(out, ref, eager)


def conv_stats(conv, tensors, act="relu"):
    """y, mean and variance; before the convolution the norm and act, where there is a mean"""
    names = "x", "bn_weight", "bn_bias", "mean", "var"
    operands = *(tensors[n] for n in names), False, 1e-5, act, tensors["weight"], tensors["bias"]
    return cuda_ops.conv_stats(*operands, *conv.geometry, True)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_conv_bn_act(case, dtype):
    columns, conv = CASES[case]
    options = dict(act="relu", residual=True) | OPTIONS.get(case, {})
    tensors = inference.tensors_of(conv, dtype, **options)
    with cuda_on_host(variant=f"sm90_{columns}") as launched:
        check_conv_bn_act(conv, options["act"], tensors)
    assert launched == [KERNEL]


# With and without a norm before the convolution, and the activation behind it.
TRAINING = {
    "1x1": dict(bn="running", act="relu"),
    "1x1_many_tiles": dict(bn=None),
    "3x3": dict(bn="running", act="relu"),
    "3x3_stride": dict(bn="running", act="identity"),
    "3x3_unpadded": dict(bn=None),
    "column": dict(bn="running", act="relu"),
    "one_pixel": dict(bn="running", act="relu"),
}


@dtypes
@pytest.mark.parametrize("case", TRAINING)
def test_conv_stats(case, dtype):
    columns, conv = CASES[case]
    options = TRAINING[case]
    tensors = training.tensors_of(conv, dtype, **options)
    with cuda_on_host(variant=f"sm90_{columns}") as launched:
        y, *found = conv_stats(conv, tensors, options.get("act", "identity"))
    assert launched == [KERNEL, "bn_stats_finalize_kernel"]
    plain = training.plain(conv, **options)
    assert_as_accurate_as_eager(y, plain(**double(tensors)), plain(**tensors))
    # Of the values as they were stored.
    ref, eager = reference.bn_stats(y.double()), reference.bn_stats(y)
    for out, ref_, eager_ in zip(found, ref, eager, strict=True):
        assert_as_accurate_as_eager(out, ref_, eager_, count=values_per_channel(y))


def test_same_bits_in_every_order():
    columns, conv = CASES["1x1_many_tiles"]
    tensors = training.tensors_of(conv, torch.bfloat16, bn=None)
    found = []
    for order in ORDERS:
        with cuda_on_host(variant=f"sm90_{columns}", order=order, sms=2):
            found.append(conv_stats(conv, tensors))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, found[0], strict=True))


def test_the_number_of_columns_changes_no_bit():
    """An element's products are added up in the same order whatever its tile is."""
    conv = CASES["3x3"][1]
    tensors = inference.tensors_of(conv, torch.bfloat16)
    found = []
    for columns in (64, 128, 256):
        with cuda_on_host(variant=f"sm90_{columns}"):
            found.append(conv_bn_act(conv, "relu", tensors))
    assert all(same_bits(other, found[0]) for other in found[1:])


def test_views_over_a_sentinel():
    columns, conv = CASES["3x3_stride"]
    tensors = inference.tensors_of(conv, torch.bfloat16)
    views, buffers = dict(tensors), []
    for name in ("bn_weight", "mean"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(variant=f"sm90_{columns}"), Unchanged(*buffers):
        check_conv_bn_act(conv, "relu", views)


BY_SIZE = Conv((1, 64, 12, 12), (64, 64, 3, 3))
# What another kernel has to do, and the reason.
OTHERS = {
    "an older GPU": (BY_SIZE, dict(major=8)),
    "groups": (Conv((1, 128, 4, 4), (128, 64, 3, 3), groups=2), {}),
    "rows of 8 bytes": (Conv((1, 68, 4, 4), (64, 68, 1, 1), padding=(0, 0)), {}),
    "a stride of 9": (Conv((1, 64, 12, 12), (8, 64, 3, 3), stride=(9, 9)), {}),
    "a window of 258": (
        Conv((1, 64, 1, 300), (8, 64, 1, 2), padding=(0, 0), dilation=(1, 257)), {}),
}  # fmt: skip


def test_it_is_taken_where_it_can_be():
    with cuda_on_host() as launched:
        check_conv_bn_act(BY_SIZE, "relu", inference.tensors_of(BY_SIZE, torch.float16))
    assert launched == [KERNEL]


@pytest.mark.parametrize("case", OTHERS)
def test_it_is_left_out_where_it_cannot_be(case):
    conv, machine = OTHERS[case]
    tensors = inference.tensors_of(conv, torch.float16)
    with cuda_on_host(**machine) as launched:
        check_conv_bn_act(conv, "relu", tensors)
    assert launched == ["conv_bn_act_fwd_kernel"]
    asked_for = cuda_on_host(variant="sm90_64", **machine)
    with asked_for, pytest.raises(CudaError, match="operation not supported"):
        conv_bn_act(conv, "relu", tensors)


def test_an_activation_other_than_relu_before_it_is_left_to_another_kernel():
    tensors = training.tensors_of(BY_SIZE, torch.float16, bn="running")
    with cuda_on_host() as launched:
        conv_stats(BY_SIZE, tensors, "silu")
    assert launched == ["conv_stats_fwd_kernel", "bn_stats_finalize_kernel"]


@pytest.mark.parametrize("conv,norm_act,tried", [
    (BY_SIZE, None, True), (BY_SIZE, "relu", True), (BY_SIZE, "silu", False),
    (OTHERS["groups"][0], None, False), (OTHERS["rows of 8 bytes"][0], None, False),
    (Conv((1, 2056, 1, 1), (8, 2056, 1, 1)), "relu", False),
])  # fmt: skip
def test_its_tiles_are_measured_where_it_runs(conv, norm_act, tried, monkeypatch):
    x, weight = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in (conv.x, conv.weight))
    known = triton_kernels.ways()
    monkeypatch.setattr(known, "is_hopper", lambda device: True)
    found = known.native_ways(lambda variant: None, x, weight, conv.groups, norm_act)
    wanted = [4, 5, 6] if tried else []  # ConvVariant's kSm90x64 and on
    assert [known.variant(way) for way in found if way.tma] == wanted
    monkeypatch.setattr(known, "is_hopper", lambda device: False)
    found = known.native_ways(lambda variant: None, x, weight, conv.groups, norm_act)
    assert not any(way.tma for way in found)
