"""Architectures, the GPUs that they run on, and where nvcc is looked for."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusedres import toolchain

ROOT = Path(__file__).parents[1]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# --- architectures


@pytest.mark.parametrize("text,wanted", [
    ("90a", ("90a",)),
    ("120f;80;90a", ("80", "90a", "120f")),
    (" 86, 80 86 ", ("80", "86")),
    ("all", toolchain.ALL),
    ("", ()),
    (" \n", ()),
])  # fmt: skip
def test_archs_are_named_in_any_order(text, wanted):
    assert toolchain.parse(text) == wanted


@pytest.mark.parametrize("text,message", [
    ("75", "unknown architecture '75' in '75': wanted all, or some of 80 86"),
    ("sm_90a", "unknown architecture 'sm_90a'"),
    ("80 90b", "unknown architecture '90b' in '80 90b'"),
    ("9.0a", "unknown architecture '9.0a'"),
    ("all 80", "unknown architecture 'all'"),
    ("100 100f", "one architecture for a GPU, got 100 and 100f"),
])  # fmt: skip
def test_an_arch_that_is_none(text, message):
    with pytest.raises(ValueError, match=f"^FUSEDRES_CUDA_ARCHS: .*{message}"):
        toolchain.parse(text)


# CUDA programming guide: the same major version and no lower minor one; "a" that chip; "f" family
GPUS = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
COVERED = {
    "80": [(8, 0), (8, 6), (8, 7), (8, 9)],
    "86": [(8, 6), (8, 7), (8, 9)],
    "89": [(8, 9)],
    "90": [(9, 0)],
    "90a": [(9, 0)],
    "100": [(10, 0), (10, 3)],
    "100a": [(10, 0)],
    "100f": [(10, 0), (10, 3)],
    "103f": [(10, 3)],
    "110": [(11, 0)],
    "120f": [(12, 0), (12, 1)],
    "121a": [(12, 1)],
}


@pytest.mark.parametrize("arch", COVERED)
def test_the_gpus_that_code_runs_on(arch):
    assert [gpu for gpu in GPUS if toolchain.covers(arch, gpu)] == COVERED[arch]


def test_the_arch_for_a_gpu():
    wanted = [None, "80", "86", "86", "89", "90a", "100f", "100f", "110", "120f", "120f"]
    assert [toolchain.arch_of(gpu) for gpu in GPUS] == wanted
    assert toolchain.arch_of((13, 0)) is None
    for gpu, arch in zip(GPUS, wanted, strict=True):
        assert arch is None or toolchain.covers(arch, gpu)


@pytest.mark.parametrize("says,wanted", [
    ("echo 9.0; echo 9.0", ("90a",)),
    ("echo 12.1; echo 8.6", ("86", "120f")),
    ("echo 7.5", ()),
    ("echo 'NVIDIA-SMI has failed'; exit 9", ()),
    ("echo 9.0; exit 1", ()),
])  # fmt: skip
def test_the_gpus_of_this_machine(says, wanted, tmp_path, monkeypatch):
    script(tmp_path / "nvidia-smi", says)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert toolchain.present_archs() == wanted


def test_a_machine_without_the_drivers_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.present_archs() == ()


# --- nvcc


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Every place where an nvcc can be, each with one."""
    given = script(tmp_path / "given" / "nvcc", "exit 0")
    packages = script(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", "exit 0")
    home = script(tmp_path / "home" / "bin" / "nvcc", "exit 0")
    on_path = script(tmp_path / "path" / "nvcc", "exit 0")
    monkeypatch.setenv("FUSEDRES_NVCC", str(given))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    return [given, packages, home, on_path]


def test_nvcc_is_looked_for_in_this_order(machine, monkeypatch):
    given, packages, home, on_path = machine
    assert toolchain.find_nvcc() == str(given)
    monkeypatch.delenv("FUSEDRES_NVCC")
    assert toolchain.find_nvcc() == str(packages)
    packages.unlink()
    assert toolchain.find_nvcc() == str(home)
    home.unlink()
    assert toolchain.find_nvcc() == str(on_path)
    on_path.unlink()
    assert toolchain.find_nvcc() is None


def test_the_newest_of_two_toolkits_of_packages(machine, monkeypatch):
    monkeypatch.delenv("FUSEDRES_NVCC")
    older = script(machine[1].parents[2] / "cu12" / "bin" / "nvcc", "exit 0")
    assert toolchain.find_nvcc() == str(machine[1])
    machine[1].unlink()
    assert toolchain.find_nvcc() == str(older)


def test_an_nvcc_that_was_named_and_is_none(machine, monkeypatch):
    machine[0].unlink()
    with pytest.raises(ValueError, match="FUSEDRES_NVCC: wanted the path of nvcc, got .*given"):
        toolchain.find_nvcc()


def test_what_a_release_compiles_for():
    text = (
        "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 12.4, V12.4.131\n"
    )
    assert toolchain.release_of(text) == (12, 4)
    assert toolchain.release_of("clang version 19") is None
    assert toolchain.too_new(toolchain.ALL, (12, 4)) == ["100f", "120f"]
    assert toolchain.too_new(toolchain.ALL, (13, 0)) == []


def test_the_local_version():
    assert toolchain.local_version((), None) == "+cpu"
    assert toolchain.local_version(("90a",), (13, 0)) == "+cu130.sm90a"
    assert toolchain.local_version(("80", "120f"), (12, 9)) == "+cu129.sm80.sm120f"
    assert toolchain.local_version(toolchain.ALL, (13, 0)) == ""


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements" / "cuda.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [toolchain.PACKAGES]
