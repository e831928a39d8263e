"""When the library's CUDA kernels run an op, why they do not, and who takes over."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import fusedres
from fusedres import dispatch, elf, native, observers, triton_kernels
from fusedres.ops import define, execution
from fusedres.report import doctor

INSIDE = (13, 0), ("80", "90a")


def on(device: str = "cuda:0", dtype=torch.bfloat16):
    """What the choice of a backend looks at, of a tensor that cannot exist here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.fixture
def machine(monkeypatch):
    """A GPU, its driver and the library's kernels, as far as the choice can see."""

    def install(capability=(9, 0), inside=INSIDE, driver=(13, 2), triton="3.7.1", without=()):
        for module, name in (
            (native, "uncovered"), (triton_kernels, "missing"), (triton_kernels, "device_reason"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
        monkeypatch.setattr(native, "cuda_inside", lambda: inside)
        monkeypatch.setattr(native, "driver", lambda: driver)
        monkeypatch.setattr(native, "has_cuda_kernel", lambda op: op not in without)
        monkeypatch.setattr(native, "_refusals", {})
        monkeypatch.setattr(triton_kernels, "version", lambda: triton)
        monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
        monkeypatch.setattr(triton_kernels, "trial", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(dispatch, "_warned", set())

    return install


def test_a_covered_gpu_runs_natively(machine, recwarn):
    machine()
    for op in ("bn_act", "bn_se_act_backward", "residual_mix"):
        assert dispatch.choose(op, on()) == dispatch.Choice("native")
    assert dispatch.choose("bn_act", on(dtype=torch.float64)).backend == "native"
    assert not recwarn.list


@pytest.mark.parametrize("op", ["conv_stats", "conv_bn_act"])
@pytest.mark.parametrize("triton", ["3.7.1", None])
def test_convolutions_are_measured_by_triton_and_without_it_native(op, triton, machine, recwarn):
    machine(triton=triton)
    measured = dispatch.Choice("triton", "native: Triton's timer measures who convolves")
    assert dispatch.choose(op, on()) == (measured if triton else dispatch.Choice("native"))
    with fusedres.backend("native"):
        assert dispatch.choose(op, on()) == dispatch.Choice("native")
    assert not recwarn.list


@pytest.mark.parametrize("found,x,forced,wanted", [
    (dict(), on(), "auto", None),
    (dict(), on(), "native", None),
    (dict(), on(), "triton", "the triton backend was asked for"),
    (dict(), on("cpu"), "auto", "runs on NVIDIA GPUs, x is on cpu"),
    (dict(without=("conv_stats",)), on(), "auto", "there is no CUDA kernel for conv_stats"),
    (dict(inside=None), on(), "auto", "the library holds CPU kernels"),
], ids=str)  # fmt: skip
def test_why_the_own_kernel_of_a_convolution_cannot_run(found, x, forced, wanted, machine):
    machine(**found)
    with fusedres.backend(forced):
        reason = dispatch.own_kernel_reason("conv_stats", x)
    assert reason is None if wanted is None else wanted in reason


@pytest.mark.parametrize("found,x,wanted", [
    (dict(), on("cuda:1"), None),
    (dict(capability=(8, 9)), on(), None),
    (dict(driver=None), on(), None),
    (dict(driver=(13, 0), inside=((13, 2), ("90a",))), on(), None),
    (dict(inside=None), on(), "the library holds CPU kernels, x is on cuda"),
    (dict(without=("bn_act",)), on(), "there is no CUDA kernel for bn_act"),
    (dict(driver=(12, 8)), on(), "driver is made for CUDA 12.8, .* for CUDA 13: update the NVIDIA d"),
    (dict(capability=(12, 0)), on("cuda:1"), "GPU 1 has compute capability 12.0, the library's"
     " kernels are for 80 90a: .* FUSEDRES_CUDA_ARCHS=120f pip install --no-build-isolation ."),
    (dict(capability=(7, 5)), on(), "capability 7.5, .* there are none for it: they need 8.0"),
    (dict(), on("xpu:0"), "kernels for CPUs and NVIDIA GPUs, x is on xpu"),
], ids=str)  # fmt: skip
def test_reasons(found, x, wanted, machine):
    machine(**found)
    reason = dispatch.BACKENDS["native"]("bn_act", x)
    assert reason is None if wanted is None else re.search(wanted, reason)


def test_a_gpu_that_is_not_covered_is_one_warning(machine):
    machine(capability=(12, 0))
    with pytest.warns(RuntimeWarning) as caught:
        for op in ("bn_act", "squeeze_excite", "bn_act"):
            assert dispatch.choose(op, on()).backend == "triton"
        assert dispatch.choose("bn_act", on(dtype=torch.float64)).backend == "reference"
    (message,) = {str(w.message) for w in caught}
    assert len(caught) == 1
    for part in ("fusedres runs triton", "GPU 0", "80 90a", "FUSEDRES_CUDA_ARCHS=120f pip install"):
        assert part in message


def test_without_triton_either_the_warning_says_both(machine):
    machine(capability=(7, 5), triton=None)
    with pytest.warns(
        RuntimeWarning, match="runs plain PyTorch: native: GPU 0.*Triton is not"
    ) as w:
        assert dispatch.choose("bn_act", on()).backend == "reference"
        assert dispatch.choose("bn_act", on()).backend == "reference"
    assert len(w) == 1


def test_a_library_for_cpus_warns_of_nothing(machine, recwarn):
    machine(inside=None)
    assert dispatch.choose("bn_act", on()).backend == "triton"
    assert not recwarn.list


def test_asked_for_by_name_it_is_an_error(machine):
    machine(capability=(12, 0))
    with fusedres.backend("native"), pytest.raises(RuntimeError, match="'native' cannot run bn_a"):
        dispatch.choose("bn_act", on())


# --- launches


def test_an_op_tells_how_many_kernels_it_launched(machine, monkeypatch):
    machine()
    monkeypatch.setattr(native, "cuda_launches", lambda: next(launches))
    heard = []
    event = observers.Event("bn_act", "native", bytes_moved=7)
    # What they move if they are so many: less where they keep a tile on the chip.
    for held, moved in ((1, 7), (3, 5)):
        traffic = execution.Traffic(lambda x: x + 2, None, None, held=(held, lambda x: 2))
        launches = iter((40, 43))
        with observers.observe(heard.append):
            args = event, traffic, lambda x: [x], None, "bn_act", on(), 5
            assert execution.launched(*args) == [5]
        assert heard.pop() == observers.Event("bn_act", "native", launches=3, bytes_moved=moved)


def test_of_a_refused_launch_only_the_next_backend_tells(machine, monkeypatch):
    machine()
    monkeypatch.setattr(native, "cuda_launches", lambda: 0)
    heard = []
    with observers.observe(heard.append), pytest.warns(RuntimeWarning, match="no longer runs"):
        event = observers.Event("bn_act", "native")
        assert execution.launched(event, None, refusing, lambda *args: args, "bn_act", on(), 5) == (
            5,
        )
    assert heard == []


# --- launches that fail

REFUSED = RuntimeError(f"bn_act: {native.REFUSED}: too many resources requested for launch")


def refusing(*args):
    raise REFUSED


def test_the_next_backend_takes_over_from_a_refused_launch(machine):
    machine()
    x = on()
    ran = []
    with pytest.warns(RuntimeWarning, match="no longer runs bn_act natively on cuda:0: .*too many"):
        result = execution.launched(
            None, None, refusing, lambda *args: ran.append(args) or "result", "bn_act", x, x, 1
        )
    assert result == "result" and ran == [(x, 1)]
    choice = dispatch.choose("bn_act", x)
    assert choice.backend == "triton" and "too many resources" in choice.reason
    assert dispatch.choose("bn_act", on("cuda:1")).backend == "native"  # another device
    assert dispatch.choose("bn_stats", x).backend == "native"


@pytest.mark.parametrize("why", ["by name", "capturing", "another error", "no way back"])
def test_an_error_that_nobody_can_take_over(why, machine, monkeypatch):
    machine(triton=None if why == "no way back" else "3.7.1")
    error = REFUSED
    if why == "another error":
        error = RuntimeError("bn_act: CUDA failed: an illegal memory access was encountered")
    if why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    op = "bn_act_backward" if why == "no way back" else "bn_act"
    backend = fusedres.backend("native" if why == "by name" else "auto")
    with backend, pytest.raises(RuntimeError) as caught:
        if why == "no way back":
            with pytest.warns(RuntimeWarning):
                dispatch.hand_over(op, on(), error)
        else:
            dispatch.hand_over(op, on(), error)
    assert caught.value is error
    assert ((op, 0) in native._refusals) == (why == "no way back")


OPAQUE = RuntimeError(f'torch_call_dispatcher("aten::empty_like", ...) {native.FAILED} ops.h:46')


@pytest.mark.parametrize("words", [b"CUDA out of memory. Tried to allocate 2.00 GiB.", None])
def test_no_memory_for_a_result_is_pytorchs_own_error(words, machine, monkeypatch, recwarn):
    """Nobody takes over: the others need as much."""
    machine()
    monkeypatch.setattr(native, "_last_words", lambda: lambda: words)

    def failing(*args):
        raise OPAQUE

    wanted = "bn_act: " + (words or b"CUDA out of memory.").decode()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        execution.launched(None, None, failing, None, "bn_act", on(), 1)
    assert str(caught.value) == wanted and not native._refusals and not recwarn.list


def test_any_other_failure_inside_pytorch_is_told(machine, monkeypatch):
    machine()
    for words, wanted in ((b"no such device", "bn_act: no such device"), (None, "aten::item")):
        monkeypatch.setattr(native, "_last_words", lambda words=words: lambda: words)
        error = RuntimeError(f"aten::item {native.FAILED} ops.h:46")
        found = native.explained("bn_act", on(), error)
        assert type(found) is RuntimeError and wanted in str(found)


def test_no_memory_for_a_launch_says_when_it_is_tried_again(machine):
    machine()
    error = RuntimeError(f"bn_act: {native.REFUSED}: out of memory (cudaErrorMemoryAllocation)")
    with pytest.warns(RuntimeWarning, match="out of memory.*Another backend takes over; after mem"):
        dispatch.hand_over("bn_act", on(), error)
    assert dispatch.choose("bn_act", on()).backend == "triton"


def test_forward_and_backward_go_to_the_reference_together(machine):
    machine(triton=None)
    assert not without_grad("bn_act", on())
    native.refuse("bn_act_backward", 0, REFUSED)
    with pytest.warns(RuntimeWarning):
        assert without_grad("bn_act", on())


def without_grad(op, x) -> bool:
    with torch.no_grad():
        return define.by_reference(op, x)


# --- doctor


@pytest.mark.parametrize("in_file,inside,reason", [
    (("80", "90a"), INSIDE, None),
    (("80",), INSIDE, "the file holds 80"),
    ((), INSIDE, "the file holds none"),
    ((), None, "the library holds CPU kernels only"),
])  # fmt: skip
def test_doctor_compares_what_is_said_with_the_file(in_file, inside, reason, machine, monkeypatch):
    machine(inside=inside)
    monkeypatch.setattr(elf, "cuda_archs", lambda path: in_file)
    found = doctor._gpu_kernels()
    assert (found.available, found.reason) == (reason is None, reason)
    assert found.value == ("none" if inside is None else "CUDA 13.0: 80 90a")


def test_the_library_here_holds_what_it_says():
    inside = native.cuda_inside()
    assert elf.cuda_archs(native.library_path()) == (() if inside is None else inside[1])
