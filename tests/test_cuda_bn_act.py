"""bn_act in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import test_bn_act as bn
from accuracy import assert_as_accurate_as_eager
from cases import DTYPES, SHAPES, arrange, layouts, misaligned, values_per_channel
from cuda_host import ORDERS, CudaError
from cuda_ops import cases_of, cuda_on_host
from fusedres import reference
from fusedres.layout import pack_mask
from harness import (
    Unchanged,
    assert_same_bits,
    assert_same_non_finite,
    check_derivatives,
    gradients,
    same_bits,
)  # fmt: skip

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))


FORWARD = ["stream_stats_kernel", "bn_stats_finalize_kernel", "stream_fwd_apply_kernel"]
BACKWARD = ["stream_bwd_reduce_kernel", "bn_bwd_finalize_kernel", "stream_bwd_apply_kernel"]
FINDS_Z = ["bn_scale_kernel"]  # before a backward without a mask
WHOLE, WHOLE_BACKWARD = ["bn_act_fwd_whole_kernel"], ["bn_act_bwd_whole_kernel"]


@cases_of(bn.OPTIONS)
def test_training(case, dtype):
    act, residual = (bn.OPTIONS[case][k] for k in ("act", "residual"))
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=residual)
    with cuda_on_host(variant="streaming") as launched:
        bn.check_against_reference(tensors, act)
    saved_mask = residual and act in reference.MASKED_ACTS
    finds_z = act != "identity" and not saved_mask
    assert launched == FORWARD + FINDS_Z * finds_z + BACKWARD


# The number of SMs decides how many rows a block holds; 227 KiB of shared memory are for two blocks.
WHOLE_CASES = {
    "one_tile": ("NHWC", (1, 24, 5, 5), "relu6", True, 4),
    "several_tiles": ("NHWC", (2, 64, 14, 14), "relu", True, 4),
    "two_column_blocks": ("NHWC", (1, 512, 5, 5), "identity", True, 4),
    "finds_z": ("NHWC", (3, 16, 9, 7), "relu", False, 2),
    "any_activation": ("NHWC", (2, 40, 7, 7), "silu", True, 3),
    "few_pixels": ("NCHW", (2, 24, 1, 5), "relu6", True, 4),
    "many_packs_a_thread": ("NCHW", (2, 64, 14, 12), "relu", True, 1),
    "two_tiles_of_a_channel": ("NCHW", (15, 3, 24, 24), "silu", False, 4),
    "a_tile_that_ends_inside_of_an_image": ("NCHW", (47, 1, 14, 14), "relu", False, 4),
    "channels_that_fill_no_block": ("NCHW", (5, 70, 7, 7), "identity", True, 4),
    "two_tiles_of_an_image": ("NCHW", (1, 1, 93, 95), "gelu", True, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WHOLE_CASES)
def test_one_launch(case, dtype):
    layout, shape, act, residual, sms = WHOLE_CASES[case]
    tensors = bn.tensors_of(shape, layout, dtype, residual=residual)
    with cuda_on_host(variant="whole", sms=sms) as launched:
        bn.check_against_reference(tensors, act)
    assert launched == WHOLE + WHOLE_BACKWARD


@layouts
def test_one_launch_with_running_statistics(layout):
    """Their gradients have no q and r."""
    tensors = bn.tensors_of((2, 32, 7, 7), layout, torch.float32, training=False)
    with cuda_on_host(variant="whole") as launched:
        bn.check_against_reference(tensors, "relu")
    assert launched == [*FINDS_Z, "stream_fwd_apply_kernel", *WHOLE_BACKWARD]


@pytest.mark.parametrize("layout,shape", [
    ("NHWC", (1, 256, 14, 14)), ("NCHW", (1, 64, 32, 40)),
])  # fmt: skip
def test_the_size_decides(layout, shape):
    """x alone fits on the chip where x and dy do not; a GPU with fewer SMs holds neither."""
    tensors = bn.tensors_of(shape, layout, torch.float32)
    for sms, forward, backward in (
        (4, WHOLE, WHOLE_BACKWARD),
        (2, WHOLE, BACKWARD),
        (1, FORWARD, BACKWARD),
    ):
        with cuda_on_host(sms=sms) as launched:
            gradients(bn.fused(), tensors, constants=bn.CONSTANTS)
        assert launched == forward + backward, sms


EIGHT_TILES, FOUR_TILES = (2, 64, 23, 22), (2, 64, 14, 14)


@pytest.mark.parametrize("shape,machine,whole", [
    (EIGHT_TILES, {}, True),
    (EIGHT_TILES, dict(blocks_of_sm=1), False),  # of which there are four
    (FOUR_TILES, dict(blocks_of_sm=1), True),
])  # fmt: skip
def test_the_device_decides(shape, machine, whole):
    """How many blocks it runs at once."""
    tensors = bn.tensors_of(shape, "NHWC", torch.float32)
    with cuda_on_host(**machine) as launched:
        gradients(bn.fused(), tensors, constants=bn.CONSTANTS)
    assert launched == (WHOLE + WHOLE_BACKWARD if whole else FORWARD + BACKWARD)


@pytest.mark.parametrize("channels,machine", [(5, {}), (64, dict(blocks_of_sm=1))])
def test_one_launch_asked_for_where_it_does_not_fit(channels, machine):
    tensors = bn.tensors_of((2, channels, 23, 22), "NHWC", torch.float32)
    refused = pytest.raises(CudaError, match="operation not supported")
    with cuda_on_host(variant="whole", **machine), refused:
        bn.fused()(**tensors)


@pytest.mark.parametrize("layout,shape,direction", [
    ("NHWC", (1, 256, 25, 16), "forward"),
    ("NHWC", (1, 256, 27, 16), "no"),
    ("NHWC", (1, 256, 12, 16), "both"),
    ("NCHW", (2, 8, 116, 64), "forward"),
    ("NCHW", (2, 8, 120, 64), "no"),
    ("NCHW", (2, 8, 56, 64), "both"),
])  # fmt: skip
def test_what_registers_and_shared_memory_hold(layout, shape, direction):
    """An SM's share of a tensor of 25.7 MB on 132 of them is 195 KB, 380 rows of the first shape."""
    tensors = bn.tensors_of(shape, layout, torch.bfloat16)
    with cuda_on_host(sms=1) as launched:
        bn.check_against_reference(tensors, "relu")
    forward = FORWARD if direction == "no" else WHOLE
    assert launched == forward + (WHOLE_BACKWARD if direction == "both" else BACKWARD)


