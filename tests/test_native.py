"""The compiled library itself: instruction sets, its own checks, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fusedres
import test_bn_act as bn
import test_bn_se_act as bn_se
import test_residual_mix as mix
import test_squeeze_excite as se
from accuracy import assert_as_accurate_as_eager
from cases import SHAPES, channels, randn
from fusedres import native
from harness import Unchanged, assert_same_bits, double, gradients

native_ops = torch.ops.fusedres_native


def test_the_library_is_loaded():
    assert native.load_error() is None
    assert native.cpu_isa() in native.ISA_NAMES


# --- memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("told", [True, False], ids=["PyTorch tells", "PyTorch before 2.13"])
def test_no_memory_is_pytorchs_own_error(told, monkeypatch):
    """Its headers alone say that a function of theirs has failed."""
    import resource

    if not told:
        monkeypatch.setattr(native, "_last_words", lambda: lambda: None)
    x = torch.empty(1 << 6, 1 << 6, 1 << 7, 1 << 7)  # 256 MB that nothing has touched
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), before[1]))
    try:
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
            torch.empty_like(x)
        with pytest.raises(RuntimeError) as caught:
            fusedres.functional.residual_mix(x, x)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    message = str(caught.value)
    assert message.startswith("residual_mix: ") and native.FAILED not in message
    assert "DefaultCPUAllocator: can't allocate memory" in message


# --- instruction sets

OPS = {"bn_act": bn, "squeeze_excite": se, "bn_se_act": bn_se, "residual_mix": mix}
ISA_CASES = ("odd", "odd_nhwc", "1x1", "tail_of_one_nhwc", "stage1", "stage2_nhwc")
ISA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs_and_options():
    """One case of every op in turn for each dtype, with the options that its own test has."""
    torch.manual_seed(0)
    for i, case in enumerate(ISA_CASES):
        for dtype in ISA_DTYPES:
            for name, module in OPS.items():
                options = module.OPTIONS[case]
                yield f"{name}-{case}-{i}-{dtype}", module, options, module.tensors_of(
                    *SHAPES[case], dtype, **({} if name == "bn_act" else options)
                )  # fmt: skip


def compute(fn_of: str) -> dict[str, dict]:
    found = {}
    for name, module, options, tensors in inputs_and_options():
        act = (options["act"],) if module is bn else ()
        fn = getattr(module, fn_of)(*act, **({} if act else options))
        found[name] = gradients(fn, tensors, constants=getattr(module, "CONSTANTS", ()))
    return found


RUN = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import conftest, test_native, fusedres
torch.set_num_threads(2)
with fusedres.backend("native"):
    torch.save((fusedres.native.cpu_isa(), test_native.compute("fused")), sys.argv[1])
"""


