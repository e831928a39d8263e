"""squeeze_excite in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import cuda_host
import test_squeeze_excite as se
from cases import SHAPES, layouts, misaligned
from cuda_host import ORDERS
from cuda_ops import cases_of, cuda_on_host
from harness import Unchanged, assert_same_bits, check_derivatives, gradients


@cases_of(se.OPTIONS)
def test_values_and_gradients(case, dtype):
    options = se.OPTIONS[case]
    tensors = se.tensors_of(*SHAPES[case], dtype, **options)
    with cuda_on_host(variant="streaming"):
        se.check_against_reference(tensors, options)


# Shape, squeezed channels, SMs, the blocks of the cluster, and KiB that a block may hold: of
# float32, of 16-bit types.
CLUSTERS = {
    "one_block": ((3, 24, 5, 5), 6, 3, 1, (227, 227)),
    "two_for_size": ((2, 64, 9, 7), 4, 2, 2, (20, 14)),
    "four_for_idle_sms": ((1, 64, 16, 16), 4, 4, 4, (227, 227)),
    "eight_for_size": ((1, 40, 23, 21), 10, 1, 8, (28, 18)),
    "wide": ((1, 2048, 3, 3), 16, 1, 1, (227, 227)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CLUSTERS)
def test_one_launch(case, dtype):
    shape, squeezed, sms, blocks, kib = CLUSTERS[case]
    shared = kib[dtype != torch.float32] * 1024
    tensors = se.tensors_of(shape, "NHWC", dtype, squeezed=squeezed)
    with cuda_on_host(variant="whole", sms=sms, shared_bytes=shared) as launched:
        se.check_against_reference(tensors)
    assert launched[0] == "se_fwd_cluster_kernel" and cuda_host.clusters[0] == blocks


@pytest.mark.parametrize("post_act", ["silu", "identity"])
def test_one_launch_with_another_activation(post_act):
    options = dict(post_act=post_act, act="silu", gate="hard_sigmoid", residual=False)
    tensors = se.tensors_of((2, 32, 7, 7), "NHWC", torch.float32, squeezed=3, **options)
    with cuda_on_host(variant="whole"):
        se.check_against_reference(tensors, options)


def test_what_decides():
    """The layout, the size of the weights, and what the device can hold."""
    one, streaming = "se_fwd_cluster_kernel", "stream_stats_kernel"
    for shape, layout, squeezed, machine, wanted in (
        ((2, 64, 7, 7), "NHWC", 4, {}, one),
        ((2, 64, 7, 7), "NCHW", 4, {}, streaming),
        ((2, 60, 7, 7), "NHWC", 4, {}, streaming),
        ((2, 64, 2, 2), "NHWC", 16, {}, streaming),
        ((2, 64, 16, 16), "NHWC", 4, dict(shared_bytes=48 * 1024), one),
        ((2, 64, 16, 16), "NHWC", 4, dict(shared_bytes=48 * 1024, major=8), streaming),
    ):
        tensors = se.tensors_of(shape, layout, torch.float32, squeezed=squeezed)
        with cuda_on_host(**machine) as launched:
            se.fused()(**tensors)
        assert launched[0] == wanted, (shape, layout, machine)


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
