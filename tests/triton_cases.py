"""What the tests of the Triton kernels share: where they run, and small odd shapes.

Without a GPU they run in Triton's interpreter (conftest.py switches it on), in float32 and float16:
it computes bfloat16 wrongly. With one they are compiled, and run on it (``pytest -m gpu``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import dispatch, native, triton_kernels
from fusedres.ops import gemm
from harness import Tensors

# Cases of cases.SHAPES that the interpreter gets through in a second.
SMALL = (
    "odd",
    "odd_nhwc",
    "three_channels_nhwc",
    "one_image",
    "1x1",
    "1x1_nhwc",
    "tail_of_one_nhwc",
)

gpu = pytest.mark.gpu
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
executions = pytest.mark.parametrize(("device", "dtype"), [
    ("cpu", torch.float32), ("cpu", torch.float16),
    pytest.param("cuda", torch.float32, marks=gpu), pytest.param("cuda", torch.bfloat16, marks=gpu),
    pytest.param("cuda", torch.float16, marks=gpu),
], ids=lambda v: str(v).removeprefix("torch."))  # fmt: skip


@contextlib.contextmanager
def triton_on(device: str) -> Iterator[None]:
    """Run ops on Triton; skips the test where the kernels are compiled and it is for the CPU."""
    if (reason := triton_kernels.missing()) is not None:
        pytest.skip(reason)
    if device == "cpu" and not triton_kernels.interpreted():
        pytest.skip("the kernels are compiled here: see the same test on cuda")
    with fusedres.backend("triton"):
        yield


def to(device: str, tensors: Tensors) -> Tensors:
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in tensors.items()}


@pytest.fixture
def unmeasured(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A machine on which no backend was measured: the folder of its measurements."""
    pytest.importorskip("triton")
    rivals, tuning = (triton_kernels.package().module(name) for name in ("rivals", "tuning"))
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSEDRES_TUNE", raising=False)
    for module, name, value in (
        (tuning, "_caches", {}), (tuning, "_unfit", set()), (rivals, "_known", {}),
        (dispatch, "_warned", set()), (native, "_refusals", {}),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    triton_kernels.decides.cache_clear()
    yield tmp_path
    triton_kernels.decides.cache_clear()


def new_process() -> None:
    """What a new process knows of measurements: nothing but the file."""
    rivals, tuning = (triton_kernels.package().module(name) for name in ("rivals", "tuning"))
    for known in (tuning._caches, rivals._known):
        known.clear()
    triton_kernels.decides.cache_clear()


@pytest.fixture
def no_cpu_shortcuts(monkeypatch: pytest.MonkeyPatch):
    """A CPU's tensors stand for a GPU's: nothing is taken for being on a CPU."""
    monkeypatch.setattr(dispatch, "by_the_cpu_library", lambda x: False)
    monkeypatch.setattr(gemm, "_faster", lambda: False)


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch):
    """Small tensors take the way of large ones: tiles, chunks, then a merge."""
    pytest.importorskip("triton")
    launch, bn_act = (triton_kernels.package().module(name) for name in ("launch", "bn_act"))
    monkeypatch.setattr(launch, "TILE_PIXELS", 8)
    monkeypatch.setattr(launch, "REDUCE_PROGRAMS", 6)
    monkeypatch.setattr(bn_act, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(bn_act, "_ways", lambda view, config: [bn_act.STREAMED])
