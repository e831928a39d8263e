"""squeeze_excite in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import cuda_host
import test_squeeze_excite as se
from accuracy import assert_as_accurate_as_eager
from cases import SHAPES, layouts, misaligned
from cuda_host import ORDERS, CudaError
from cuda_ops import cases_of, cuda_on_host
from harness import Unchanged, assert_same_bits, check_derivatives, double, gradients

STREAMING = [
    "stream_stats_kernel", "se_image_sums_kernel", *["se_linear_kernel"] * 2,
    "stream_fwd_apply_kernel",
]  # fmt: skip
STREAMING_BACKWARD = [
    "se_gates_kernel", "stream_bwd_reduce_kernel", "se_image_sums_kernel",
    *["se_linear_t_kernel"] * 2, "se_outer_kernel", "stream_bwd_apply_kernel",
]  # fmt: skip
ONE, ONE_BACKWARD = ["se_fwd_cluster_kernel"], ["se_bwd_cluster_kernel", "se_outer_kernel"]


@cases_of(se.OPTIONS)
def test_values_and_gradients(case, dtype):
    options = se.OPTIONS[case]
    tensors = se.tensors_of(*SHAPES[case], dtype, **options)
    with cuda_on_host(variant="streaming") as launched:
        se.check_against_reference(tensors, options)
    assert launched == STREAMING + STREAMING_BACKWARD


# Shape, squeezed channels, SMs, the blocks of the cluster, and KiB that a block may hold: of
# float32, of 16-bit types.
CLUSTERS = {
    "one_block": ((3, 24, 5, 5), 6, 3, 1, (227, 227)),
    "two_for_size": ((2, 64, 9, 7), 4, 2, 2, (20, 14)),
    "four_for_idle_sms": ((1, 64, 16, 16), 4, 4, 4, (227, 227)),
    "eight_for_size": ((1, 40, 23, 21), 10, 1, 8, (28, 18)),
    "wide": ((1, 2048, 3, 3), 16, 1, 1, (227, 227)),
    "many_squeezed": ((2, 16, 5, 5), 300, 2, 1, (227, 227)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CLUSTERS)
def test_one_launch(case, dtype):
    shape, squeezed, sms, blocks, kib = CLUSTERS[case]
    shared = kib[dtype != torch.float32] * 1024
    tensors = se.tensors_of(shape, "NHWC", dtype, squeezed=squeezed)
    with cuda_on_host(variant="whole", sms=sms, shared_bytes=shared) as launched:
        se.check_against_reference(tensors)
    assert launched == ONE + ONE_BACKWARD and cuda_host.clusters == [blocks, blocks, 1]


# Channels and pixels of 16-bit images that so many blocks of 227 KiB hold, and no fewer: ResNet's
# stages, MobileNet's and EfficientNet's.
FEWEST = {
    1: ((2048, 7), (128, 28), (256, 14), (512, 7), (1152, 7)),
    2: ((1024, 14), (64, 56), (240, 28), (672, 14)),
    4: ((512, 28), (128, 56)),
    8: ((256, 56), (64, 112)),
}


@pytest.mark.parametrize("blocks,channels,side", [(b, *s) for b in FEWEST for s in FEWEST[b]])
def test_the_fewest_blocks_that_hold_an_image(blocks, channels, side):
    shape = 1, channels, side, side
    tensors = se.tensors_of(shape, "NHWC", torch.bfloat16, squeezed=8, residual=False)
    with cuda_on_host(variant="whole", sms=1), torch.no_grad():
        y = se.fused()(**tensors)
    assert cuda_host.clusters == [blocks]
    ref, eager = (se.plain()(**t) for t in (double(tensors), tensors))
    assert_as_accurate_as_eager(y, ref, eager)


@pytest.mark.parametrize("post_act,residual,blocks", [
    ("silu", True, 2), ("relu", False, 2), ("leaky_relu", True, 1), ("identity", False, 1),
])  # fmt: skip
def test_one_launch_with_another_activation(post_act, residual, blocks):
    """Without a mask the backward holds x besides dy, and takes twice the blocks here."""
    options = dict(post_act=post_act, act="silu", gate="hard_sigmoid", residual=residual)
    tensors = se.tensors_of((2, 64, 16, 16), "NHWC", torch.float32, squeezed=3, **options)
    with cuda_on_host(variant="whole", sms=2, shared_bytes=80 * 1024) as launched:
        se.check_against_reference(tensors, options)
    assert launched == ONE + ONE_BACKWARD and cuda_host.clusters == [1, blocks, 1]


def test_one_launch_asked_for_where_it_does_not_fit():
    tensors = se.tensors_of((2, 64, 16, 16), "NHWC", torch.float32, squeezed=3)
    machine = dict(shared_bytes=80 * 1024, major=8)
    failing = pytest.raises(CudaError, match="squeeze_excite_backward: operation not supported")
    with cuda_on_host(variant="whole", **machine) as launched, failing:
        gradients(se.fused("silu"), tensors)
    assert launched == ONE


@pytest.mark.parametrize("neighbours,kib,blocks", [
    (8, 227, 8), (5, 227, 4), (1, 227, 1), (2, 48, 2), (1, 48, 0),
])  # fmt: skip
def test_a_cluster_that_the_device_cannot_run(neighbours, kib, blocks):
    """A smaller one takes its place, or the streaming passes where that does not hold an image."""
    tensors = se.tensors_of((1, 64, 16, 16), "NHWC", torch.float32, squeezed=4)
    machine = dict(sms=8, blocks_of_sm=1, cluster_sms=neighbours, shared_bytes=kib * 1024)
    with cuda_on_host(**machine) as launched:
        se.check_against_reference(tensors)
    assert launched == (ONE + ONE_BACKWARD if blocks else STREAMING + STREAMING_BACKWARD)
    if blocks:
        assert cuda_host.clusters == [blocks, blocks, 1]


def test_what_decides():
    """The layout, the size of the weights, and what the device can hold."""
    one, streaming = ONE + ONE_BACKWARD, STREAMING + STREAMING_BACKWARD
    for shape, layout, squeezed, post_act, machine, wanted in (
        ((2, 64, 7, 7), "NHWC", 4, "relu", {}, one),
        ((2, 64, 7, 7), "NCHW", 4, "relu", {}, streaming),
        ((2, 60, 7, 7), "NHWC", 4, "relu", {}, streaming),
        ((2, 64, 2, 2), "NHWC", 16, "relu", {}, streaming),
        ((2, 64, 16, 16), "NHWC", 4, "silu", dict(shared_bytes=48 * 1024), one),
        ((2, 64, 16, 16), "NHWC", 4, "relu", dict(shared_bytes=48 * 1024, major=8), streaming),
        ((2, 64, 16, 16), "NHWC", 4, "relu", dict(shared_bytes=80 * 1024, major=8), one),
        (
            (2, 64, 16, 16), "NHWC", 4, "silu", dict(shared_bytes=80 * 1024, major=8),
            ONE + STREAMING_BACKWARD,
        ),
    ):  # fmt: skip
        tensors = se.tensors_of(shape, layout, torch.float32, squeezed=squeezed)
        with cuda_on_host(**machine) as launched:
            gradients(se.fused(post_act), tensors)
        assert launched == wanted, (shape, layout, post_act, machine)


@layouts
def test_more_images_than_a_block_of_the_mlp_takes(layout):
    tensors = se.tensors_of((19, 24, 3, 3), layout, torch.float32, squeezed=6)
    with cuda_on_host():
        se.check_against_reference(tensors)


@layouts
def test_misaligned_views_over_a_sentinel(layout):
    tensors = se.tensors_of((3, 16, 2, 4), layout, torch.bfloat16)
    views, buffers = dict(tensors), []
    for name in ("x", "residual"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(), Unchanged(*buffers):
        se.check_against_reference(views)


@layouts
def test_derivatives(layout):
    tensors = se.tensors_of((2, 3, 3, 3), layout, torch.float64)
    with cuda_on_host():
        check_derivatives(se.fused("silu", act="silu"), tensors)


@pytest.mark.parametrize("variant", ["streaming", "whole"])
def test_same_bits_in_every_order(variant):
    tensors = se.tensors_of((3, 40, 9, 7), "NHWC", torch.float16, squeezed=10)
    found = []
    for order in ORDERS:
        with cuda_on_host(variant=variant, order=order):
            found.append(gradients(se.fused(), tensors))
    for other in found[1:]:
        assert_same_bits(other, found[0])
