"""Which backend runs an op, who is told, and what is said when one cannot."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fusedres
from cases import randn
from fusedres import dispatch, observers
from fusedres.functional import batch_norm_act
from modules import block_pair


def backend_of_a_call() -> str:
    events = []
    with observers.observe(events.append):
        batch_norm_act(randn((2, 3, 4, 4)), None, None, training=True)
    assert [e.op for e in events] == ["bn_act"]
    return events[0].backend


def test_backends_tells_what_is_available():
    found = fusedres.backends()
    assert list(found) == ["native", "triton", "reference"]
    assert found["native"] is None and found["reference"] is None
    assert found["triton"] and isinstance(found["triton"], str)
    assert "x is" not in found["triton"]  # the caller gave none


def test_auto_takes_the_first_that_can():
    assert backend_of_a_call() == "native"
    with fusedres.backend("auto"):
        assert backend_of_a_call() == "native"


def test_as_a_context_manager_it_holds_inside_and_nests():
    with fusedres.backend("reference"):
        assert backend_of_a_call() == "reference"
        with fusedres.backend("native"):
            assert backend_of_a_call() == "native"
            with fusedres.backend("auto"):
                assert backend_of_a_call() == "native"
        assert backend_of_a_call() == "reference"
    assert backend_of_a_call() == "native"


def test_an_error_inside_restores_the_backend():
    with pytest.raises(KeyError), fusedres.backend("reference"):
        raise KeyError
    assert backend_of_a_call() == "native"


def test_as_a_function_it_holds_for_the_process():
    try:
        fusedres.backend("reference")
        assert backend_of_a_call() == "reference"
        with fusedres.backend("native"):
            assert backend_of_a_call() == "native"
        assert backend_of_a_call() == "reference"
    finally:
        fusedres.backend("auto")
    assert backend_of_a_call() == "native"


def test_as_a_decorator_it_holds_in_the_function_alone():
    @fusedres.backend("reference")
    def decorated() -> str:
        return backend_of_a_call()

    assert backend_of_a_call() == "native"
    assert decorated() == "reference"
    assert backend_of_a_call() == "native"
    assert decorated() == "reference"


def test_a_context_is_one_threads_own():
    found, inside, done = [], threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        found.append(backend_of_a_call())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fusedres.backend("reference"):
        inside.set()
        done.wait()
        assert backend_of_a_call() == "reference"
    thread.join()
    assert found == ["native"]


def test_threads_may_share_a_decorated_function():
    both_inside = threading.Barrier(2)

    @fusedres.backend("reference")
    def decorated(leaves_first: threading.Event, waits: bool) -> str:
        both_inside.wait()
        if waits:
            leaves_first.wait()
        return backend_of_a_call()

    found, left = [], threading.Event()

    def other() -> None:
        found.append(decorated(left, waits=True))
        found.append(backend_of_a_call())

    thread = threading.Thread(target=other)
    thread.start()
    found.append(decorated(left, waits=False))
    left.set()
    thread.join()
    found.append(backend_of_a_call())
    assert found == ["reference", "reference", "native", "native"]


def test_contexts_made_in_turn_by_threads_leave_no_default():
    """Until it is entered a choice is the process's; two of them end in either order."""
    first, second = fusedres.backend("reference"), fusedres.backend("native")
    with first:
        pass
    with second:
        pass
    assert dispatch.forced_backend() is None


def test_the_backward_takes_the_backend_of_its_context():
    x = randn((2, 3, 4, 4)).requires_grad_()
    for name in ("native", "reference"):
        events = []
        y = batch_norm_act(x, None, None, training=True)
        with fusedres.backend(name), observers.observe(events.append):
            y.sum().backward()
        assert [e.op for e in events] == ["bn_act_backward"] * (name == "native")


