"""The wheel: its tag and content, an install in a clean environment, a broken library."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fusedres

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("installed_probe.py")
# What a checkout holds beside its sources.
NOT_SOURCES = (".*", "build", "dist", "*.egg-info", "__pycache__", "_C.so", "fusedres-demo")

pytestmark = pytest.mark.slow


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
    run(*pip, "--wheel-dir", out, ".", cwd=sources)
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


def probe(python: Path, tmp_path: Path, **environment: str) -> dict:
    return json.loads(run(python, PROBE, cwd=tmp_path, **environment).splitlines()[-1])


def test_one_wheel_serves_every_python(wheel: Path):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("fusedres", "py3", "none")
    assert version == fusedres.__version__
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


def test_the_library_needs_no_python_symbol(wheel: Path, tmp_path: Path):
    library = zipfile.ZipFile(wheel).extract("fusedres/_C.so", tmp_path)
    undefined = run("nm", "-D", "--undefined-only", library, cwd=tmp_path).split()
    assert any(s.startswith("aoti_torch_") for s in undefined)
    assert [s for s in undefined if s.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))] == []


def test_an_installed_wheel_runs_natively(installed: tuple[Path, Path], tmp_path: Path):
    python, site = installed
    report = probe(python, tmp_path)
    assert Path(report["file"]).is_relative_to(site)
    assert report["version"] == fusedres.__version__
    assert report["backends"]["native"] is None
    assert report["native"] is None
    assert report["warnings"] == []


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