def computed_with(isa: str, path) -> tuple[str, dict]:
    root = fusedres.__path__[0].removesuffix("fusedres")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), root, os.path.dirname(__file__)],
        env=os.environ | {"FUSEDRES_CPU_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def test_every_instruction_set_is_as_accurate_as_eager(tmp_path):
    """Below the one that every other test runs with: FUSEDRES_CPU_ISA lowers the level."""
    eager, truth = compute("plain"), {}
    for name, module, options, tensors in inputs_and_options():
        act = (options["act"],) if module is bn else ()
        fn = module.plain(*act, **({} if act else options))
        constants = getattr(module, "CONSTANTS", ())
        dy = eager_gradient(eager[name])
        truth[name] = gradients(fn, double(tensors), dy, constants=constants)
    for isa in native.ISA_NAMES[: native.ISA_NAMES.index(native.cpu_isa())]:
        ran, found = computed_with(isa, tmp_path / f"{isa}.pt")
        assert ran == isa
        for name, out in found.items():
            for key, value in out.items():
                acc = eager[name][key]
                count = max(1, out["y"].numel() // out["y"].shape[1])
                sums = key[1:] in bn_se.PARAMETERS or value.dtype == torch.float64
                assert_as_accurate_as_eager(
                    value, truth[name][key], acc, gradient=key != "y",
                    count=count if sums else 1, name=f"{isa} {name} {key}",
                )  # fmt: skip


def test_an_instruction_set_that_this_cpu_lacks_is_not_taken():
    for isa in (native.ISA_NAMES[-1], "none"):
        run = "from fusedres import native; print(native.cpu_isa())"
        done = subprocess.run(
            [sys.executable, "-c", run], env=os.environ | {"FUSEDRES_CPU_ISA": isa},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == native.cpu_isa()


def eager_gradient(eager: dict) -> torch.Tensor:
    from harness import gradient_like

    return gradient_like(eager["y"]).double()


# --- its own checks: what the Python layer never passes must not crash the process

X = (2, 5, 4, 4)


def bn_args(**wrong):
    arguments = dict(
        x=randn(X), weight=channels(5), bias=channels(5), residual=randn(X), mean=channels(5),
        var=channels(5, low=0.5), batch_stats=False, eps=1e-5, act="relu", save_mask=True,
    )  # fmt: skip
    return (arguments | wrong).values()


def bn_backward_args(**wrong):
    arguments = dict(
        dy=randn(X), x=randn(X), weight=channels(5), bias=channels(5), residual=None,
        mean=channels(5), var=channels(5, low=0.5), mask=torch.zeros(10, 2, dtype=torch.uint8),
        batch_stats=True, eps=1e-5, act="relu", need_dresidual=True,
    )  # fmt: skip
    return (arguments | wrong).values()


def se_args(**wrong):
    arguments = dict(
        x=randn(X), w1=torch.randn(2, 5), b1=torch.randn(2), w2=torch.randn(5, 2),
        b2=torch.randn(5), residual=randn(X), act="relu", gate="sigmoid", post_act="relu",
        save_mask=True,
    )  # fmt: skip
    return (arguments | wrong).values()


def mix_args(**wrong):
    arguments = dict(
        branch=randn(X), shortcut=randn(X), gate=torch.rand(X), row_scale=torch.ones(2),
        alpha=1.0, beta=1.0, act="relu", save_mask=True,
    )  # fmt: skip
    return (arguments | wrong).values()


def dense_grad_args(**wrong):
    arguments = dict(
        dbuffer=randn(X), q=torch.zeros(5), r=torch.zeros(5), dh=randn((2, 3, 4, 4)), buffer=randn(X),
        mean=torch.zeros(3), var=torch.ones(3), weight=None, bias=None, eps=1e-5,
    )  # fmt: skip
    return (arguments | wrong).values()


BAD = [
    ("bn_act", bn_args(x=torch.ones(X, dtype=torch.int64)), "x must be float32"),
    ("bn_act", bn_args(x=randn((2, 5, 4, 8))[..., ::2]), "x must be dense"),
    ("bn_act", bn_args(x=torch.randn(5)), "x must have 2 or more dimensions"),
    ("bn_act", bn_args(weight=channels(4)), "weight must have shape"),
    ("bn_act", bn_args(bias=torch.ones(5, dtype=torch.int64)), "bias"),
    ("bn_act", bn_args(residual=randn(X, layout="NHWC")), "residual must have the memory layout"),
    ("bn_act", bn_args(residual=randn(X, torch.float64)), "residual must have the dtype"),
    ("bn_act", bn_args(residual=randn((2, 5, 4, 3))), "residual must have the shape"),
    ("bn_act", bn_args(mean=None), "mean"),
    ("bn_act", bn_args(mean=None, var=None), "mean"),
    ("bn_act", bn_args(act="tanh"), "act must be"),
    ("bn_act", bn_args(act="gelu"), "gelu has no mask"),
    ("bn_act_backward", bn_backward_args(mask=torch.zeros(3, 2, dtype=torch.uint8)), "mask must have"),
    ("bn_act_backward", bn_backward_args(mask=torch.zeros(10, 2)), "mask must be uint8"),
    ("bn_act_backward", bn_backward_args(dy=randn((2, 5, 4, 3))), "dy must have the shape"),
    ("squeeze_excite", se_args(w1=torch.randn(2, 4)), "w1 must have shape"),
    ("squeeze_excite", se_args(w2=torch.randn(5, 3)), "w2 must have shape"),
    ("squeeze_excite", se_args(b1=torch.randn(3)), "b1 must have shape"),
    ("squeeze_excite", se_args(gate="softmax"), "gate must be"),
    ("residual_mix", mix_args(shortcut=randn((2, 5, 4, 3))), "shortcut must have the shape"),
    ("residual_mix", mix_args(gate=randn(X, layout="NHWC")), "gate must have the memory layout"),
    ("residual_mix", mix_args(row_scale=torch.ones(3)), "row_scale must have shape"),
]  # fmt: skip
CPU_ONLY = [
    ("dense_store", (randn(X), randn((2, 3, 4, 4)), None, None, 3), "channels must lie inside"),
    ("dense_store", (randn(X), randn((2, 3, 4, 4)), *[torch.zeros(4)] * 2, 2), "mean must be .*5. or"),
    ("dense_load", (randn((2, 6, 4, 4)), randn(X), *[torch.ones(6)] * 4, 1e-5), "channels must lie"),
    ("dense_grad", dense_grad_args(q=torch.zeros(5).double()), "q must be contiguous Float"),
    ("dense_grad", dense_grad_args(r=None), "q and r must be given together"),
    ("dense_grad", dense_grad_args(dh=randn((2, 3, 4, 4), layout="NHWC")), "dh must be dense"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name,args,message", BAD + CPU_ONLY, ids=lambda v: v if isinstance(v, str) else ""
)
def test_its_own_checks(name, args, message):
    assert native.load_error() is None  # loads the library
    args = tuple(args)
    with Unchanged(*(a for a in args if isinstance(a, torch.Tensor))):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            getattr(native_ops, name)(*args)


def test_calls_from_several_threads():
    tensors = [bn.tensors_of((2 + i, 17, 28, 28), "NHWC", torch.float32) for i in range(4)]
    wanted = [gradients(bn.fused(), t) for t in tensors]
    found = [None] * 4

    def work(i: int) -> None:
        for _ in range(4):
            found[i] = gradients(bn.fused(), tensors[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits(a, b)
