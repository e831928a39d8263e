"""bn_act on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_bn_act as bn
from accuracy import assert_as_accurate_as_eager
from cases import SHAPES, arrange, layouts, misaligned, values_per_channel
from fusedres import reference, triton_kernels
from fusedres.layout import pack_mask
from harness import assert_same_bits, assert_same_non_finite, gradients, same_bits
from triton_cases import SMALL, devices, executions, gpu, many_programs, to, triton_on  # noqa: F401

pytest.importorskip("triton")
bn_act, grid, launch, tuning = (
    triton_kernels.package().module(name) for name in ("bn_act", "bn_act_grid", "launch", "tuning")
)

# What is launched for a small channels_last tensor, for one that is on the chip, for others.
WHOLE, WHOLE_BACKWARD = ["bn_act_fwd_whole_kernel"], ["bn_act_bwd_whole_kernel"]
AT_ONCE, AT_ONCE_BACKWARD = ["bn_act_fwd_grid_kernel"], ["bn_act_bwd_grid_kernel"]
APPLY = ["stream_fwd_apply_kernel"]
TRAINING = ["bn_stats_kernel", "bn_stats_merge_kernel", "stream_fwd_apply_kernel"]
BACKWARD = ["stream_bwd_reduce_kernel", "bn_act_bwd_merge_kernel", "stream_bwd_apply_kernel"]


@pytest.fixture
def streamed(monkeypatch):
    """Tensors that would fit on the chip take the way of those that do not."""
    monkeypatch.setattr(bn_act, "_ways", lambda view, config: [bn_act.STREAMED])


@pytest.fixture
def at_once(monkeypatch):
    """Every tensor is on the chip, in several tiles: their programs meet."""
    monkeypatch.setattr(bn_act, "_ways", lambda view, config: [bn_act.AT_ONCE])
    monkeypatch.setattr(bn_act, "WHOLE_PIXELS", 0)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(grid, name, launch.Config(512, 16, 4))


@executions
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.usefixtures("streamed")
def test_training(case, device, dtype):
    options = bn.OPTIONS[case]
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=options["residual"])
    with triton_on(device), triton_kernels.counted() as launched:
        bn.check_against_reference(to(device, tensors), options["act"])
    whole = tensors["x"].stride(1) == 1
    assert launched == (WHOLE + WHOLE_BACKWARD if whole else TRAINING + BACKWARD)


@executions
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.usefixtures("at_once")
def test_training_in_one_launch(case, device, dtype):
    options = bn.OPTIONS[case]
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=options["residual"])
    with triton_on(device), triton_kernels.counted() as launched:
        bn.check_against_reference(to(device, tensors), options["act"])
    assert launched == AT_ONCE + AT_ONCE_BACKWARD


@devices
@layouts
@pytest.mark.usefixtures("at_once")
def test_frozen_statistics_and_many_parts_in_one_launch(layout, device):
    for training in (True, False):
        tensors = bn.tensors_of((3, 20, 6, 9), layout, torch.float32, training=training)
        with triton_on(device), triton_kernels.counted() as launched:
            bn.check_against_reference(to(device, tensors), "relu")
        assert launched == (AT_ONCE if training else APPLY) + AT_ONCE_BACKWARD


@pytest.mark.parametrize("multiprocessors,at_once", [(12, True), (11, False)])
def test_one_launch_where_every_tile_has_a_multiprocessor(multiprocessors, at_once, monkeypatch):
    """Counters that programs meet at are zeroed by each launch, which is cooperative."""
    monkeypatch.setattr(launch, "MULTIPROCESSORS", multiprocessors)
    x = torch.empty(2, 128, 24, 32, device="meta").contiguous(memory_format=torch.channels_last)
    with launch.dry_run() as recorded:
        bn_act.bn_act(x, None, None, None, None, None, True, 1e-5, "relu", False)
    assert (recorded[0].name == AT_ONCE[0]) == at_once and recorded[-1].name == APPLY[0]
    if at_once:
        assert recorded[0].programs == multiprocessors and recorded[0].flags["PHASE"] == "all"
        assert recorded[0].options["launch_cooperative_grid"]


@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")
def test_a_gpu_that_refuses_a_cooperative_launch_streams(monkeypatch):
    """Part of the multiprocessors may belong to someone else."""

    def refuse(*args, **options):
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(tuning, "_unfit", set())
    monkeypatch.setattr(grid.bn_act_fwd_grid_kernel, "run", refuse)
    tensors = bn.tensors_of((2, 20, 5, 7), "NCHW", torch.float32)
    with triton_on("cpu"), triton_kernels.counted() as launched:
        with pytest.warns(RuntimeWarning, match="bn_act: .* programs that run at once") as caught:
            bn.check_against_reference(tensors, "relu")
            bn.check_against_reference(tensors, "relu")
    assert sum("is left out" in str(w.message) for w in caught) == 1
    assert launched == 2 * (TRAINING + AT_ONCE_BACKWARD)


@executions
@pytest.mark.parametrize("case", [c for c in SMALL if c in bn.EVAL_OPTIONS])
@pytest.mark.usefixtures("streamed")
def test_running_statistics_with_gradients(case, device, dtype):
    options = bn.EVAL_OPTIONS[case]
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=options["residual"], training=False)
    with triton_on(device), triton_kernels.counted() as launched:
        bn.check_against_reference(to(device, tensors), options["act"])
    whole = tensors["x"].stride(1) == 1
    assert launched == APPLY + (WHOLE_BACKWARD if whole else BACKWARD)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in SHAPES if c not in SMALL])
def test_resnets_own_shapes(case, dtype):
    options = bn.OPTIONS[case]
    tensors = bn.tensors_of(*SHAPES[case], dtype, residual=options["residual"])
    with triton_on("cuda"):
        bn.check_against_reference(to("cuda", tensors), options["act"])


@executions
@pytest.mark.parametrize("act", [a for a in reference.ACTIVATIONS if a != "relu"])
def test_every_activation(act, device, dtype):
    """With a residual: a mask where the derivative is one bit, else z from x again."""
    tensors = bn.tensors_of((2, 9, 3, 3), "NHWC", dtype)
    with triton_on(device):
        bn.check_against_reference(to(device, tensors), act)


@devices
@layouts
@pytest.mark.usefixtures("many_programs")
def test_several_tiles_and_chunks(layout, device):
    tensors = bn.tensors_of((2, 20, 5, 7), layout, torch.float32)
    with triton_on(device):
        bn.check_against_reference(to(device, tensors), "relu")


@devices
@layouts
@pytest.mark.parametrize("way", ["streamed", "many_programs", "at_once"])
@pytest.mark.parametrize("far", [0.0, 64.0, 256.0])
def test_statistics_far_from_zero(far, way, layout, device, request):
    """The variance of values whose mean is many times their deviation."""
    request.getfixturevalue(way)
    x = arrange(torch.randn(2, 5, 11, 9) + far, layout).to(device)
    with triton_on(device):
        found = torch.ops.fusedres.bn_stats(x)
    eager = reference.bn_stats(x)
    for out, ref, plain in zip(found, reference.bn_stats(x.double()), eager, strict=True):
        assert_as_accurate_as_eager(out, ref, plain, count=values_per_channel(x))


@devices
@layouts
@pytest.mark.usefixtures("at_once")
def test_one_launch_gives_the_bits_of_statistics_then_a_norm(layout, device):
    """Which is what the blocks' two ways to run are: as a node, and step by step."""
    t = to(device, bn.tensors_of((3, 20, 6, 9), layout, torch.float32))
    args = False, 1e-5, "silu", False
    with triton_on(device):
        y, *stats, _ = torch.ops.fusedres.bn_act(
            t["x"], t["weight"], t["bias"], None, None, None, True, *args[1:]
        )
        mean, var = torch.ops.fusedres.bn_stats(t["x"])
        again = torch.ops.fusedres.bn_act(t["x"], t["weight"], t["bias"], None, mean, var, *args)
    assert same_bits(stats[0], mean) and same_bits(stats[1], var) and same_bits(y, again[0])


