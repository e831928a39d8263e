"""The library's convolutions among those that can convolve: measured with Triton, a rule without.

csrc/cuda/conv_*.cu runs behind the ops' own names here, on the host simulator.
"""

from __future__ import annotations

import re

import pytest
import torch

import fusedres
import test_conv_bn_act as inference
import test_conv_stats as training
import test_cuda_conv as native_conv
from accuracy import assert_as_accurate_as_eager
from cases import Conv
from cuda_glue import ops
from fusedres import dispatch, native, observers, triton_kernels
from fusedres.ops import conv_bn_act, conv_stats, execution
from harness import assert_same_bits, assert_same_format, double
from triton_cases import no_cpu_shortcuts  # noqa: F401

POINTWISE = Conv((2, 16, 4, 4), (24, 16, 1, 1), padding=(0, 0))
THREE = Conv((2, 16, 4, 4), (24, 16, 3, 3))
NARROW = Conv((2, 32, 4, 4), (32, 4, 1, 1), padding=(0, 0), groups=8)
ODD = Conv((2, 17, 4, 4), (24, 17, 1, 1), padding=(0, 0))
GPU = "NVIDIA Test 1000"
NOT_MEASURED = "not measured (that needs Triton): cuDNN is the default above 1x1"
BF16 = torch.bfloat16


@pytest.fixture
def glue(monkeypatch):
    """The ops' CUDA implementations answer for CPU tensors; yields the variants they ran in."""
    library, ran = torch.library.Library("fusedres_native", "IMPL"), []
    monkeypatch.setattr(native, "cuda_launches", lambda: len(ran))

    def implementation(name):
        def run(*args):
            ran.append((name, args[-1]))
            return getattr(ops(), name)(*args)

        return run

    for name in ("conv_bn_act", "conv_stats"):
        library.impl(name, implementation(name), "CPU")
    monkeypatch.setattr(dispatch, "own_kernel_reason", lambda op, x: None)
    monkeypatch.setattr(dispatch, "_warned", set())
    yield ran
    library._destroy()


# --- from tensors to launches


@pytest.mark.parametrize("case", native_conv.CASES)
def test_an_op_is_as_accurate_as_eager(case, glue):
    """Operands in any layout, parameters in any dtype, statistics or none."""
    conv, act = native_conv.CASES[case], native_conv.ACTS[case]
    t = inference.tensors_of(conv, BF16)
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    y = ops().conv_bn_act(*(t[n] for n in names), 1e-5, *conv.geometry, act, 0)
    ref, eager = (inference.run_plain(conv, act, **v) for v in (double(t), t))
    assert_as_accurate_as_eager(y, ref, eager)
    assert_same_format(y, eager.contiguous(memory_format=torch.channels_last))
    t = training.tensors_of(conv, BF16, bn="running")
    norm = t["bn_weight"], t["bn_bias"], t["mean"], t["var"], False, 1e-5, act
    args = t["x"], *norm, t["weight"], t["bias"], *conv.geometry
    options = dict(bn="running", act=act)
    ref, eager = (training.plain(conv, **options)(**v) for v in (double(t), t))
    found = ops().conv_stats(*args, True, 0)
    assert_as_accurate_as_eager(found[0], ref, eager)
    y, *nothing = ops().conv_stats(*args, False, 0)
    assert_same_bits({"y": y}, {"y": found[0]})
    assert [v.numel() for v in nothing] == [0, 0]


def changed(**members):
    """Arguments of conv_bn_act with some of them changed."""
    t = inference.tensors_of(THREE, BF16)
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    known = {n: t[n] for n in names} | dict(eps=1e-5)
    known |= dict(zip(("stride", "padding", "dilation", "groups"), THREE.geometry, strict=True))
    return list((known | dict(act="relu", variant=0) | members).values())


