"""Who carries a convolution out on a GPU: the default, the measured choice, and what is told of it."""

from __future__ import annotations

import json

import pytest
import torch

import fusedres
import test_conv_bn_act as inference
import test_conv_stats as training
from cases import Conv
from fusedres import dispatch, observers, triton_kernels
from harness import Unchanged
from triton_cases import no_cpu_shortcuts, triton_on  # noqa: F401

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

launch, tuning, conv, conv_bn_act = (
    triton_kernels.package().module(name) for name in ("launch", "tuning", "conv", "conv_bn_act")
)
pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")

GPU = "NVIDIA Test 1000"
POINTWISE = Conv((2, 16, 4, 4), (24, 16, 1, 1), padding=(0, 0))
THREE = Conv((2, 16, 4, 4), (24, 16, 3, 3))
NOT_MEASURED = "not measured (FUSEDRES_TUNE=1): cuDNN is the default above 1x1"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch, no_cpu_shortcuts):  # noqa: F811
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSEDRES_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_caches", {})
    monkeypatch.setattr(tuning, "_unfit", set())
    monkeypatch.setattr(dispatch, "_warned", set())
    return tmp_path


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU counts as a GPU whose timer says what the test wants, rival by rival."""

    def install(**ms: float):
        def timer(run):
            before = len(ran)
            run()
            by = {by for by in ran[before:]}  # none: one of the streaming kernels
            return ms[by.pop()] if by else 1.0

        ran: list[str] = []
        monkeypatch.setattr(tuning, "gpu_of", lambda device: GPU)
        monkeypatch.setattr(tuning, "cuda_timer", timer)
        for owner, name, by in (
            (conv_bn_act.Inference, "triton", "triton"), (conv_bn_act.Inference, "cudnn", "cudnn"),
            (conv_stats().Training, "triton", "triton"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, told(getattr(owner, name), ran, by))
        monkeypatch.setattr(torch, "convolution", told(torch.convolution, ran, "aten"))
        return ran

    return install


def conv_stats():
    return triton_kernels.package().module("conv_stats")


def told(fn, ran: list[str], by: str):
    def tells(*args):
        ran.append(by)
        return fn(*args)

    return tells


def infer(case: Conv, act: str = "relu"):
    """Run the op; its events."""
    events = []
    with triton_on("cpu"), observers.observe(events.append):
        inference.check_against_reference(inference.tensors_of(case, torch.float32), case, act)
    assert events[: len(events) // 2] == events[len(events) // 2 :]  # it ran twice
    return events[: len(events) // 2]


def train(case: Conv):
    t = training.tensors_of(case, torch.float32)
    events = []
    with triton_on("cpu"), observers.observe(events.append), torch.no_grad():
        training.fused(case)(**t)
    return events


def test_without_measurement_one_pixel_goes_to_triton_and_others_to_pytorch():
    (found,) = infer(POINTWISE)
    assert (found.op, found.backend, found.launches) == ("conv_bn_act", "triton", 1)
    assert found.reason is None
    narrow = Conv((2, 32, 4, 4), (32, 4, 1, 1), padding=(0, 0), groups=8)
    for case in (THREE, narrow):
        first, second = infer(case)
        assert (first.backend, first.reason) == ("aten", NOT_MEASURED)
        assert (second.op, second.backend) == ("bn_act", "triton")
    found = train(POINTWISE)
    assert [(e.op, e.backend, e.launches) for e in found] == [
        ("bn_stats", "triton", 1), ("conv_stats", "triton", 2),
    ]  # fmt: skip
    found = train(THREE)
    assert [(e.op, e.backend) for e in found] == [
        ("bn_stats", "triton"), ("conv_stats", "aten"), ("bn_act", "triton"), ("bn_stats", "triton"),
    ]  # fmt: skip


def test_the_traffic_of_one_kernel_is_that_of_its_parts():
    """Eager's bytes do not depend on who ran the op; ours are fewer where one kernel did."""
    whole, parts = train(POINTWISE), train(THREE)
    x, y = 2 * 16 * 16 * 4, 2 * 24 * 16 * 4
    weights = 24 * 16 * 4
    assert whole[1].bytes_moved == x + y + weights
    assert whole[1].eager_bytes == 5 * x + 2 * y + weights
    assert sum(e.eager_bytes for e in parts[1:]) == 5 * x + 2 * y + 9 * weights