@devices
def test_an_outlier_at_the_start_of_a_chunk(device):
    x = torch.randn(4, 3, 16, 16).to(device)
    x[0, :, 0, 0] = 1e4
    with triton_on(device):
        found = torch.ops.fusedres.bn_stats(x)
    eager = reference.bn_stats(x)
    for out, ref, plain in zip(found, reference.bn_stats(x.double()), eager, strict=True):
        assert_as_accurate_as_eager(out, ref, plain)


@devices
@layouts
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_the_mask_is_the_references(act, layout, device):
    """Bit for bit: a backward on another backend can use it."""
    t = to(device, bn.tensors_of((2, 13, 5, 3), layout, torch.float32, training=False))
    names = "x", "weight", "bias", "residual", "running_mean", "running_var"
    args = *(t[n] for n in names), False, 1e-5, act
    with triton_on(device):
        _, mean, var, mask = torch.ops.fusedres.bn_act(*args, True)
    _, z = reference.bn_act(*args)
    near_a_kink = z.abs().min(), (z - 6).abs().min()
    assert min(near_a_kink) > 1e-5  # else rounding decides
    assert torch.equal(mask, pack_mask(reference.activation_mask(z, act), like=t["x"]))
    assert same_bits(mean, t["running_mean"]) and same_bits(var, t["running_var"])
    assert mean.data_ptr() != t["running_mean"].data_ptr()


