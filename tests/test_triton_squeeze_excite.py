"""squeeze_excite and bn_se_act on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_bn_se_act as bn_se
import test_squeeze_excite as se
from accuracy import assert_as_accurate_as_eager
from cases import SHAPES, layouts, misaligned, values_per_channel
from fusedres import reference, triton_kernels
from harness import assert_same_bits, assert_same_non_finite, gradients
from triton_cases import SMALL, devices, executions, gpu, many_programs, to, triton_on  # noqa: F401

MLP, MLP_BACKWARD = ["se_mlp_kernel"] * 2, ["se_mlp_kernel"] * 4
APPLY, BACKWARD_APPLY = ["stream_fwd_apply_kernel"], ["stream_bwd_apply_kernel"]
SQUEEZE = ["bn_stats_kernel", "se_squeeze_kernel"]
GATE_BACKWARD = ["stream_bwd_reduce_kernel", "se_gate_bwd_kernel"]


@executions
@pytest.mark.parametrize(
    "case", ["odd", "odd_nhwc", "three_channels_nhwc", "one_image", "1x1_nhwc"]
)
def test_squeeze_excite(case, device, dtype):
    options = se.OPTIONS[case]
    tensors = to(device, se.tensors_of(*SHAPES[case], dtype, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        se.check_against_reference(tensors, options)
    backward = GATE_BACKWARD + MLP_BACKWARD + BACKWARD_APPLY
    assert launched == SQUEEZE + MLP + APPLY + backward


@executions
@pytest.mark.parametrize("case", ["odd", "odd_nhwc", "one_image_nhwc", "1x1", "tail_of_one_nhwc"])
def test_bn_se_act(case, device, dtype):
    options = bn_se.OPTIONS[case]
    tensors = to(device, bn_se.tensors_of(*SHAPES[case], dtype, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        bn_se.check_against_reference(tensors, options)
    forward = [SQUEEZE[0], "bn_stats_merge_kernel", SQUEEZE[1], *MLP, *APPLY]
    merge = ["bn_se_act_bwd_merge_kernel"]
    assert launched == forward + GATE_BACKWARD + MLP_BACKWARD + merge + BACKWARD_APPLY


@executions
@pytest.mark.parametrize("case", ["odd", "odd_nhwc", "one_channel"])
def test_bn_se_act_with_running_statistics(case, device, dtype):
    options = bn_se.EVAL_OPTIONS[case]
    tensors = to(device, bn_se.tensors_of(*SHAPES[case], dtype, training=False, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        bn_se.check_against_reference(tensors, options)
    assert launched[:5] == SQUEEZE + MLP + APPLY


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", list(SHAPES))
def test_resnets_own_shapes(case, dtype):
    for module in (se, bn_se):
        options = module.OPTIONS[case]
        tensors = to("cuda", module.tensors_of(*SHAPES[case], dtype, **options))
        with triton_on("cuda"):
            module.check_against_reference(tensors, options)


@devices
@layouts
@pytest.mark.usefixtures("many_programs")
def test_several_tiles_and_chunks(layout, device):
    tensors = to(device, bn_se.tensors_of((2, 20, 5, 7), layout, torch.float32, squeezed=3))
    with triton_on(device):
        bn_se.check_against_reference(tensors)


@devices
def test_an_mlp_wider_than_its_blocks(device):
    """Several blocks of images, of channels and of the sum, none of them full."""
    tensors = to(device, se.tensors_of((19, 75, 1, 2), "NHWC", torch.float32, squeezed=37))
    with triton_on(device):
        se.check_against_reference(tensors)


@devices
@pytest.mark.parametrize("option", ["silu", "gelu", "hardswish", "identity", "hard_sigmoid"])
def test_activations_and_gates(option, device):
    options = {"gate": option} if option == "hard_sigmoid" else {"act": option, "post_act": option}
    tensors = to(device, se.tensors_of((2, 6, 3, 3), "NHWC", torch.float32))
    with triton_on(device):
        se.check_against_reference(tensors, options)


@devices
def test_weights_of_any_stride_dtype_and_alignment(device):
    tensors = to(device, se.tensors_of((2, 9, 3, 3), "NHWC", torch.float16, param=torch.float64))
    tensors["w1"] = tensors["w1"].t().contiguous().t()
    tensors["b1"] = None
    tensors["w2"], _ = misaligned(tensors["w2"])
    with triton_on(device):
        out = se.check_against_reference(tensors)
    assert out["dw1"].dtype == torch.float64


@devices
@layouts
@pytest.mark.usefixtures("many_programs")
def test_saved_statistics(layout, device):
    """The mean, the variance and the squeeze that one pass over x gives."""
    t = to(device, bn_se.tensors_of((3, 21, 5, 3), layout, torch.float32))
    t["x"] += 16
    args = *(t[n] for n in ("x", *bn_se.PARAMETERS)), None, None, None, True, 1e-5
    with triton_on(device):
        found = torch.ops.fusedres.bn_se_act(*args, "relu", "sigmoid", "relu", False)
    x, count = t["x"], values_per_channel(t["x"])
    for out, fn in (
        (found[1], lambda x: reference.bn_stats(x)[0]),
        (found[2], lambda x: reference.bn_stats(x)[1]),
        (found[3], lambda x: x.mean((2, 3))),
    ):
        assert_as_accurate_as_eager(out, fn(x.double()), fn(x), count=count)


@devices
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)], ids=str)
@pytest.mark.parametrize("module", [se, bn_se], ids=["squeeze_excite", "bn_se_act"])
def test_empty_batch(module, shape, device):
    options = {} if module is se else {"training": False}
    tensors = to(device, module.tensors_of(shape, "NHWC", torch.float32, **options))
    constants = () if module is se else module.CONSTANTS
    with triton_on(device), triton_kernels.counted() as launched:
        out = gradients(module.fused(), tensors, constants=constants)
    assert launched == []
    for name, value in out.items():
        wanted = tensors["x" if name == "y" else name[1:]]
        assert value.shape == wanted.shape and value.count_nonzero() == 0, name


@devices
@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value, layout, device):
    tensors = se.tensors_of((2, 19, 3, 3), layout, torch.float32)
    tensors["x"][1, 2, 1, 0] = value
    tensors["residual"][0, 17, 2, 2] = value
    tensors = to(device, tensors)
    with triton_on(device):
        out = gradients(se.fused(), tensors)
    assert_same_non_finite(out, gradients(se.plain(), tensors))


@devices
@pytest.mark.usefixtures("many_programs")
def test_same_bits_from_run_to_run(device):
    tensors = to(device, bn_se.tensors_of((2, 20, 5, 3), "NHWC", torch.float16))
    with triton_on(device):
        assert_same_bits(*(gradients(bn_se.fused(), tensors) for _ in range(2)))
