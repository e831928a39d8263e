"""python -m fusedres: what each command prints and exits with, and no traceback for the user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedres
import fusedres.demo
from fusedres import __main__ as cli
from fusedres import dispatch, native, reference
from fusedres.report import doctor
from fusedres.report.verify import NEAREST

TINY = ("--size", "32", "--batch", "2")


def run(*arguments: str) -> int:
    """The exit code of a command, also where argparse leaves by itself."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


def test_no_command_prints_help(capsys):
    assert run() == 2
    printed = capsys.readouterr()
    for command in ("doctor", "verify", "demo", "bench"):
        assert command in printed.err
    assert printed.out == ""


def test_as_a_program():
    command = [sys.executable, "-m", "fusedres", "verify", "resnet51"]
    root = Path(fusedres.__file__).parents[1]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert wrong.returncode == 2
    assert "unknown model 'resnet51'" in wrong.stderr and "resnet50" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# --- verify


def test_verify_passes_and_prints_the_worst_rows(capsys):
    assert run("verify", "resnet18", "--train", "--channels-last", "--size", "40") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + NEAREST + 1
    assert lines[-1].startswith("resnet18, float32, training: all ")


@pytest.fixture
def wrong_batch_norm(monkeypatch):
    right = reference.batch_norm
    monkeypatch.setattr(reference, "batch_norm", lambda *args: 1.01 * right(*args))


def test_verify_of_a_wrong_model_fails(wrong_batch_norm, capsys):
    assert run("verify", "resnet18", "--backend", "reference", "--all", *TINY) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "resnet18, float32, inference: 1 of 61 FAIL" in printed
    assert printed.count("num_batches_tracked") == 20  # --all


