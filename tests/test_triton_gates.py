"""highway and lstm_cell on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import fusedres
import test_highway as highways
import test_lstm as lstms
from cases import layouts, misaligned, randn
from fusedres import reference, triton_kernels
from harness import assert_same_bits, assert_same_non_finite, check, gradients
from triton_cases import devices, executions, gpu, to, triton_on

HIGHWAY = ["highway_fwd_kernel", "highway_bwd_kernel"]
LSTM = ["lstm_cell_fwd_kernel", "lstm_cell_bwd_kernel"]


@pytest.fixture
def narrow_blocks(monkeypatch):
    """A row has several blocks of columns, the last one not full."""
    pytest.importorskip("triton")
    gates, launch = (triton_kernels.package().module(name) for name in ("gates", "launch"))
    for op in ("highway", "lstm_cell"):
        module = triton_kernels.package().module(op)
        monkeypatch.setattr(module, "CONFIGS", (launch.Config(32, 16, 4), *gates.CONFIGS))


@executions
@pytest.mark.parametrize("case", highways.CASES)
def test_highway(case, device, dtype):
    shape, layout, options = highways.CASES[case]
    tensors = to(device, highways.tensors_of(shape, layout, dtype, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        check(highways.fused(**options), highways.plain(**options), tensors)
    assert launched == HIGHWAY


@executions
@pytest.mark.parametrize("case", lstms.CASES)
def test_lstm_cell(case, device, dtype):
    shape, forget = lstms.CASES[case]
    tensors = to(device, lstms.tensors_of(shape, forget, dtype))
    with triton_on(device), triton_kernels.counted() as launched:
        check(lstms.fused(forget), lstms.plain(forget), tensors)
    assert launched == LSTM


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_of_real_layers(dtype):
    with triton_on("cuda"):
        tensors = highways.tensors_of((8192, 1024), "NCHW", dtype)
        check(highways.fused(), highways.plain(), to("cuda", tensors))
        tensors = lstms.tensors_of((512, 1024), True, dtype)
        check(lstms.fused(), lstms.plain(), to("cuda", tensors))


@devices
@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("coupled", [True, False])
def test_several_blocks_of_columns(coupled, device):
    options = dict(act="silu", coupled=coupled)
    tensors = highways.tensors_of((7, 43), "NCHW", torch.float32, **options)
    with triton_on(device):
        check(highways.fused(**options), highways.plain(**options), to(device, tensors))
        tensors = to(device, lstms.tensors_of((7, 43), coupled, torch.float32))
        check(lstms.fused(coupled), lstms.plain(coupled), tensors)


@devices
@pytest.mark.parametrize("result", [0, 1])
def test_gradient_of_one_result_of_the_cell(result, device):
    tensors = to(device, lstms.tensors_of((5, 20), True, torch.float32))
    with triton_on(device):
        check(
            lambda **t: lstms.fused()(**t)[result], lambda **t: lstms.plain()(**t)[result], tensors
        )


@devices
def test_tanh_far_into_saturation_and_near_zero(device):
    """To a relative error: where exp overflows or vanishes, where tanh is its argument."""
    values = torch.logspace(-30, 5, 200)
    values = torch.cat([torch.zeros(1), torch.linspace(0.28, 0.32, 40), values])
    values = torch.cat([values, -values]).to(device)
    gates = torch.stack([values.abs() + 200, values, values, values.abs() + 200], 1)  # i = o = 1
    zeros = torch.zeros(len(values), 1, device=device)
    with triton_on(device):
        h, c = fusedres.functional.lstm_cell(gates, zeros)
    truth = reference.lstm_cell(gates.double(), zeros.double(), True)
    for found, wanted in zip((h, c), truth, strict=True):
        error = (found - wanted).abs() / wanted.abs().clamp_min(torch.finfo(torch.float32).tiny)
        assert error.max() <= 8 * torch.finfo(torch.float32).eps


@devices
@layouts
def test_misaligned_views_over_a_sentinel(layout, device):
    tensors = to(device, highways.tensors_of((3, 5, 3, 5), layout, torch.float32))
    with triton_on(device):
        check(highways.fused(), highways.plain(), {n: misaligned(t)[0] for n, t in tensors.items()})


@devices
def test_empty_batch(device):
    with triton_on(device), triton_kernels.counted() as launched:
        out = gradients(highways.fused(), to(device, highways.tensors_of((0, 6), "", torch.half)))
        cell = gradients(lstms.fused(), to(device, lstms.tensors_of((0, 6), True, torch.half)))
    assert launched == [] and out["dparts"].shape == (0, 12) and cell["dgates"].shape == (0, 24)


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, device):
    for module, options in ((highways, ("NCHW",)), (lstms, (True,))):
        tensors = module.tensors_of((4, 19), *options, torch.float32)
        for t in tensors.values():
            t[2, 3] = value
        tensors = to(device, tensors)
        with triton_on(device):
            out = gradients(module.fused(), tensors)
        assert_same_non_finite(out, gradients(module.plain(), tensors))


@devices
def test_same_bits_from_run_to_run(device):
    tensors = to(device, lstms.tensors_of((9, 20), True, torch.float16))
    with triton_on(device):
        assert_same_bits(gradients(lstms.fused(), tensors), gradients(lstms.fused(), tensors))


@devices
def test_modules_run_on_triton(device):
    model = torch.nn.Sequential(fusedres.Highway(12), fusedres.Highway(12, coupled=False))
    x = randn((6, 12)).to(device)
    with triton_on(device):
        rows = fusedres.explain(model.to(device), x).rows
    assert [(r.backend, r.launches) for r in rows if r.op == "highway"] == [("triton", 1)] * 2


def test_parts_that_do_not_fit_are_refused_by_name():
    op = torch.ops.fusedres.highway
    with triton_on("cpu"), pytest.raises(ValueError, match=r"parts: wanted contiguous \(4, 12\)"):
        op(torch.randn(12, 4).t(), torch.randn(4, 6), "relu", True)
    with triton_on("cpu"), pytest.raises(TypeError, match="parts: wanted torch.float32 on cpu"):
        op(torch.randn(4, 12).half(), torch.randn(4, 6), "relu", True)
