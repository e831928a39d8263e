"""conv_bn_act and conv_stats in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import cuda_host
import test_conv_bn_act as inference
import test_conv_stats as training
from accuracy import assert_as_accurate_as_eager
from cases import Conv, misaligned, values_per_channel
from cuda_host import ORDERS
from cuda_ops import TILES, conv_bn_act, conv_stats, cuda_on_host
from fusedres import reference
from harness import Unchanged, assert_same_bits, assert_same_non_finite, double

# Sizes that fill no tile and no pack, every kind of geometry, and more than one tile of everything.
CASES = {
    "1x1": Conv((2, 17, 5, 3), (20, 17, 1, 1), padding=(0, 0), bias=True),
    "1x1_stride": Conv((2, 24, 7, 5), (9, 24, 1, 1), stride=(2, 2), padding=(0, 0)),
    "1x1_padded": Conv((1, 8, 3, 4), (16, 8, 1, 1), padding=(1, 1), bias=True),
    "1x1_images": Conv((5, 40, 1, 1), (24, 40, 1, 1), padding=(0, 0)),
    "3x3": Conv((2, 24, 9, 7), (40, 24, 3, 3)),
    "3x3_stride": Conv((2, 16, 8, 7), (24, 16, 3, 3), stride=(2, 2), weight_layout="NHWC"),
    "dilated": Conv((1, 6, 11, 9), (7, 6, 3, 3), padding=(2, 2), dilation=(2, 2)),
    "grouped": Conv((2, 48, 4, 5), (80, 24, 3, 3), groups=2, stride=(1, 2), bias=True),
    "narrow_groups": Conv((2, 12, 4, 5), (20, 3, 3, 3), groups=4),
    "row_kernel": Conv((2, 8, 5, 12), (8, 8, 1, 3), stride=(1, 2), padding=(0, 1)),
    "stem": Conv((1, 3, 8, 7), (10, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
    "tiles": Conv((2, 72, 9, 8), (136, 72, 1, 1), padding=(0, 0)),
}
ACTS = dict(zip(CASES, 2 * ("relu", "identity", "silu", "relu6", "gelu", "hardswish"), strict=True))
NORMS = dict(zip(CASES, 4 * ("running", None, "running"), strict=True))
HALVES = torch.bfloat16, torch.float16
# Tiles of a few shapes with whole packs; by size, they get the smallest.
TILED = "3x3", "grouped", "tiles"
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=lambda v: str(v).removeprefix("torch."))


def infer(case: Conv, act: str, t: dict) -> torch.Tensor:
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    return conv_bn_act(*(t[n] for n in names), 1e-5, *case.geometry, act)


def train(case: Conv, act: str, t: dict, stats: bool = True) -> tuple[torch.Tensor, ...]:
    norm = t["bn_weight"], t["bn_bias"], t["mean"], t["var"], False, 1e-5, act
    return conv_stats(t["x"], *norm, t["weight"], t["bias"], *case.geometry, stats)


def check_inference(case: Conv, act: str, t: dict) -> torch.Tensor:
    y = infer(case, act, t)
    ref, eager = (inference.run_plain(case, act, **v) for v in (double(t), t))
    assert_as_accurate_as_eager(y, ref, eager)
    return y


def check_training(case: Conv, act: str, t: dict) -> tuple[torch.Tensor, ...]:
    y, mean, var = train(case, act, t)
    options = dict(bn=None if t["mean"] is None else "running", act=act)
    ref, eager = (training.plain(case, **options)(**v) for v in (double(t), t))
    assert_as_accurate_as_eager(y, ref, eager)
    wanted, eager = reference.bn_stats(y.double()), reference.bn_stats(y)
    for found, ref, plain in zip((mean, var), wanted, eager, strict=True):
        assert_as_accurate_as_eager(found, ref, plain, count=values_per_channel(y))
    return y, mean, var


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_inference(case, dtype):
    t = inference.tensors_of(CASES[case], dtype, residual=len(case) % 2 == 0)
    with cuda_on_host(major=8) as launched:
        check_inference(CASES[case], ACTS[case], t)
    assert launched == ["conv_bn_act_fwd_kernel"]


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_training(case, dtype):
    t = training.tensors_of(CASES[case], dtype, bn=NORMS[case])
    with cuda_on_host(major=8) as launched:
        check_training(CASES[case], ACTS[case], t)
    assert launched == ["conv_stats_fwd_kernel", "bn_stats_finalize_kernel"]


@pytest.mark.parametrize("tile", TILES[1:])
@pytest.mark.parametrize("case", TILED)
def test_every_tile(case, tile):
    conv, dtype = CASES[case], HALVES[len(tile) % 2]
    with cuda_on_host(variant=tile):
        check_inference(conv, "relu", inference.tensors_of(conv, dtype))
        for bn in ("running", None):
            check_training(conv, "relu", training.tensors_of(conv, dtype, bn=bn))


@pytest.mark.parametrize("k,sms,largest", [(72, 1, True), (64, 1, False), (72, 3, False)])
def test_the_largest_tile_is_for_channels_and_pixels_that_fill_it(k, sms, largest):
    """It is the one that needs more shared memory than a block has without asking."""
    conv = Conv((1, 8, 13, 10), (k, 8, 1, 1), padding=(0, 0))
    t = inference.tensors_of(conv, torch.float16)
    tiles = 64 * 1024  # beside them the kernel has a few KiB of static arrays
    with cuda_on_host(sms=sms, shared_bytes=tiles + 4096):
        check_inference(conv, "relu", t)
    with cuda_on_host(sms=sms, shared_bytes=tiles):
        if not largest:
            check_inference(conv, "relu", t)
            return
        with pytest.raises(
            cuda_host.CudaError, match="shared memory: .* the kernel may have 65536"
        ):
            infer(conv, "relu", t)


def test_without_statistics_there_is_one_launch():
    conv = CASES["3x3"]
    t = training.tensors_of(conv, torch.bfloat16, bn="running")
    with cuda_on_host() as launched:
        y, *nothing = train(conv, "relu", t, stats=False)
        assert launched == ["conv_stats_fwd_kernel"]
        assert_same_bits({"y": y}, {"y": train(conv, "relu", t)[0]})
    assert [v.numel() for v in nothing] == [0, 0]


@dtypes
def test_statistics_far_from_zero(dtype):
    """A bias that is many times the deviation of the products."""
    conv = Conv((3, 16, 9, 8), (24, 16, 1, 1), padding=(0, 0), bias=True)
    t = training.tensors_of(conv, dtype, bn=None)
    with cuda_on_host():
        check_training(conv, "relu", t | {"bias": torch.full((24,), 64.0, dtype=dtype)})


def test_the_padding_is_of_the_activation_not_of_what_goes_into_it():
    """act(bn(0)) is far from zero, and still a tap outside of the image counts nothing."""
    for conv in (Conv((2, 8, 4, 3), (8, 8, 3, 3)), Conv((2, 5, 4, 3), (8, 5, 3, 3))):
        t = training.tensors_of(conv, torch.float16, bn="running")
        with cuda_on_host():
            check_training(conv, "relu", t | {"bn_bias": torch.full_like(t["bn_bias"], 50.0)})


@pytest.mark.parametrize("case", ["1x1", "3x3"])
def test_without_affine_parameters(case):
    conv = CASES[case]
    missing = dict.fromkeys(("bn_weight", "bn_bias"))
    with cuda_on_host():
        check_inference(conv, "relu", inference.tensors_of(conv, torch.bfloat16) | missing)
        check_training(conv, "relu", training.tensors_of(conv, torch.bfloat16, "running") | missing)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_misaligned_views_over_a_sentinel(name):
    """The accesses are as wide as the addresses allow: none is wider (UBSan), all are right."""
    conv = Conv((2, 16, 5, 4), (24, 16, 3, 3), weight_layout="NHWC")
    t = inference.tensors_of(conv, torch.bfloat16)
    aligned = infer_on_host(conv, t)
    t[name], buffer = misaligned(t[name])
    with Unchanged(buffer):
        assert_same_bits({"y": infer_on_host(conv, t)}, {"y": aligned})


def infer_on_host(conv: Conv, t: dict) -> torch.Tensor:
    with cuda_on_host():
        return check_inference(conv, "relu", t)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value):
    conv = CASES["3x3"]
    t = training.tensors_of(conv, torch.bfloat16, bn="running")
    t["x"][1, 3, 2, 2] = value
    with cuda_on_host():
        y = train(conv, "relu", t)[0]
    assert_same_non_finite({"y": y}, {"y": training.plain(conv, "running")(**t)})


@pytest.mark.parametrize("case", ["1x1", "3x3"])
def test_same_bits_in_every_order(case):
    conv = CASES[case]
    t = training.tensors_of(conv, torch.bfloat16, bn="running")
    t2 = inference.tensors_of(conv, torch.bfloat16)
    found = []
    for order in ORDERS:
        with cuda_on_host(order=order):
            y, mean, var = train(conv, "silu", t)
            found.append(dict(y=y, mean=mean, var=var, z=infer(conv, "gelu", t2)))
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_float32_is_refused():
    conv = CASES["3x3"]
    with cuda_on_host(), pytest.raises(cuda_host.CudaError, match="not supported"):
        infer(conv, "relu", inference.tensors_of(conv, torch.float32))