def test_verify_options_reach_the_model(monkeypatch):
    seen = []

    def verify(model, x, train):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append((model, x, train, autocast, dispatch.forced_backend()))
        return fusedres.report.Verification(())

    monkeypatch.setattr(fusedres.report, "verify", verify)
    options = ["--dtype", "float64", "--channels-last", "--batch", "3", "--size", "40"]
    assert run("verify", "se_resnet18", *options, "--train", "--backend", "native") == 0
    assert run("verify", "resnet18", *TINY, "--autocast", "bfloat16", "--seed", "1") == 0
    assert run("verify", "resnet18", *TINY, "--seed", "1") == 0
    assert run("verify", "resnet18", *TINY, "--seed", "2") == 0
    (model, x, train, autocast, backend), (second, y, *rest), (third, z, *_), (fourth, *_) = seen
    assert isinstance(model.layer1[0], fusedres.SEBasicBlock)
    assert x.shape == (3, 3, 40, 40) and x.is_contiguous(memory_format=torch.channels_last)
    assert {t.dtype for t in (x, *model.parameters())} == {torch.float64}
    assert (train, autocast, backend) == (True, False, "native")
    assert rest == [False, True, None] and y.is_contiguous()
    assert torch.equal(y, z) and torch.equal(second.conv1.weight, third.conv1.weight)
    assert not torch.equal(second.conv1.weight, fourth.conv1.weight)
    assert not torch.equal(second.bn1.running_var, torch.ones(64))  # nothing trivial is verified
    assert second.bn1.momentum == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet51",), "unknown model 'resnet51'; the models are: densenet121, "),
        ((), "arguments are required: model"),
        (("resnet18", "--batch", "0"), "wanted a number >= 1, got 0"),
        (("resnet18", "--size", "x"), "invalid _positive value: 'x'"),
        (("resnet18", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("resnet18", "--device", "nowhere"), "--device nowhere: "),
        (("resnet18", "--backend", "cuda"), "invalid choice: 'cuda'"),
        (("resnet18", "--bogus"), "unrecognized arguments: --bogus"),
        (
            ("resnet18", "--backend", "triton", "--dtype", "float64", *TINY),
            "backend 'triton' cannot run",
        ),
        (
            ("resnet18", "--train", "--size", "32", "--batch", "1"),
            "Expected more than 1 value per channel when training",
        ),
    ],
)
def test_verify_user_errors(arguments, message, capsys):
    assert run("verify", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_unknown_model_lists_every_name(capsys):
    run("verify", "nothing")
    printed = capsys.readouterr().err
    names = [n for n in fusedres.models.__all__ if n.islower()]
    assert all(name in printed for name in names) and "ResNet," not in printed


# --- doctor


def test_doctor_table(capsys):
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("python", "torch", "native library", "oneDNN", "threads", "GPU", "Triton", "nvcc"):
        assert word in printed
    assert fusedres.__version__ in printed and str(native.library_path()) in printed


def findings(capsys, *, exits: int = 0) -> dict[str, dict]:
    assert run("doctor", "--json") == exits
    return {f["name"]: f for f in json.loads(capsys.readouterr().out)}


def test_doctor_says_what_runs(capsys):
    found = findings(capsys)
    assert found["backend reference"]["available"] and found["backend native"]["available"]
    assert found["native library"]["available"]
    assert native.cpu_isa() in found["CPU kernels"]["value"]
    assert found["torch"]["value"].startswith(torch.__version__)
    for f in found.values():
        assert f["available"] is not False or f["reason"], f  # what is missing has a reason
    if not torch.cuda.is_available():
        assert found["GPU"]["available"] is False


def test_doctor_without_the_library(monkeypatch, capsys):
    monkeypatch.setattr(native, "load_error", lambda: "_C.so is not built")
    found = findings(capsys)
    assert found["native library"]["reason"] == "_C.so is not built"
    assert found["backend native"]["reason"] == "_C.so is not built"
    assert found["GPU kernels"]["reason"] == "they are in the native library"
    assert "CPU kernels" not in found and found["backend reference"]["available"]


def test_doctor_with_a_library_of_another_version(capsys):
    tomorrow = torch.library.Library("fusedres_native", "FRAGMENT")
    tomorrow.define("of_tomorrow(Tensor x) -> Tensor")
    found = findings(capsys)
    tomorrow._destroy()
    assert found["native library"]["available"] is False
    assert "lacks fusedres_native::of_tomorrow" in found["native library"]["reason"]


def test_doctor_tries_each_backend(wrong_batch_norm, capsys):
    found = findings(capsys)
    assert found["backend native"]["available"] is False  # it no longer agrees with the reference
    assert "not close" in found["backend native"]["reason"]


def test_doctor_fails_without_the_reference(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_trial", lambda backend: "RuntimeError: on purpose")
    assert findings(capsys, exits=1)["backend reference"]["reason"] == "RuntimeError: on purpose"


def test_doctor_names_the_compiler_that_a_build_takes(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("FUSEDRES_CXX", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not on PATH" in findings(capsys)["C++ compiler"]["reason"]
    for text, key in (("echo '\necho strange release 7'", "value"), ("exit 3", "reason")):
        script = tmp_path / "nvcc"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setenv("FUSEDRES_NVCC", str(script))
        found = findings(capsys)["nvcc"]
        assert str(script) in found["value"]
        assert {"value": "release 7", "reason": "exits with 3"}[key] in found[key]


# --- demo and bench


def test_demo_gets_its_arguments(monkeypatch):
    got = []
    monkeypatch.setattr(fusedres.demo, "main", lambda argv: got.append(argv) or 3)
    assert run("demo", "--epochs", "2", "--help") == 3
    assert got == [["--epochs", "2", "--help"]]


def test_bench_runs_pytest_on_the_benchmarks(monkeypatch):
    got = []
    monkeypatch.setattr(pytest, "main", lambda arguments: got.append(arguments) or 5)
    assert run("bench", "-k", "bn_act") == 5
    ((folder, *rest),) = got
    assert list(Path(folder).glob("bench_*.py"))
    assert rest == ["--benchmark-only", "--benchmark-quiet", "-q", "-k", "bn_act"]


def test_bench_help_is_its_own(monkeypatch, capsys):
    monkeypatch.setattr(pytest, "main", None)
    assert run("bench", "--help") == 0
    printed = capsys.readouterr().out
    options = "--suite", "--peers", "--seconds", "--threads", "--results", "--resume"
    assert all(option in printed for option in options)
    assert "python -m pytest --help" in printed and len(printed.splitlines()) < 30


def test_bench_interrupted_while_it_starts(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pytest, "main", interrupted)
    assert run("bench") == 130
    assert capsys.readouterr().err == "interrupted: nothing has been measured\n"


def test_bench_outside_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "fusedres" / "__main__.py"))
    monkeypatch.chdir(tmp_path)
    assert run("bench") == 2
    assert "pytest benchmarks --benchmark-only" in capsys.readouterr().err
