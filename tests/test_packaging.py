"""The wheel: its tag, content and CUDA kernels, an install in a clean environment, a broken library.

One build serves all tests: with CUDA kernels for two GPUs where there is nvcc. FUSEDRES_TEST_TORCH
names other PyTorches to load it with, by an interpreter's path or a version to install (gigabytes):
"2.10.0 2.14.1 /venv/bin/python".
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import elf, toolchain, triton_kernels

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("installed_probe.py")
GATE = Path(__file__).with_name("cuda_gate.py")
# What a checkout holds beside its sources.
NOT_SOURCES = (".*", "build", "dist", "*.egg-info", "__pycache__", "_C.so", "fusedres-demo")

ARCHS = ("80", "90a") if toolchain.find_nvcc() else ()
OTHERS = os.environ.get("FUSEDRES_TEST_TORCH", "").split()

pytestmark = pytest.mark.slow
with_kernels = pytest.mark.skipif(not ARCHS, reason="no nvcc")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's standard output; its whole output is in the message when it fails."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FUSEDRES_LIBRARY")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing left in build/ can slip into it."""
    sources = tmp_path_factory.mktemp("sources") / "fusedres"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    out = tmp_path_factory.mktemp("wheel")
    pip = sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"
    archs = " ".join(ARCHS)
    run(*pip, "--wheel-dir", out, ".", cwd=sources, FUSEDRES_CUDA_ARCHS=archs)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A new environment's interpreter and site-packages, holding the wheel and this torch."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(run(python, "-c", code, cwd=home).strip())
    pip = sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"
    run(*pip, wheel, cwd=home)
    # torch is a gigabyte: the packages of the running environment come last on the path instead.
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python, site


@pytest.fixture(scope="session")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    return Path(zipfile.ZipFile(wheel).extract("fusedres/_C.so", folder))


def probe(python: Path, tmp_path: Path, *arguments: str, **environment: str) -> dict:
    return json.loads(run(python, PROBE, *arguments, cwd=tmp_path, **environment).splitlines()[-1])


def undefined(library: Path) -> set[str]:
    """What the library takes from torch; nm marks the symbols that may be absent with a w."""
    told = run("nm", "-D", "--undefined-only", library, cwd=library.parent)
    return {name for name in re.findall(r" [Uw] (\w+)$", told, re.M) if "torch_" in name}


def test_one_wheel_serves_every_python(wheel: Path):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("fusedres", "py3", "none")
    public, _, local = version.partition("+")
    assert public == fusedres.__version__
    kernels = "".join(f".sm{arch}" for arch in ARCHS)
    assert re.fullmatch(rf"cu\d+{kernels}" if ARCHS else "cpu", local)
    assert platform != "any"


