"""When Triton runs an op, why it does not, and what explain says of it."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fusedres
from cases import randn
from fusedres import dispatch, native, observers, triton_kernels
from fusedres.functional import batch_norm_act
from fusedres.report import doctor
from modules import block_pair, compare, parameter_gradients
from test_memory import saved
from triton_cases import triton_on

on_this_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or triton_kernels.missing() is not None,
    reason="Triton interprets nothing here",
)


def reason(x, op: str = "bn_act") -> str | None:
    return dispatch.BACKENDS["triton"](op, x)


def on(device: str, dtype=torch.bfloat16):
    """What the choice of a backend looks at, of a tensor that cannot exist here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of this compute capability, as far as the choice can see."""

    def install(capability=(9, 0), interpreted=False, version="3.7.1"):
        for name in ("missing", "device_reason"):  # without what they remember of this machine
            monkeypatch.setattr(triton_kernels, name, getattr(triton_kernels, name).__wrapped__)
        monkeypatch.setattr(triton_kernels, "version", lambda: version)
        monkeypatch.setattr(triton_kernels, "interpreted", lambda: interpreted)
        monkeypatch.setattr(triton_kernels, "trial", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(dispatch, "_warned", set())
        monkeypatch.setattr(native, "cuda_inside", lambda: None)  # of a CPU wheel
        monkeypatch.setattr(native, "uncovered", native.uncovered.__wrapped__)

    return install


def test_a_cuda_tensor_goes_to_triton(gpu):
    gpu()
    for op in ("bn_act", "bn_se_act_backward", "residual_mix", "conv_stats", "conv_bn_act"):
        choice = dispatch.choose(op, on("cuda:0"))
        assert choice.backend == "triton"
        assert choice.reason == "native: the library holds CPU kernels, x is on cuda"


@pytest.mark.parametrize("machine,x,wanted", [
    (dict(version=None), on("cuda:0"), "Triton is not installed"),
    (dict(version="3.5.1"), on("cuda:0"), "Triton 3.5.1 is older than 3.6"),
    (dict(version="3.10.0+git"), on("cuda:0"), None),
    (dict(capability=(7, 5)), on("cuda:1"), "GPU 1 has compute capability 7.5, .* need 8.0"),
    (dict(capability=(12, 0)), on("cuda:0"), None),
    (dict(interpreted=True), on("cuda:0"), "TRITON_INTERPRET is set"),
    (dict(), on("cuda:0", torch.float64), "float64 runs on the reference"),
    (dict(), on("xpu:0"), "run on CUDA devices, not on xpu"),
    (dict(), on("cpu"), "run on CUDA devices, not on cpu"),
], ids=str)  # fmt: skip
def test_reasons(machine, x, wanted, gpu):
    gpu(**machine)
    found = reason(x)
    assert found is None if wanted is None else re.search(wanted, found)


def test_an_op_without_a_kernel(gpu):
    gpu()
    assert reason(on("cuda:0"), "another_op") == "there is no Triton kernel for another_op"


def test_asking_whether_there_is_a_kernel_neither_warns_nor_fails(gpu, recwarn):
    gpu()
    for name in ("auto", "triton"):
        with fusedres.backend(name):
            assert not dispatch.has_kernel("another_op", on("cuda:0"), instead="bn_act")
            assert dispatch.has_kernel("bn_act", on("cuda:0"), instead="another_op")
    assert dispatch.has_kernel("another_op", on("cuda:0", torch.float64), instead="bn_act")
    assert not recwarn.list


def test_rocm(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "this PyTorch is built for ROCm" in reason(on("cuda:0"))


def test_a_gpu_that_triton_cannot_target_is_one_warning(gpu):
    gpu(capability=(7, 0))
    with pytest.warns(RuntimeWarning, match="runs plain PyTorch: triton: GPU 0 has comp") as caught:
        assert dispatch.choose("bn_act", on("cuda:0")).backend == "reference"
        assert dispatch.choose("bn_se_act", on("cuda:0")).backend == "reference"
        assert dispatch.choose("bn_act", on("cuda:0", torch.float64)).backend == "reference"
    assert len(caught) == 1


@pytest.mark.parametrize("version,reason", [(None, "not installed"), ("3.5.1", "older than 3.6")])
def test_a_triton_that_is_missing_or_too_old_is_one_warning(version, reason, gpu):
    gpu(version=version)
    with pytest.warns(RuntimeWarning, match=f"runs plain PyTorch: triton: .*{reason}") as caught:
        choices = [dispatch.choose(op, on("cuda:0")) for op in ("bn_act", "bn_stats", "bn_act")]
    assert len(caught) == 1
    assert all(c.backend == "reference" and reason in c.reason for c in choices)


@pytest.mark.parametrize("error,wanted", [
    (RuntimeError("Failed to find C compiler. Please\n specify"), "RuntimeError: Failed to find C"),
    (ValueError("sm_130 is not\n a target"), "ValueError: sm_130 is not a target"),
], ids=["compiler", "target"])  # fmt: skip
def test_a_gpu_for_which_triton_compiles_nothing_is_one_warning(error, wanted, gpu, monkeypatch):
    """No C compiler, or a GPU newer than Triton: found out by one small kernel, once a device."""
    real, tried = triton_kernels.trial, []

    def no_code(x):
        tried.append(x.shape)
        raise error

    gpu()
    monkeypatch.setattr(triton_kernels.package().module("bn_act"), "bn_stats", no_code)
    monkeypatch.setattr(triton_kernels, "trial", lambda device: real(torch.device("cpu")))
    monkeypatch.setattr(triton_kernels, "device_reason", cache(triton_kernels.device_reason))
    with pytest.warns(RuntimeWarning, match=f"Triton 3.7.1 runs no kernel on cpu: {wanted}") as w:
        choices = [dispatch.choose(op, on("cuda:0")) for op in ("bn_act", "bn_se_act")]
    assert len(w) == len(tried) == 1
    assert all(c.backend == "reference" and wanted in c.reason for c in choices)


@on_this_cpu
def test_the_trial_launches_a_kernel_that_nobody_counts():
    with triton_kernels.counted() as launched, FakeTensorMode():
        assert triton_kernels.trial(torch.device("cpu")) is None
    assert launched == []


def test_float64_on_a_gpu_belongs_to_the_reference_without_a_warning(gpu, recwarn):
    gpu()
    assert dispatch.choose("bn_act", on("cuda:0", torch.float64)).backend == "reference"
    assert not recwarn.list


@pytest.mark.parametrize("version,reason", [(None, "not installed"), ("3.5.1", "is older than")])
def test_doctor_says_why_triton_does_not_run(version, reason, gpu):
    gpu(version=version)
    (found,) = (f for f in doctor.examine() if f.name == "Triton")
    assert not found.available and reason in found.reason


def test_doctor_says_where_measured_choices_are_kept(monkeypatch, tmp_path):
    for folder, reason in (
        (tmp_path / "new" / "cache", None),
        (tmp_path / "file" / "cache", "file"),
    ):
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(folder))
        (found,) = (f for f in doctor.examine() if f.name == "measured choices")
        wanted = None if reason is None else f"{tmp_path / reason} is not a folder"
        assert (found.value, found.reason) == (str(folder), wanted)


def test_auto_never_interprets():
    events = []
    with observers.observe(events.append):
        batch_norm_act(randn((2, 3, 4, 4)), None, None, training=True)
    assert [e.backend for e in events] == ["native"]
    assert fusedres.backends()["triton"] is not None or torch.cuda.is_available()


@on_this_cpu
def test_asked_for_by_name_it_interprets_and_says_so():
    events = []
    x = randn((2, 3, 4, 4)).requires_grad_()
    with triton_on("cpu"), observers.observe(events.append):
        batch_norm_act(x, None, None, training=True).sum().backward()
    found = [(e.op, e.backend, e.launches, e.reason) for e in events]
    assert found == [("bn_act", "triton", 1, None), ("bn_act_backward", "triton", 1, None)]


@on_this_cpu
def test_float64_asked_for_by_name_is_an_error():
    with pytest.raises(RuntimeError, match="'triton' cannot run bn_act: float64 runs on the ref"):
        with fusedres.backend("triton"):
            batch_norm_act(randn((2, 3, 4, 4), torch.float64), None, None, training=True)


@on_this_cpu
def test_double_backward_is_the_references():
    x = torch.randn(3, 2, 2, 2, requires_grad=True)
    grads = []
    for name in ("triton", "reference"):
        with fusedres.backend(name):
            y = batch_norm_act(x, None, None, training=True, act="silu")
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            grads.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5) and grads[0].count_nonzero()


# --- blocks


# In NCHW PyTorch convolves: one launch for a norm that is applied before the next convolution, in
# the backward one more that applies it again; one for statistics alone; the addition and both norms
# before it one, backward three. In NHWC a 1x1 convolution does all that is around it in two.
LAUNCHES = {
    ("BasicBlock", "NCHW"): (1 + 2 * 1 + 1, 3 + 1 + 1),
    ("Bottleneck", "NCHW"): (2 * 1 + 2 * 1 + 1, 3 + 2 * (1 + 1)),
    ("SEBasicBlock", "NCHW"): (2 * 1 + 6, 2 * 1 + 8 + 1),  # bn_se_act: 6 and 8
    ("BasicBlock", "NHWC"): (2 + 1 + 1 + 1, 3 + 1 + 1),
    ("Bottleneck", "NHWC"): (3 * 2 + 1 + 1 + 1, 3 + 2 * (1 + 1)),
}


@on_this_cpu
@pytest.mark.parametrize("name,layout", LAUNCHES)
def test_launches_of_a_block_in_training(name, layout):
    block, _ = block_pair(name)
    x = randn((2, 16, 4, 4), layout=layout).requires_grad_()
    events = []
    with triton_on("cpu"), triton_kernels.counted() as launched:
        with observers.observe(events.append):
            y = block(x)
        in_forward = len(launched)
        y.sum().backward()
    assert (in_forward, len(launched) - in_forward) == LAUNCHES[name, layout]
    ours = [e for e in events if e.backend != "aten"]
    assert {e.backend for e in ours} == {"triton"}
    assert sum(e.launches for e in ours) == in_forward


@on_this_cpu
@pytest.mark.parametrize("project", [True, False])
def test_a_bottleneck_keeps_raw_results_and_one_mask(project):
    """x, the raw results of the convolutions but for a conv3 that is repeated, a bit an element."""
    planes = 8 if project else 4
    block, _ = block_pair("Bottleneck", planes=planes, project=project)
    x = randn((2, 16, 4, 4), layout="NHWC").requires_grad_()
    with triton_on("cpu"):
        large, _ = saved(block, x)
    channels, values = [16, planes, planes, *[4 * planes] * project], 2 * 4 * 4
    assert large == sorted([4 * c * values for c in channels] + [4 * planes * values // 8])


@on_this_cpu
def test_a_bottleneck_in_inference_is_a_launch_a_convolution():
    """The 3x3 is PyTorch's, and its norm a launch; on a GPU cuDNN fuses that."""
    block, _ = block_pair("Bottleneck")
    x, events = randn((2, 16, 4, 4), layout="NHWC"), []
    with triton_on("cpu"), torch.no_grad(), observers.observe(events.append):
        block.eval()(x)
    found = sorted((e.op, e.backend, e.launches) for e in events)
    one = "conv_bn_act", "triton", 1
    assert found == [("bn_act", "triton", 1), ("conv_bn_act", "aten", 1), one, one, one]


@on_this_cpu
def test_explain_counts_launches():
    model = torch.nn.Sequential(block_pair("SEBasicBlock")[0])
    with triton_on("cpu"):
        found = fusedres.explain(model, randn((2, 16, 4, 4)))
    launches = [(r.op, r.launches) for r in found.rows if r.backend == "triton"]
    assert launches == [("bn_act", 1), ("bn_act", 1), ("bn_se_act", 6)]  # statistics included


@on_this_cpu
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "SEBottleneck"])
def test_a_block_equals_its_eager_twin(name, layout):
    pair = block_pair(name)
    with triton_on("cpu"):
        compare(forward_and_gradients, *pair, randn((3, 16, 4, 4), layout=layout))


def forward_and_gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().mean().backward()
    return {"y": y.detach(), "dx": x.grad, **parameter_gradients(module)}