def test_inside_a_context_a_backward_runs_in_its_thread():
    """On a GPU too, whose backward would be another thread's, with the choices of the process."""
    multithreaded = torch._C._is_multithreading_enabled
    for context in (lambda: fusedres.backend("native"), lambda: observers.observe(print)):
        with context(), context():
            assert not multithreaded()
        with pytest.raises(KeyError), context():
            raise KeyError
        assert multithreaded()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="name: wanted one of 'auto', 'native'.*got 'cuda'"):
        fusedres.backend("cuda")
    assert backend_of_a_call() == "native"


def test_a_backend_that_cannot_run_says_why():
    x = randn((2, 3, 4, 4), torch.float64)
    stats = torch.zeros(3), torch.ones(3)
    with (
        fusedres.backend("triton"),
        pytest.raises(RuntimeError, match="'triton' cannot run bn_act: (float64|Triton is not)"),
    ):
        batch_norm_act(x, *stats, training=True)
    assert stats[0].count_nonzero() == 0


@pytest.mark.parametrize("name", ["bn_act", "bn_stats"])
def test_an_op_called_with_integers(name):
    x = torch.ones(2, 3, 4, 4, dtype=torch.int32)
    args = (None, None, None, None, None, True, 1e-5, "relu", False) if name == "bn_act" else ()
    with pytest.raises(TypeError, match="x: wanted a dtype among float32.*got torch.int32"):
        getattr(torch.ops.fusedres, name)(x, *args)


def test_observers_hear_every_op_of_their_own_context():
    block, _ = block_pair("SEBottleneck")
    outer, inner = [], []
    x = randn((2, 16, 6, 6))
    with observers.observe(outer.append):
        with observers.observe(inner.append):
            block(x)
        heard = len(outer)
        block.eval()(x)
    assert inner == outer[:heard] and len(outer) > heard
    assert {"conv_stats", "bn_act", "bn_se_act"} <= {e.op for e in inner}
    assert all(
        e.bytes_moved > 0 and e.eager_bytes >= e.bytes_moved for e in inner if e.op == "bn_se_act"
    )
    assert not observers.observed()


def test_inference_of_a_block_is_one_call_a_convolution():
    block, _ = block_pair("BasicBlock", stride=2)
    events = []
    with torch.no_grad(), observers.observe(events.append):
        block.eval()(randn((2, 16, 6, 6)))
    assert [(e.op, e.backend) for e in events] == [("conv_bn_act", "onednn")] * 3


# --- without the compiled library

PROBE = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedres
    block = fusedres.SEBottleneck(16, 4)
    x = torch.randn(2, 16, 5, 5)
    for _ in range(2):
        block.train()(x).sum().backward()
        with torch.no_grad():
            y = block.eval()(x)
            z = fusedres.BasicBlock(16, 16).eval()(x)
assert y.shape == z.shape == x.shape and y.isfinite().all() and z.isfinite().all()
found = [str(w.message) for w in caught if "fusedres" in str(w.message)]
assert len(found) == 1, found
print(found[0])
print(fusedres.backends()["native"])
assert fusedres.native.cpu_isa() is None
try:
    with fusedres.backend("native"):
        block.train()(x)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("library,reason", [
    ("missing", "is not built: run `make build`"), ("broken", "does not load:"),
    ("foreign", "is not the library of fusedres"),
])  # fmt: skip
def test_without_the_library_everything_runs_and_says_why(library, reason, tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    if library == "broken":
        path.write_bytes(b"\x7fELF, and then not")
    elif library == "foreign":
        path.symlink_to(Path(torch.__file__).parent / "lib" / "libc10.so")
    monkeypatch.setenv("FUSEDRES_LIBRARY", str(path))
    root = fusedres.__path__[0].removesuffix("fusedres")
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    warning, told, refused = done.stdout.splitlines()
    assert "fusedres runs plain PyTorch" in warning and reason in warning
    assert reason in told and "_C.so" in told
    assert "backend 'native' cannot run" in refused and reason in refused


def test_a_cpu_with_the_library_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend_of_a_call()