@devices
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_without_affine_parameters(missing, device):
    tensors = bn.tensors_of((2, 5, 4, 4), "NHWC", torch.float32)
    tensors |= {n: None for n in ("weight", "bias") if missing in (n, "both")}
    with triton_on(device):
        bn.check_against_reference(to(device, tensors), "silu")


@devices
def test_parameters_of_another_dtype(device):
    for training in (True, False):
        tensors = bn.tensors_of(
            (2, 9, 3, 3), "NHWC", torch.float16, training=training, param=torch.float64
        )
        with triton_on(device):
            bn.check_against_reference(to(device, tensors), "relu")


@devices
@layouts
def test_misaligned_views_over_a_sentinel(layout, device):
    tensors = to(device, bn.tensors_of((3, 13, 3, 5), layout, torch.float32))
    views = {n: misaligned(tensors[n])[0] for n in ("x", "residual", "weight")}
    with triton_on(device):
        bn.check_against_reference(tensors | views, "relu")


@devices
@pytest.mark.parametrize("shape", [(37, 19), (4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, device):
    with triton_on(device):
        bn.check_against_reference(to(device, bn.tensors_of(shape, "NCHW", torch.float32)), "relu")


@devices
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=str)
def test_empty_batch(shape, training, device):
    t = to(device, bn.tensors_of(shape, "NHWC", torch.float32, training=False))
    leaves = [t[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]
    stats = (None, None) if training else (t["running_mean"], t["running_var"])
    with triton_on(device), triton_kernels.counted() as launched:
        y, mean, var, _ = torch.ops.fusedres.bn_act(*leaves, *stats, training, 1e-5, "relu", True)
        y.sum().backward()
    assert launched == []
    assert y.shape == leaves[0].grad.shape == shape
    assert leaves[1].grad.tolist() == [0.0] * 4
    wanted = reference.bn_stats(t["x"]) if training else stats
    assert same_bits(mean, wanted[0]) and same_bits(var, wanted[1])


@devices
@layouts
@pytest.mark.parametrize("fixture", ["streamed", "at_once"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, layout, device, request, fixture):
    request.getfixturevalue(fixture)
    for training in (True, False):
        tensors = to(device, bn.tensors_of((2, 19, 3, 3), layout, torch.float32, training=training))
        tensors["x"][1, 2, 1, 0] = value
        tensors["residual"][0, 17, 2, 2] = value
        with triton_on(device):
            out = gradients(bn.fused(), tensors, constants=bn.CONSTANTS)
        assert_same_non_finite(out, gradients(bn.plain(), tensors, constants=bn.CONSTANTS))


@devices
@pytest.mark.parametrize("fixture", ["many_programs", "at_once"])
def test_same_bits_from_run_to_run(device, request, fixture):
    request.getfixturevalue(fixture)
    tensors = to(device, bn.tensors_of((2, 24, 7, 5), "NHWC", torch.float16))
    with triton_on(device):
        assert_same_bits(gradients(bn.fused(), tensors), gradients(bn.fused(), tensors))


@gpu
def test_beyond_2_to_the_31_elements():
    """Statistics and values at both ends of a tensor that 32-bit offsets do not reach."""
    x = torch.zeros(2**21 + 8, 1024, 1, 1, dtype=torch.float16, device="cuda")
    x[-8:] = torch.randn(8, 1024, 1, 1, device="cuda")
    with triton_on("cuda"):
        y, mean, _, _ = torch.ops.fusedres.bn_act(
            x, None, None, None, None, None, True, 1e-5, "identity", False
        )
    wanted = (x[-8:].double() - mean.view(1, -1, 1, 1)).flatten().sign()
    assert torch.equal(y[-8:].double().flatten().sign(), wanted)
    assert torch.equal(y[0], y[-9])
