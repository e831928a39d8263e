"""The library's CUDA kernel or Triton's, where both can run an op: the measured choice.

A CPU tensor counts as a GPU's here: the library's CPU kernels, or its CUDA kernels on the host
simulator, against Triton's in the interpreter.
"""

from __future__ import annotations

import json

import pytest
import torch

import fusedres
import test_bn_act as bn
import test_bn_se_act as bn_se
import test_residual_mix as mix
import test_squeeze_excite as se
from cases import SHAPES, randn
from cuda_glue import ops
from fusedres import dispatch, native, observers, triton_kernels
from fusedres.ops import execution
from harness import Unchanged, gradient_like
from test_cuda_dispatch import OPAQUE, REFUSED, on
from triton_cases import new_process, no_cpu_shortcuts, unmeasured  # noqa: F401

pytest.importorskip("triton")
kernels = triton_kernels.package()
rivals, tuning = kernels.module("rivals"), kernels.module("tuning")
interpreted = pytest.mark.skipif(
    not kernels.module("launch").INTERPRETED, reason="the kernels are compiled here"
)

pytestmark = pytest.mark.usefixtures("unmeasured", "no_cpu_shortcuts")

GPU = "NVIDIA Test 1000"
OPS = {"bn_act": bn, "squeeze_excite": se, "bn_se_act": bn_se, "residual_mix": mix}


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU counts as a GPU whose timer says what the test wants; yields what Triton ran."""

    def contested(op, x):
        free = dispatch.forced_backend() is None
        return free and triton_kernels.has(op) and triton_kernels.decides(0)

    def install(**ms: float) -> list[str]:
        """Milliseconds of native and triton, and of the one or the other in the backward."""
        ran, real = [], kernels.launcher

        def launcher(op: str):
            return lambda *args: ran.append(op) or real(op)(*args)

        def timer(run) -> float:
            before = len(ran)
            run()
            by = "triton" if ran[before:] else "native"
            kind = "_backward" if measured[-1].endswith("_backward") else ""
            return ms.get(by + kind, ms[by])

        def faster(op: str, *args):
            measured.append(op)
            return real_faster(op, *args)

        measured, real_faster = ["forward"], triton_kernels.faster
        monkeypatch.setattr(dispatch, "_contested", contested)
        monkeypatch.setattr(triton_kernels, "device_reason", lambda index: None)
        monkeypatch.setattr(tuning, "gpu_of", lambda device: GPU)
        monkeypatch.setattr(tuning, "cuda_timer", timer)
        monkeypatch.setattr(triton_kernels, "faster", faster)
        monkeypatch.setattr(kernels, "launcher", launcher)
        return ran

    return install


def forward_and_backward(act: str = "relu"):
    """The events of bn_act in training."""
    t = bn.tensors_of((2, 8, 3, 3), "NHWC", torch.float32)
    events = []
    with observers.observe(events.append):
        bn.gradients(bn.fused(act), t, constants=bn.CONSTANTS)
    return events


def told(events) -> list[tuple]:
    return [(e.op, e.backend, e.reason) for e in events]


@interpreted
@pytest.mark.parametrize("case,forward,backward", [
    ("odd", "native", "triton"), ("odd_nhwc", "triton", "native"),
    ("one_channel", "native", "triton"), ("1x1_nhwc", "triton", "native"),
])  # fmt: skip
@pytest.mark.parametrize("name", OPS)
def test_what_the_forward_keeps_is_the_same_from_both(name, case, forward, backward, monkeypatch):
    """The CUDA kernels run one direction, on the simulator, Triton's the other.

    In both layouts of the mask, without one, and with one row an image.
    """
    module, options, ran = OPS[name], OPS[name].OPTIONS[case], []

    def choose_for(op, *args):
        ran.append(backward if op.endswith("_backward") else forward)
        return dispatch.Choice(ran[-1])

    monkeypatch.setattr(dispatch, "choose_for", choose_for)
    monkeypatch.setattr(execution, "on_cpu", lambda _, op, *args: getattr(ops(), op)(*args))
    known = {k: v for k, v in options.items() if module is not bn or k != "act"}
    tensors = module.tensors_of(*SHAPES[case], torch.float32, **known)
    module.check_against_reference(tensors, options["act"] if module is bn else options)
    assert ran == [forward, backward]


@interpreted
def test_the_faster_one_runs_and_explain_says_by_how_much(
    on_gpu,
    monkeypatch,
    unmeasured,  # noqa: F811
):
    """Forward and backward each their own, known to the next process."""
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    ran = on_gpu(native=0.012, triton=0.015, native_backward=0.03, triton_backward=0.02)
    wanted = [
        ("bn_act", "native", "measured: native 0.012 ms, triton 0.015 ms"),
        ("bn_act_backward", "triton", "measured: triton 0.020 ms, native 0.030 ms"),
    ]
    assert told(forward_and_backward()) == wanted
    assert ran == ["bn_act", "bn_act_backward", "bn_act_backward"]  # measured, measured, run
    monkeypatch.delenv("FUSEDRES_TUNE")
    for forget in (lambda: None, new_process):
        forget()
        ran.clear()
        assert told(forward_and_backward()) == wanted and ran == ["bn_act_backward"]
    found = json.loads(next(unmeasured.glob("*.json")).read_text())
    chosen = {k.split("|")[0]: v for k, v in found.items() if k.startswith(rivals.KIND)}
    assert chosen["backend of bn_act"] == dict(
        config=["native"], ms=dict(native=0.012, triton=0.015)
    )
    assert told(forward_and_backward("silu")) == [
        ("bn_act", "native", None), ("bn_act_backward", "native", None),
    ]  # fmt: skip
    with fusedres.backend("native"):
        assert {(e.backend, e.reason) for e in forward_and_backward()} == {("native", None)}
    model, x = fusedres.BatchNormAct2d(8), randn((2, 8, 3, 3), torch.float32, "NHWC")
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    assert "measured: native 0.012 ms, triton 0.015 ms" in str(fusedres.explain(model, x))


@interpreted
def test_measuring_replays_on_nothing_of_the_users(on_gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    ran = on_gpu(native=1.0, triton=2.0)
    model, x = fusedres.BatchNormAct2d(8), randn((2, 8, 3, 3), torch.float32, "NHWC")
    plain = torch.nn.BatchNorm2d(8)
    x.requires_grad_()
    events = []
    with Unchanged(x, model.weight), observers.observe(events.append):
        with triton_kernels.counted() as launched:
            y = model(x)
            y.backward(dy := gradient_like(y))
    assert ran == ["bn_act", "bn_act_backward"] and not launched
    assert [e.op for e in events] == ran
    plain(x.detach())
    torch.testing.assert_close(model.running_var, plain.running_var)
    assert model.num_batches_tracked == 1
    once = x.grad.clone()
    y = model(x)
    y.backward(dy)
    assert torch.equal(x.grad, 2 * once) and len(ran) == 2


def call(rival_native, rival_triton) -> tuple[str, str | None]:
    """The choice between two functions."""
    x = torch.randn(2, 8)
    own = lambda *args: triton_kernels._or_unfit("bn_stats", x, rival_native, *args)  # noqa: E731
    return rivals.faster("bn_stats", own, rival_triton, x.device, (x,))


def refusing(*args):
    raise REFUSED


def unfit(*args):
    raise tuning.Unfit("bn_stats: no configuration fits this GPU")


def works(*args):
    return None


@pytest.mark.parametrize("native_kernel,triton,wanted", [
    (refusing, works, "triton"), (works, unfit, "native"), (refusing, unfit, "native"),
], ids=["native refuses", "triton does not fit", "neither runs"])  # fmt: skip
def test_a_rival_that_the_gpu_refuses_is_left_out(
    native_kernel, triton, wanted, on_gpu, monkeypatch
):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    on_gpu(native=1.0, triton=1.0)
    with pytest.warns(RuntimeWarning, match="backend of bn_stats: Rival.*is left out") as caught:
        by = [call(native_kernel, triton)[0] for _ in range(2)]
    assert by == [wanted, wanted]
    assert len(caught) == (native_kernel is refusing) + (triton is unfit)


def test_memory_that_the_library_lacks_is_pytorchs_error(monkeypatch):
    """Which a measurement knows for one of this moment."""
    monkeypatch.setattr(native, "_last_words", lambda: lambda: b"CUDA out of memory.")

    def failing():
        raise OPAQUE

    with pytest.raises(torch.OutOfMemoryError, match="bn_stats: CUDA out of memory"):
        triton_kernels._or_unfit("bn_stats", on(), failing)


def test_a_graph_that_is_captured_measures_nothing(on_gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    on_gpu(native=1.0, triton=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert call(None, None) == ("native", None)


@interpreted
def test_a_winner_that_no_longer_fits_hands_over_to_the_library(on_gpu, monkeypatch):
    """The backward too, which the reference could not take over."""
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    on_gpu(native=2.0, triton=1.0)
    assert {e.backend for e in forward_and_backward()} == {"triton"}
    monkeypatch.setattr(kernels, "launcher", lambda op: unfit)
    with pytest.warns(RuntimeWarning, match="runs native: triton: bn_stats: no config") as caught:
        found = forward_and_backward()
    assert len(caught) == 1
    assert {(e.backend, e.reason) for e in found} == {
        ("native", "triton: bn_stats: no configuration fits this GPU")
    }