@pytest.mark.parametrize("ms,wanted", [
    (dict(triton=1.0, aten=2.0), "measured: triton 1.000 ms, aten 2.000 ms"),
    (dict(triton=2.5, aten=2.0), "measured: aten 2.000 ms, triton 2.500 ms"),
])  # fmt: skip
@pytest.mark.parametrize("case", [POINTWISE, THREE], ids=["1x1", "3x3"])
def test_the_measured_choice_wins_and_explain_says_by_how_much(
    case, ms, wanted, on_gpu, monkeypatch, fresh
):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    ran = on_gpu(**ms)
    fastest = min(ms, key=ms.get)
    assert (infer(case)[0].backend, infer(case)[0].reason) == (fastest, wanted)
    assert set(ran) == {"triton", "aten"}
    ran.clear()
    tuning._caches.clear()  # what a new process knows
    monkeypatch.delenv("FUSEDRES_TUNE")
    assert infer(case)[0].backend == fastest and set(ran) == {fastest}
    found = json.loads(next(fresh.iterdir()).read_text())
    (entry,) = (value for key, value in found.items() if key.startswith("conv_bn_act|"))
    assert entry["config"][0] == fastest and entry["ms"] == ms
    model = (
        fusedres.ConvBNAct2d(16, 24, case.weight[2]).eval().to(memory_format=torch.channels_last)
    )
    x = torch.randn(case.x).contiguous(memory_format=torch.channels_last)
    with triton_on("cpu"), torch.no_grad():
        text = str(fusedres.explain(model, x))
    assert (NOT_MEASURED in text) == (case is THREE)  # without a residual it is another key


def test_measuring_replays_on_nothing_of_the_users(on_gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    ran = on_gpu(triton=1.0, aten=2.0)
    t = training.tensors_of(POINTWISE, torch.float32)
    events = []
    with (
        Unchanged(*t.values()),
        triton_on("cpu"),
        observers.observe(events.append),
        torch.no_grad(),
    ):
        with triton_kernels.counted() as launched:
            training.fused(POINTWISE)(**t)
    assert ran == ["triton", "aten", "triton"]  # measured, measured, run
    assert [e.op for e in events] == ["bn_stats", "conv_stats"]
    assert [n for n in launched if "conv" in n] == ["conv_stats_fwd_kernel"]  # replays do not count


def no_resources(*args):
    raise OutOfResources(300_000, 232_448, "shared memory")


def test_a_configuration_that_does_not_fit_is_left_out_with_one_warning(monkeypatch):
    real = conv_bn_act.Inference.triton

    def first_does_not_fit(self, way):
        return no_resources() if way is conv.SMALL else real(self, way)

    monkeypatch.setattr(conv_bn_act.Inference, "triton", first_does_not_fit)
    with pytest.warns(RuntimeWarning, match="conv_bn_act: .*stages=4.* out of resource") as caught:
        assert infer(POINTWISE)[0].backend == "triton"
    assert left_out(caught) == 1


def left_out(caught) -> int:
    return sum("is left out" in str(w.message) for w in caught)


def test_where_none_fits_pytorch_convolves(monkeypatch):
    monkeypatch.setattr(conv_bn_act.Inference, "triton", no_resources)
    t = inference.tensors_of(POINTWISE, torch.float32)
    with triton_on("cpu"), pytest.warns(RuntimeWarning, match="is left out") as caught:
        inference.check_against_reference(t, POINTWISE, "relu")
    assert left_out(caught) == 2  # one a configuration
    first, second = infer(POINTWISE)
    assert first.reason == "no configuration of triton fits this GPU"
    assert (first.backend, second.op) == ("aten", "bn_act")


def test_a_rival_that_refuses_is_left_out(on_gpu, monkeypatch):
    """cuDNN's fusion cannot run here, and says so."""
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    on_gpu(triton=3.0, aten=2.0)
    rivals = [conv.CUDNN, conv.ATEN]
    monkeypatch.setattr(conv_bn_act.Inference, "rivals", lambda self: rivals)
    with pytest.warns(RuntimeWarning, match="Way.by='cudnn'.* left out: cuDNN: ") as caught:
        assert infer(THREE)[0].reason == "measured: aten 2.000 ms, triton 3.000 ms"
    assert left_out(caught) == 1


@pytest.mark.parametrize("error,told", [
    (tuning.Unfit("bn_act: no configuration fits this GPU"), "bn_act: no configuration fits"),
    (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory"),
])  # fmt: skip
def test_an_op_that_does_not_fit_runs_on_the_reference(error, told, monkeypatch):
    """With one warning, under "auto"; asked for by name, Triton's error stands."""
    op = triton_kernels.package().module("bn_act")
    monkeypatch.setattr(dispatch, "_native_can_run", None)
    monkeypatch.setitem(dispatch.BACKENDS, "native", lambda op, x: "not in this test")
    monkeypatch.setitem(dispatch.BACKENDS, "triton", lambda op, x: None)

    def unfit(*args):
        raise error

    monkeypatch.setattr(op, "bn_act", unfit)
    x, events = torch.randn(2, 3, 4, 4), []
    args = x, None, None, None, None, None, True, 1e-5, "relu", False
    with pytest.warns(RuntimeWarning, match=f"runs plain PyTorch: triton: {told}") as caught:
        with observers.observe(events.append):
            y, again = (torch.ops.fusedres.bn_act(*args)[0] for _ in "ab")
    assert len(caught) == 1 and torch.equal(y, again)
    assert torch.equal(y, fusedres.reference.bn_act(*args[:9])[0])
    assert {(e.backend, e.reason) for e in events} == {("reference", f"triton: {error}")}
    with triton_on("cpu"), pytest.raises(type(error), match=told):
        torch.ops.fusedres.bn_act(*args)