def test_the_wheel_holds_the_whole_library_and_nothing_else(wheel: Path):
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fusedres").rglob("*.py")}
    kernels = {f"fusedres/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    wanted = sources | kernels | {"fusedres/_C.so"}
    metadata = {name for name in packed if fnmatch.fnmatch(name, "fusedres-*.dist-info/*")}
    assert packed - metadata == wanted
    assert any(name.endswith("LICENSE") for name in metadata)


def test_the_wheel_asks_for_torch_only(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert "Requires-Python: >=3.10" in lines


def test_the_library_needs_no_python_symbol(library: Path):
    symbols = run("nm", "-D", "--undefined-only", library, cwd=library.parent).split()
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert [s for s in symbols if s.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_the_library_runs_on_an_older_linux(library: Path):
    """What manylinux_2_28 has: GCC 8's libstdc++ (pypa/manylinux, auditwheel's policy)."""
    told = run("objdump", "-T", library, cwd=library.parent)
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
    found = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", told)
    assert {name for name, _ in found} == newest.keys()
    assert [v for v in found if tuple(map(int, v[1].split("."))) > newest[v[0]]] == []


def test_an_installed_wheel_runs_natively(installed: tuple[Path, Path], tmp_path: Path):
    python, site = installed
    report = probe(python, tmp_path)
    assert Path(report["file"]).is_relative_to(site)
    assert report["version"] == fusedres.__version__
    assert report["backends"]["native"] is None
    assert report["native"] is None
    assert report["warnings"] == []
    assert tuple(report["archs"]) == ARCHS


# --- its CUDA kernels


def test_the_archs_inside_are_what_was_asked(library: Path):
    assert elf.cuda_archs(library) == ARCHS


@with_kernels
@pytest.mark.skipif(triton_kernels.missing() is not None, reason="cuobjdump is Triton's")
def test_its_kernels_pass_the_compile_gate(library: Path):
    printed = run(sys.executable, GATE, "--library", library, cwd=ROOT)
    sources = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = set(re.findall(r"__global__[^;{]*?(\w+)_kernel\(", sources))
    for arch in ARCHS:
        lacks = set() if arch == "90a" else {"conv_sm90"}
        assert set(re.findall(rf"^ *(\w+) .* {arch} ", printed, re.M)) == kernels - lacks


@with_kernels
@pytest.mark.parametrize("gpu,covered", [("9.0", True), ("8.9", True), ("12.0", False)])
def test_a_gpu_that_is_not_inside_is_one_warning(gpu, covered, installed, tmp_path):
    report = probe(installed[0], tmp_path, "--gpu", gpu)
    assert report["native"] is None  # on the CPU it runs all the same
    assert (report["chosen"][0] == "native") == covered and len(set(report["chosen"])) == 1
    assert len(report["warnings"]) == (not covered)
    for warning in report["warnings"]:
        for part in (f"capability {gpu}", " ".join(ARCHS), "FUSEDRES_CUDA_ARCHS=120f pip install"):
            assert part in warning


@pytest.mark.parametrize("other", OTHERS or [pytest.param("", marks=pytest.mark.skip(
    reason="FUSEDRES_TEST_TORCH names no other PyTorch"))])  # fmt: skip
def test_another_torch_loads_it(other: str, wheel: Path, library: Path, tmp_path: Path):
    python = Path(other)
    if re.fullmatch(r"[\d.]+", other):
        venv.create(tmp_path / "other", with_pip=False, symlinks=True)
        python = tmp_path / "other" / "bin" / "python"
        pip = sys.executable, "-m", "pip", "--python", python, "install"
        run(*pip, f"torch=={other}", cwd=tmp_path)
    zipfile.ZipFile(wheel).extractall(tmp_path / "path")
    symbols = sorted(undefined(library))
    found = {"PYTHONPATH": str(tmp_path / "path"), "LD_BIND_NOW": "1"}
    report = probe(python, tmp_path, "--symbols", *symbols, **found)
    assert Path(report["file"]).is_relative_to(tmp_path)
    assert report["native"] is None and report["warnings"] == []
    assert tuple(report["archs"]) == ARCHS
    only_in_cuda = ["aoti_torch_get_current_cuda_stream"] if ARCHS else []
    assert report["unresolved"] == ([] if report["torch_has_cuda"] else only_in_cuda)
    assert not re.fullmatch(r"[\d.]+", other) or report["torch"].startswith(other)


# --- without it


@pytest.mark.parametrize("harm", ["missing", "cut short", "not a library"])
def test_without_its_library_it_says_why_and_runs(
    harm: str, installed: tuple[Path, Path], tmp_path: Path
):
    python, site = installed
    package = shutil.copytree(site / "fusedres", tmp_path / "path" / "fusedres")
    library = package / "_C.so"
    if harm == "missing":
        library.unlink()
    else:
        library.write_bytes(library.read_bytes()[:4096] if harm == "cut short" else b"\0" * 4096)
    report = probe(python, tmp_path, PYTHONPATH=str(tmp_path / "path"))
    assert Path(report["file"]).is_relative_to(tmp_path)
    reason = report["backends"]["native"]
    assert reason is not None and "_C.so" in reason
    assert report["backends"]["reference"] is None
    assert len(report["warnings"]) == 1 and reason in report["warnings"][0]
    assert reason in report["native"]


def test_the_kernels_folder_is_no_package_of_its_own():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match=r"fusedres\.kernels, not 'kernels'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_installed_kernels_folder_imports(installed: tuple[Path, Path], tmp_path: Path):
    run(installed[0], "-c", "import fusedres.kernels", cwd=tmp_path)
