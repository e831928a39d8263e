"""The library's CUDA kernels on a GPU: values, choices, graphs, streams, compute-sanitizer.

Where there is no GPU the same kernels run on the simulator: test_cuda_glue.py and the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusedres
import test_bn_act as bn
import test_bn_se_act as bn_se
import test_conv_bn_act as inference
import test_conv_stats as training
import test_cuda_conv as conv
import test_cuda_conv_sm90 as sm90
import test_residual_mix as mix
import test_squeeze_excite as se
from accuracy import assert_as_accurate_as_eager
from cases import DTYPES, SHAPES, Conv, values_per_channel
from cuda_gate import library
from cuda_host import SIMULATOR
from cuda_ops import SM90_TILES, TILES
from fusedres import native, observers, reference, toolchain, triton_kernels
from fusedres.functional import batch_norm_act
from harness import Tensors, assert_same_bits, double, gradients
from test_cuda_simulator import RIGHT
from triton_cases import to

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
OPS = {"bn_act": bn, "squeeze_excite": se, "bn_se_act": bn_se, "residual_mix": mix}
VARIANTS = (*TILES, *SM90_TILES)  # a ConvVariant's number is its place


@pytest.fixture(autouse=True)
def natively():
    if (reason := native.cuda_reason("bn_act", torch.cuda.current_device())) is not None:
        pytest.skip(reason)
    with fusedres.backend("native"):
        yield


def example(name: str, case: str, dtype, device: str | None = None) -> tuple[Callable, Tensors]:
    """The function and tensors that an op's own test has for a case."""
    module, options = OPS[name], OPS[name].OPTIONS[case]
    act = options["act"] if module is bn else None
    known = {k: v for k, v in options.items() if act is None or k != "act"}
    fn = module.fused(act) if act is not None else module.fused(**options)
    return fn, to(device or DEVICE, module.tensors_of(*SHAPES[case], dtype, **known))


def check(name: str, case: str, dtype, device: str | None = None) -> None:
    options = OPS[name].OPTIONS[case]
    _, tensors = example(name, case, dtype, device)
    OPS[name].check_against_reference(tensors, options["act"] if name == "bn_act" else options)