@pytest.mark.parametrize("members,message", [
    (dict(x=torch.randn(2, 16, 4, 4)), "x must be bfloat16 or float16, got Float"),
    (dict(x=torch.randn(2, 16, 4).bfloat16()), "x must have 4 dimensions, got [2, 16, 4]"),
    (dict(weight=torch.randn(24, 16, 3, 3)), "weight must have the dtype BFloat16 of x, got Float"),
    (dict(weight=torch.randn(24, 8, 3, 3).bfloat16()),
     "weight must have shape [K, C / groups, KH, KW] for x [2, 16, 4, 4] and 1 groups, got [24, 8"),
    (dict(groups=5), "for x [2, 16, 4, 4] and 5 groups, got [24, 16, 3, 3]"),
    (dict(stride=[1]), "stride must be two numbers from 1, got [1]"),
    (dict(stride=[1, 0]), "stride must be two numbers from 1, got [1, 0]"),
    (dict(padding=[-1, 0]), "padding must be two numbers from 0, got [-1, 0]"),
    (dict(dilation=[1, 0]), "dilation must be two numbers from 1, got [1, 0]"),
    (dict(dilation=[1, 3]), "the filter [24, 16, 3, 3] does not fit into x [2, 16, 4, 4]"),
    (dict(residual=torch.randn(2, 24, 4, 5)), "residual must have shape [2, 24, 4, 4], got"),
    (dict(residual=torch.randn(2, 24, 4, 4)), "residual must have the dtype BFloat16 of x"),
    (dict(mean=torch.randn(16)), "mean must have shape [24], got [16]"),
    (dict(act="tanh"), "act must be relu, identity,"),
    (dict(variant=9), "variant must be 0 to "),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")  # fmt: skip
def test_its_own_checks(members, message):
    with pytest.raises(RuntimeError, match=f"conv_bn_act: .*{re.escape(message)}"):
        ops().conv_bn_act(*changed(**members))


def test_no_images_are_a_result_without_any():
    y = ops().conv_bn_act(*changed(x=torch.empty(0, 16, 4, 4, dtype=BF16), residual=None))
    assert y.shape == (0, 24, 4, 4)


# --- without Triton: a rule


def run_natively(case: Conv, *, op="conv_bn_act", dtype=BF16):
    """The op as it runs on a GPU without Triton; its result, events and arguments."""
    events = []
    if op == "conv_bn_act":
        t = inference.tensors_of(case, dtype)
        names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
        args = *(t[n] for n in names), 1e-5, *case.geometry, "relu"
        own, composed, traffic = conv_bn_act.OWN, conv_bn_act._composed, conv_bn_act._traffic
    else:
        t = training.tensors_of(case, dtype, bn="running")
        norm = t["bn_weight"], t["bn_bias"], t["mean"], t["var"], False, 1e-5, "relu"
        args = t["x"], *norm, t["weight"], t["bias"], *case.geometry, True
        own, composed, traffic = conv_stats.OWN, conv_stats._composed, conv_stats.op.traffic
    kernel = getattr(torch.ops.fusedres_native, op)
    spec = execution.Spec(op, traffic, composed, traffic, None, own, kernel)
    with observers.observe(events.append):
        result = execution.natively(spec, getattr(torch.ops.fusedres, op), *args)
    return result, events, args


@pytest.mark.parametrize("op", ["conv_bn_act", "conv_stats"])
def test_kernels_of_one_pixel_run_natively(op, glue):
    found, (event,), args = run_natively(POINTWISE, op=op)
    assert glue == [(op, 0)] and (event.op, event.backend, event.reason) == (op, "native", None)
    wanted = getattr(ops(), op)(*args, 0)
    pairs = zip(found, wanted, strict=True) if op == "conv_stats" else [(found, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("case,dtype,reason", [
    (THREE, BF16, NOT_MEASURED),
    (POINTWISE, torch.float32, "the CUDA kernels convolve 16-bit types"),
    (Conv((2, 16, 4, 4), (24, 16, 1, 1), padding=(0, 0), layout="NCHW"), BF16, "are NCHW"),
    (NARROW, BF16, NOT_MEASURED),
], ids=["3x3", "float32", "NCHW", "groups"])  # fmt: skip
def test_what_goes_to_pytorch_and_why(case, dtype, reason, glue):
    _, (event, *parts), _ = run_natively(case, dtype=dtype)
    assert not glue and event.backend == "aten" and reason in event.reason
    assert [e.op for e in parts] in ([], ["bn_act"])


def test_by_name_every_convolution_runs_natively(glue, monkeypatch):
    monkeypatch.setattr(dispatch, "forced_backend", lambda: "native")
    for case in (THREE, NARROW):
        assert run_natively(case)[1][0].backend == "native"
    assert glue == [("conv_bn_act", 0)] * 2


def test_why_the_kernel_cannot_run_is_told(glue, monkeypatch):
    monkeypatch.setattr(dispatch, "own_kernel_reason", lambda op, x: f"no {op} here")
    assert run_natively(POINTWISE)[1][0].reason == "no conv_bn_act here" and not glue


def test_the_composition_takes_over_from_a_refused_launch(glue, monkeypatch):
    monkeypatch.setattr(native, "_refusals", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def refuse(*args):
        raise RuntimeError(f"conv_bn_act: {native.REFUSED}: too many resources requested")

    monkeypatch.setattr(torch.ops.fusedres_native, "conv_bn_act", refuse)
    with pytest.warns(RuntimeWarning, match="no longer runs conv_bn_act natively"):
        y, *_, args = run_natively(POINTWISE)
    exact = [a.double() if torch.is_tensor(a) else a for a in args]
    ref, eager = (fusedres.reference.conv_bn_act(*a) for a in (exact, args))
    assert_as_accurate_as_eager(y, ref, eager)
    assert [op for op, _ in native._refusals] == ["conv_bn_act"]


# --- with Triton: a measurement


@pytest.fixture
def on_gpu(glue, tmp_path, monkeypatch, no_cpu_shortcuts):  # noqa: F811
    """The CPU counts as a GPU whose timer says what the test wants, rival by rival."""
    pytest.importorskip("triton")
    kernels = triton_kernels.package()
    tuning, module = kernels.module("tuning"), kernels.module("conv_bn_act")
    if not kernels.module("launch").INTERPRETED:
        pytest.skip("the kernels are compiled here")
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    monkeypatch.setattr(tuning, "_caches", {})
    monkeypatch.setattr(tuning, "_unfit", set())
    monkeypatch.setattr(tuning, "gpu_of", lambda device: GPU)

    def install(**ms: float):
        """Milliseconds: of triton, aten, and native1, native2, ... by variant."""
        ran: list[str] = []

        def timer(run):
            rivals, kernels = len(ran), len(glue)
            run()
            own = [f"native{variant}" for _, variant in glue[kernels:]]
            return ms[(own or ran[rivals:] or ["other"])[0]]  # other: a streaming kernel

        def told(by, fn):
            return lambda *args: ran.append(by) or fn(*args)

        for owner, name, by in (
            (module.Inference, "triton", "triton"), (torch, "convolution", "aten"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, told(by, getattr(owner, name)))
        monkeypatch.setattr(tuning, "cuda_timer", timer)
        monkeypatch.setitem(ms, "other", 1.0)

    return install


def infer(case: Conv, dtype=torch.float16):
    t, events = inference.tensors_of(case, dtype), []
    with fusedres.backend("triton"), observers.observe(events.append):
        y = inference.run_fused(case, "relu", **t)
    ref, eager = (inference.run_plain(case, "relu", **v) for v in (double(t), t))
    assert_as_accurate_as_eager(y, ref, eager)
    return events


@pytest.mark.parametrize("case", [POINTWISE, THREE], ids=["1x1", "3x3"])
def test_the_fastest_of_all_tiles_and_rivals_wins(case, on_gpu, glue):
    on_gpu(triton=3.0, aten=2.0, native1=5.0, native2=1.5, native3=4.0)
    for _ in range(2):  # measured, then known
        glue.clear()
        (event,) = infer(case)
        assert (event.backend, glue[-1]) == ("native", ("conv_bn_act", 2))
        assert event.reason == "measured: native 1.500 ms, aten 2.000 ms, triton 3.000 ms"
    assert len(glue) == 1


@pytest.mark.parametrize("case,dtype,variants", [
    (ODD, torch.float16, {3}), (POINTWISE, torch.float32, set()),
], ids=["no whole packs", "float32"])  # fmt: skip
def test_only_what_the_kernel_has_is_tried(case, dtype, variants, on_gpu, glue):
    on_gpu(triton=1.0, aten=2.0, native3=3.0)
    assert infer(case, dtype)[0].backend == "triton"
    assert {variant for _, variant in glue} == variants


def test_a_tile_that_the_gpu_refuses_is_left_out(on_gpu, glue, monkeypatch):
    on_gpu(triton=3.0, aten=2.0, native2=1.5, native3=4.0)
    run = triton_kernels._or_unfit

    def first_does_not_fit(op, x, kernel, variant):
        def refuse(_):
            raise RuntimeError(f"conv_bn_act: {native.REFUSED}: invalid argument")

        return run(op, x, refuse if variant == 1 else kernel, variant)

    monkeypatch.setattr(triton_kernels, "_or_unfit", first_does_not_fit)
    with pytest.warns(RuntimeWarning, match="m=128, n=128.* is left out: .*invalid argument"):
        assert infer(POINTWISE)[0].backend == "native"


def test_any_other_error_of_a_kernel_is_raised():
    def broken(*args):
        raise RuntimeError("conv_bn_act: CUDA failed: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        triton_kernels._or_unfit("conv_bn_act", torch.empty(0), broken, 0)


def test_unmeasured_the_defaults_are_what_they_were(on_gpu, glue, monkeypatch):
    on_gpu(triton=1.0, aten=1.0)
    monkeypatch.delenv("FUSEDRES_TUNE")
    assert infer(POINTWISE)[0].backend == "triton"
    assert infer(THREE)[0].backend == "aten"
    assert not glue
