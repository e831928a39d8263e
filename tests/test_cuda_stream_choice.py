"""Whether the choice between the library's CUDA kernel and Triton's is measured, or looked up, at all."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fusedres
from cases import randn
from fusedres import dispatch, triton_kernels
from fusedres.ops import bn_act
from test_cuda_dispatch import REFUSED, machine, on  # noqa: F401  (machine is a fixture)
from triton_cases import new_process, unmeasured  # noqa: F401

pytest.importorskip("triton")
rivals, tuning = (triton_kernels.package().module(name) for name in ("rivals", "tuning"))
pytestmark = pytest.mark.usefixtures("unmeasured")

GPU = "NVIDIA Test 1000"


@pytest.fixture
def asked(machine, monkeypatch):  # noqa: F811
    """Whether the choice of an op is looked up or measured."""

    def asks(op="bn_act", device="cuda:0", dtype=torch.bfloat16, numel=8, **found) -> bool:
        machine(**found)
        new_process()
        x, looked = on(device, dtype), []
        x.numel = lambda: numel

        def faster(*args):
            looked.append(args)
            return "triton", "measured"

        monkeypatch.setattr(triton_kernels, "faster", faster)
        found = dispatch.choose_for(op, x, print, ())
        assert (found.backend == "triton") == bool(looked)
        return bool(looked)

    return asks


def test_nothing_measured_nothing_asked(asked, monkeypatch):
    """Not even whether there is a Triton."""
    monkeypatch.setattr(dispatch, "_triton_can_run", None)
    monkeypatch.setenv("FUSEDRES_TUNE", "0")
    assert not asked()


@pytest.mark.parametrize("found,forced,wanted", [
    (dict(), "auto", True),
    (dict(op="residual_mix_backward", device="cuda:1"), "auto", True),
    (dict(), "native", False),
    (dict(device="cpu"), "auto", False),
    (dict(dtype=torch.float64), "auto", False),
    (dict(numel=0), "auto", False),
    (dict(op="no_such_op"), "auto", False),
    (dict(triton=None), "auto", False),
    (dict(triton="3.5.1"), "auto", False),
    (dict(capability=(7, 5), inside=((13, 0), ("75",))), "auto", False),
], ids=str)  # fmt: skip
def test_what_is_measured_when_that_is_asked_for(found, forced, wanted, asked, monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    with fusedres.backend(forced):
        assert asked(**found) == wanted


def test_an_op_whose_launch_was_refused_is_no_rival(asked, machine, monkeypatch):  # noqa: F811
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    machine()
    with pytest.warns(RuntimeWarning, match="no longer runs bn_act natively"):
        dispatch.hand_over("bn_act", on(), REFUSED)
    monkeypatch.setattr(triton_kernels, "faster", None)
    choice = dispatch.choose_for("bn_act", on(), print, ())
    assert choice.backend == "triton" and "too many resources" in choice.reason


@pytest.mark.parametrize("key,wanted", [(rivals.KIND + "bn_act|x", True), ("fwd_apply|x", False)])
def test_a_file_with_such_a_choice_has_a_say(key, wanted, asked, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_gpu_name", lambda index: GPU)
    tuning.cache_of(GPU).put(key, rivals.RIVALS[1], {"triton": 1.0})
    assert asked() == wanted


def test_fake_and_meta_tensors_look_nothing_up(monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    monkeypatch.setattr(triton_kernels, "faster", None)
    args = None, None, None, None, None, True, 1e-5, "relu", False
    with FakeTensorMode():
        assert bn_act.op(torch.empty(2, 3, 4, 4, device="cuda"), *args)[0].device.type == "cuda"
    assert bn_act.op(torch.empty(2, 3, 4, 4, device="meta"), *args)[0].device.type == "meta"


def test_the_key_is_what_the_work_depends_on():
    x, c = randn((2, 8, 3, 3), torch.float16), torch.randn(8)
    args = x, c, None, None, None, None, True, 1e-5, "relu", False
    nhwc = x.contiguous(memory_format=torch.channels_last)
    misaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    others = {0: [x.bfloat16(), x[:1], nhwc, misaligned, x[:, ::2]], 1: [None, c.half()], 2: [c],
              3: [x], 6: [False], 8: ["silu"], 9: [True]}  # fmt: skip
    changed = [(*args[:i], v, *args[i + 1 :]) for i, vs in others.items() for v in vs]
    keys = {rivals.key("bn_act", a) for a in (args, *changed)}
    assert len(keys) == 1 + len(changed)
    assert rivals.key("bn_act", (*args[:7], 1e-3, *args[8:])) in keys  # eps changes no work
    assert rivals.key("bn_stats", (nhwc,)) == "backend of bn_stats|float16 2x8x3x3 NHWC"
