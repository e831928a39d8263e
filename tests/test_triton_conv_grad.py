"""conv_grad on Triton: one kernel for the convolution and the sums of batch norm's backward."""

from __future__ import annotations

import pytest
import torch

import test_conv_stats as forward
from cases import Conv, randn
from fusedres import observers, triton_kernels
from fusedres.ops.conv_grad import op as conv_grad
from harness import assert_same_bits, gradients
from modules import block_pair, compare
from test_conv_grad import arguments, check
from test_triton_dispatch import forward_and_gradients
from triton_cases import executions, to, triton_on

pytest.importorskip("triton")
kernels, conv, launch = (
    triton_kernels.package().module(name) for name in ("conv_grad", "conv", "launch")
)
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")

POINTWISE = Conv((2, 17, 5, 3), (20, 17, 1, 1), padding=(0, 0))
CASES = {
    "1x1": POINTWISE,
    "descriptors": Conv((3, 24, 6, 5), (40, 24, 1, 1), padding=(0, 0)),
    "3x3": Conv((2, 19, 5, 4), (21, 19, 3, 3)),
    "unpadded": Conv((2, 8, 6, 5), (9, 8, 3, 2), padding=(0, 0)),
    "dilated": Conv((1, 6, 11, 9), (7, 6, 3, 3), padding=(2, 1), dilation=(2, 2)),
    "grouped": Conv((2, 40, 4, 5), (36, 20, 3, 3), groups=2),
    "tiles": Conv((2, 66, 9, 8), (70, 66, 1, 1), padding=(0, 0)),
}


@pytest.fixture
def kernel_only(monkeypatch):
    """Our kernel carries every gradient out that it takes, one program several tiles."""
    monkeypatch.setattr(kernels, "in_order", lambda conv, rivals: conv.ways())
    monkeypatch.setattr(kernels, "REDUCE_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "backward_at_once", lambda view: False)


@executions
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("kernel_only")
def test_the_kernel(case, batch_stats, device, dtype, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(conv, "target_has_tma", lambda device: case == "descriptors")
    act = ("relu", "silu", "identity")[len(case) % 3]
    args = arguments(CASES[case], dtype, batch_stats, act)
    args = tuple(to(device, dict(enumerate(args))).values())
    with triton_on(device), triton_kernels.counted() as launched:
        check(args)
    apply = ["stream_bwd_apply_kernel"] * batch_stats
    assert launched == ["conv_grad_kernel", "bn_act_bwd_merge_kernel", *apply]


@interpreted
@pytest.mark.usefixtures("kernel_only")
def test_the_activation_is_made_only_where_it_is_asked_for():
    *args, make_h = arguments(POINTWISE, torch.float32, True, "relu")
    with triton_on("cpu"):
        (*found, _), (*same, nothing) = conv_grad(*args, make_h), conv_grad(*args, not make_h)
    assert nothing.numel() == 0
    assert_same_bits(dict(enumerate(found)), dict(enumerate(same)))


@interpreted
@pytest.mark.parametrize("constant", ["weight", "bn_weight", "x"])
@pytest.mark.usefixtures("kernel_only")
def test_gradients_that_nobody_wants_change_no_others(constant):
    options = dict(bn="running")
    t = forward.tensors_of(POINTWISE, torch.float32, **options)
    with triton_on("cpu"):
        every, some = (
            gradients(forward.fused(POINTWISE, **options), t, constants=(*forward.CONSTANTS, *more))
            for more in ((), (constant,))
        )
    del every[f"d{constant}"]
    assert_same_bits(every, some)


@interpreted
def test_a_bottleneck_takes_it_where_a_norm_streams(monkeypatch):
    """conv3's gradient by the kernel, in three launches; conv2's by PyTorch, as every 3x3."""
    monkeypatch.setattr(kernels, "backward_at_once", lambda view: False)
    pair, x = block_pair("Bottleneck"), randn((3, 16, 4, 4), layout="NHWC")
    with triton_on("cpu"), triton_kernels.counted() as launched:
        forward_and_gradients(pair[0], x)
        of_conv3 = "conv_grad_kernel", "bn_act_bwd_merge_kernel", "stream_bwd_apply_kernel"
        assert "|".join(of_conv3) in "|".join(launched)
        assert launched.count("conv_grad_kernel") == 1
        compare(forward_and_gradients, *block_pair("Bottleneck"), x)


@pytest.mark.parametrize("case,reason", [
    (POINTWISE, None),
    (Conv((2, 8, 5, 5), (8, 8, 3, 3), stride=(1, 2)), "with a stride"),
    (Conv((2, 8, 5, 5), (8, 8, 1, 1)), "padding is wider"),
    (Conv((2, 8, 5, 5), (8, 8, 3, 3), layout="NCHW"), "NCHW"),
], ids=str)  # fmt: skip
def test_what_the_kernel_does_not_take(case, reason):
    dy, weight, x, *_ = arguments(case, torch.float32, True, "relu")
    found = kernels.why_not_gradient(dy, weight, x, case.geometry)
    assert found is None if reason is None else reason in found


@interpreted
def test_explain_hears_who_ran_it_and_why(monkeypatch):
    events = []

    def run(case: Conv):
        conv_grad(*arguments(case, torch.float32, True, "relu", False))

    with triton_on("cpu"), observers.observe(events.append):
        run(POINTWISE)  # small enough for one launch
        monkeypatch.setattr(kernels, "backward_at_once", lambda view: False)
        run(CASES["3x3"])
        run(POINTWISE)
    small, parts, above, _, ours = events
    not_measured = "not measured (FUSEDRES_TUNE=1): "
    assert (small.op, small.backend) == ("conv_grad", "aten")
    assert small.reason == not_measured + "batch norm's backward is one launch"
    assert (parts.op, parts.backend, parts.launches) == ("bn_act_backward", "triton", 1)
    assert above.reason == not_measured + "cuDNN is the default above 1x1"
    assert (ours.op, ours.backend, ours.launches) == ("conv_grad", "triton", 3)
    x, y, weight = (4 * n for n in (2 * 17 * 15, 2 * 20 * 15, 20 * 17))
    assert ours.bytes_moved == weight + y + 5 * x  # dy; x, u; u, x, dx
    assert ours.eager_bytes == weight + y + 9 * x