@cases_of(bn.EVAL_OPTIONS)
def test_running_statistics_with_gradients(case, dtype):
    options = bn.EVAL_OPTIONS[case]
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=options["residual"], training=False)
    with cuda_on_host(variant="streaming"):
        bn.check_against_reference(tensors, options["act"])


@layouts
@pytest.mark.parametrize("act", [a for a in reference.ACTIVATIONS if a != "relu"])
def test_every_activation(act, layout):
    """With a residual: a mask where the derivative is one bit, else z from x again."""
    tensors = bn.tensors_of((2, 16, 4, 4), layout, torch.bfloat16)
    with cuda_on_host():
        bn.check_against_reference(tensors, act)


@layouts
def test_several_tiles_and_segments(layout):
    shape = (2, 9, 70, 60) if layout == "NCHW" else (1, 520, 20, 15)
    with cuda_on_host(variant="streaming"):
        bn.check_against_reference(bn.tensors_of(shape, layout, torch.float32), "relu")


@layouts
@pytest.mark.parametrize("far", [0.0, 64.0, 256.0])
def test_statistics_far_from_zero(far, layout):
    """The variance of values whose mean is many times their deviation."""
    x = arrange(torch.randn(2, 5, 31, 29) + far, layout)
    with cuda_on_host():
        found = torch.ops.fusedres.bn_stats(x)
    eager = reference.bn_stats(x)
    for out, ref, plain in zip(found, reference.bn_stats(x.double()), eager, strict=True):
        assert_as_accurate_as_eager(out, ref, plain, count=values_per_channel(x))


@layouts
def test_an_outlier_at_the_start(layout):
    x = torch.randn(4, 3, 16, 16)
    x[0, :, 0, 0] = 1e4
    x = arrange(x, layout)
    with cuda_on_host():
        found = torch.ops.fusedres.bn_stats(x)
    eager = reference.bn_stats(x)
    for out, ref, plain in zip(found, reference.bn_stats(x.double()), eager, strict=True):
        assert_as_accurate_as_eager(out, ref, plain)


@layouts
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_the_mask_is_the_references(act, layout):
    """Bit for bit: a backward on another backend can use it."""
    t = bn.tensors_of((2, 13, 5, 3), layout, torch.float32, training=False)
    names = "x", "weight", "bias", "residual", "running_mean", "running_var"
    args = *(t[n] for n in names), False, 1e-5, act
    with cuda_on_host():
        _, mean, var, mask = torch.ops.fusedres.bn_act(*args, True)
    _, z = reference.bn_act(*args)
    assert min(z.abs().min(), (z - 6).abs().min()) > 1e-5  # else rounding decides
    assert torch.equal(mask, pack_mask(reference.activation_mask(z, act), like=t["x"]))
    assert same_bits(mean, t["running_mean"]) and same_bits(var, t["running_var"])


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_without_affine_parameters(missing):
    tensors = bn.tensors_of((2, 5, 4, 4), "NHWC", torch.float32)
    tensors |= {n: None for n in ("weight", "bias") if missing in (n, "both")}
    with cuda_on_host():
        bn.check_against_reference(tensors, "silu")


@dtypes
@pytest.mark.parametrize("layout,variant", [
    ("NHWC", "by_size"), ("NCHW", "by_size"), ("NCHW", "streaming"),
])  # fmt: skip
def test_misaligned_views_over_a_sentinel(layout, variant, dtype):
    tensors = bn.tensors_of((3, 16, 2, 4), layout, dtype)
    views, buffers = dict(tensors), []
    for name in ("x", "residual", "weight"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(variant=variant), Unchanged(*buffers):
        bn.check_against_reference(views, "relu")


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, layout):
    for training in (True, False):
        tensors = bn.tensors_of((2, 19, 3, 3), layout, torch.float32, training=training)
        tensors["x"][1, 2, 1, 0] = value
        tensors["residual"][0, 17, 2, 2] = value
        with cuda_on_host():
            out = gradients(bn.fused(), tensors, constants=bn.CONSTANTS)
        assert_same_non_finite(out, gradients(bn.plain(), tensors, constants=bn.CONSTANTS))


@layouts
def test_derivatives(layout):
    tensors = bn.tensors_of((2, 3, 3, 3), layout, torch.float64)
    with cuda_on_host():
        check_derivatives(bn.fused("silu"), tensors, bn.CONSTANTS)


@pytest.mark.parametrize("variant,layout", [
    ("streaming", "NHWC"), ("whole", "NHWC"), ("whole", "NCHW"),
])  # fmt: skip
def test_same_bits_in_every_order(variant, layout):
    tensors = bn.tensors_of((2, 24, 17, 15), layout, torch.float16)
    found = []
    for order in ORDERS:
        with cuda_on_host(variant=variant, order=order):
            found.append(gradients(bn.fused(), tensors, constants=bn.CONSTANTS))
    for other in found[1:]:
        assert_same_bits(other, found[0])