def constants(name: str) -> tuple[str, ...]:
    return getattr(OPS[name], "CONSTANTS", ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(name, case, dtype):
    check(name, case, dtype)


# --- convolutions


def check_convolution(case: Conv, act: str, norm: str | None, dtype, variant: int) -> None:
    """conv_bn_act and conv_stats in one of their tiles."""
    ops = torch.ops.fusedres_native
    t = to(DEVICE, inference.tensors_of(case, dtype))
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    y = ops.conv_bn_act(*(t[n] for n in names), 1e-5, *case.geometry, act, variant)
    ref, eager = (inference.run_plain(case, act, **v) for v in (double(t), t))
    assert_as_accurate_as_eager(y, ref, eager)
    t = to(DEVICE, training.tensors_of(case, dtype, bn=norm))
    before = t["bn_weight"], t["bn_bias"], t["mean"], t["var"], False, 1e-5, act
    operands = t["x"], *before, t["weight"], t["bias"], *case.geometry
    y, *found = ops.conv_stats(*operands, True, variant)
    plain = training.plain(case, norm, act)
    assert_as_accurate_as_eager(y, plain(**double(t)), plain(**t))
    of_y = reference.bn_stats(y.double()), reference.bn_stats(y)
    for out, ref, eager in zip(found, *of_y, strict=True):
        assert_as_accurate_as_eager(out, ref, eager, count=values_per_channel(y))


@pytest.mark.parametrize("dtype", conv.HALVES, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", conv.CASES)
def test_convolutions(case, tile, dtype):
    norm = conv.NORMS[case]
    check_convolution(conv.CASES[case], conv.ACTS[case], norm, dtype, VARIANTS.index(tile))


@pytest.mark.parametrize("dtype", conv.HALVES, ids=str)
@pytest.mark.parametrize("tile", SM90_TILES)
@pytest.mark.parametrize("case", sm90.CASES)
def test_convolutions_on_hopper(case, tile, dtype):
    if torch.cuda.get_device_capability() != (9, 0) or "90a" not in native.cuda_inside()[1]:
        pytest.skip("wgmma is sm_90a's")
    check_convolution(sm90.CASES[case][1], "relu", "running", dtype, VARIANTS.index(tile))


# --- what only a device can show


@pytest.mark.parametrize("name,layout,shape,launches", [
    ("bn_act", "NHWC", (2, 64, 28, 28), 1), ("bn_act", "NHWC", (64, 256, 56, 56), 3),
    ("bn_act", "NCHW", (64, 30, 28, 28), 1), ("bn_act", "NCHW", (2, 512, 7, 7), 1),
    ("bn_act", "NCHW", (64, 256, 56, 56), 3), ("squeeze_excite", "NHWC", (2, 64, 14, 14), 1),
    ("residual_mix", "NHWC", (2, 64, 14, 14), 1),
])  # fmt: skip
def test_what_fits_on_the_chip_is_one_launch(name, layout, shape, launches):
    tensors = to(DEVICE, OPS[name].tensors_of(shape, layout, torch.bfloat16))
    with torch.no_grad():
        OPS[name].fused()(**tensors)  # the running statistics are updated by PyTorch
        before = native.cuda_launches()
        OPS[name].fused()(**tensors)
    assert native.cuda_launches() - before == launches


@pytest.mark.parametrize("case", ["odd", "stage1_nhwc"])
@pytest.mark.parametrize("name", OPS)
def test_same_bits_run_to_run_and_on_another_stream(name, case):
    fn, tensors = example(name, case, torch.bfloat16)
    first = gradients(fn, tensors, constants=constants(name))
    assert_same_bits(gradients(fn, tensors, constants=constants(name)), first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = gradients(fn, tensors, constants=constants(name))
    side.synchronize()
    assert_same_bits(beside, first)


@pytest.mark.parametrize("case", ["odd", "stage1_nhwc", "stage4_nhwc"])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_it(name, case):
    """Captured with one input, replayed with another."""
    fn, tensors = example(name, case, torch.bfloat16)
    main = next(iter(tensors))
    other = tensors | {main: tensors[main].flip(0).clone(memory_format=torch.preserve_format)}
    dy = torch.randn_like(tensors[main])
    wanted = gradients(fn, other, dy, constants=constants(name))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(fn, tensors, dy, constants=constants(name))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(fn, tensors, dy, constants=constants(name))
    with torch.no_grad():
        tensors[main].copy_(other[main])
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_the_current_one(name):
    check(name, "odd_nhwc", torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", OPS)
def test_no_memory_is_pytorchs_own_error(name):
    """And there is no other backend that would need less."""
    free, _ = torch.cuda.mem_get_info()
    shape = 2, 8, 1024, int(free * 0.6) // (2 * 8 * 1024 * 2)
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    fn, tensors = example(name, "one_image", torch.bfloat16)
    tensors = {n: x if t is not None and t.dim() == 4 else t for n, t in tensors.items()}
    with pytest.raises(torch.OutOfMemoryError, match=f"^{name}: .*out of memory"), torch.no_grad():
        fn(**tensors)


@pytest.mark.parametrize("name", OPS)
def test_measured_against_triton(name, tmp_path, monkeypatch):
    """The faster of both runs a shape from its first call on, and is as accurate."""
    if reason := triton_kernels.can_run(name, torch.empty(0, device=DEVICE), by_name=False):
        pytest.skip(reason)
    rivals, tuning = (triton_kernels.package().module(n) for n in ("rivals", "tuning"))
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    monkeypatch.setattr(triton_kernels, "decides", lambda index: True)
    for module, known in ((rivals, "_known"), (tuning, "_caches")):
        monkeypatch.setattr(module, known, {})
    events = []
    with fusedres.backend("auto"), observers.observe(events.append):
        check(name, "odd_nhwc", torch.bfloat16)
    assert "native" in events[0].reason and "triton" in events[0].reason
    assert events[0].reason.startswith(f"measured: {events[0].backend} ")


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_backward_is_its_contexts(name):
    x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    events = []
    with fusedres.backend("native"):
        y = batch_norm_act(x, None, None, training=True)
    with fusedres.backend(name), observers.observe(events.append):
        y.sum().backward()
    assert [e.op for e in events] == ["bn_act_backward"] * (name == "native")


# --- the primitives, as the simulator's own kernels use them


@pytest.fixture(scope="session")
def primitives(tmp_path_factory) -> Path:
    """tests/cuda_on_host/selftest, compiled for the device."""
    if (nvcc := toolchain.find_nvcc()) is None:
        pytest.skip("no nvcc")
    made = tmp_path_factory.mktemp("primitives") / "selftest"
    sources = [*sorted((SIMULATOR / "selftest").glob("*.cpp")), SIMULATOR / "gpu.cu"]
    flags = "-std=c++17", "-x", "cu", "-gencode", "arch=compute_90a,code=sm_90a"
    flags += "-diag-suppress", "20011"  # operator new is not called by kernels
    folders = [f"-L{folder}" for folder in library._library_folders(nvcc)]
    subprocess.run([nvcc, *flags, *folders, *map(str, sources), "-o", made], check=True)
    return made


@pytest.mark.parametrize("case", RIGHT)
def test_a_primitive_does_what_the_simulator_makes_of_it(case, request):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only sm_90a has all primitives")
    program = request.getfixturevalue("primitives")
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
    done = subprocess.run([program, case], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr


# --- compute-sanitizer, on small tensors


def test_small():
    """Each op's kernels, streaming and in one launch, and each kernel of the convolutions."""
    for name in OPS:
        for case in ("odd", "odd_nhwc", "one_image_nhwc"):
            check(name, case, torch.bfloat16)
    tiles = [*TILES, *SM90_TILES * (torch.cuda.get_device_capability() == (9, 0))]
    for tile in tiles:
        check_convolution(sm90.CASES["3x3"][1], "relu", "running", torch.bfloat16,
                          VARIANTS.index(tile))  # fmt: skip


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool, monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor has its own bounds
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::test_small"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
