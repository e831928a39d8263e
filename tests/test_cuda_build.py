"""The build with CUDA kernels: what is passed to nvcc, and what is said when it cannot be done.

The compilers are scripts here; test_packaging.py builds with the real ones.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from setuptools.errors import PlatformError

from fusedres import elf, toolchain, triton_kernels
from test_toolchain import ROOT, script

CUDA_SOURCES = sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture
def library():
    """csrc/build.py, each time anew: a test may change what it looks at."""
    spec = importlib.util.spec_from_file_location("library_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def fake_nvcc(folder: Path, release: str = "13.0", compiles: str = "exit 0") -> Path:
    """Answers what a build asks; ``compiles`` is what it does for everything else."""
    (folder / "cuda" / "lib64").mkdir(parents=True, exist_ok=True)
    (folder / "cuda" / "lib64" / "libcudart_static.a").touch()
    return script(folder / "nvcc", f"""
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --dryrun*) echo "#$ TOP={folder}/cuda" >&2 ;;
  *) {compiles} ;;
esac""")  # fmt: skip


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Architectures were asked for, and this nvcc is there."""

    def ask(archs: str = "90a", **nvcc) -> Path:
        path = fake_nvcc(tmp_path, **nvcc)
        monkeypatch.setenv("FUSEDRES_CUDA_ARCHS", archs)
        monkeypatch.setenv("FUSEDRES_NVCC", str(path))
        return path

    return ask


# --- what is built


def test_what_was_asked_for_is_found(asked, library, tmp_path):
    nvcc = asked("120f 80")
    found = library.find_cuda()
    assert (found.nvcc, found.release, found.archs) == (str(nvcc), (13, 0), ("80", "120f"))
    assert found.libraries == (str(tmp_path / "cuda" / "lib64"),)


@pytest.mark.parametrize("archs", ["", None], ids=["asked for none", "a machine without a GPU"])
def test_cpu_kernels_only(archs, asked, library, tmp_path, monkeypatch):
    asked(compiles="exit 1")
    if archs is None:
        monkeypatch.delenv("FUSEDRES_CUDA_ARCHS")
        monkeypatch.setattr(library.toolchain, "present_archs", lambda: ())
    else:
        monkeypatch.setenv("FUSEDRES_CUDA_ARCHS", archs)
    assert library.find_cuda() is None
    text = library.ninja_file(tmp_path / "_C.so", tmp_path, "", None)
    assert "nvcc" not in text and "csrc/cuda/" not in text and "cudart" not in text
    assert "DFUSEDRES_CUDA_INSIDE='\"\"'" in text


def test_a_machine_with_a_gpu_builds_for_it(asked, library, monkeypatch):
    asked()
    monkeypatch.delenv("FUSEDRES_CUDA_ARCHS")
    monkeypatch.setattr(library.toolchain, "present_archs", lambda: ("89",))
    assert library.find_cuda().archs == ("89",)


def test_a_machine_with_a_gpu_and_no_nvcc_says_what_is_left_out(library, monkeypatch, capsys):
    monkeypatch.delenv("FUSEDRES_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(library.toolchain, "present_archs", lambda: ("89",))
    monkeypatch.setattr(library.toolchain, "find_nvcc", lambda: None)
    assert library.find_cuda() is None
    said = capsys.readouterr().out
    assert "for 89, the GPUs of this machine: they are left out. pip install 'cuda-tool" in said


def test_the_graph_compiles_every_cuda_source_for_every_arch(asked, library, tmp_path):
    asked("all")
    text = library.ninja_file(tmp_path / "_C.so", tmp_path, "", library.find_cuda())
    codes = re.findall(r"-gencode arch=compute_(\w+),code=sm_(\w+)", text)
    assert codes == [(arch, arch) for arch in toolchain.ALL]
    compiled = re.findall(r"^build \S+: nvcc \S+/csrc/cuda/(\w+)\.cu$", text, re.M)
    assert compiled == CUDA_SOURCES and compiled
    assert f"-L{tmp_path}/cuda/lib64 -lcudart_static" in text
    assert "DFUSEDRES_CUDA_INSIDE='\"13.0:80,86,89,90a,100f,120f\"'" in text


def test_a_sanitized_build_is_for_cpus(asked, library, monkeypatch, tmp_path):
    asked(compiles="exit 1")
    monkeypatch.setenv("FUSEDRES_SANITIZE", "address")
    monkeypatch.setattr(library, "ROOT", tmp_path)
    monkeypatch.setattr(library, "ninja_file", lambda *args: f"# {args[3:]}\n")
    library.build(tmp_path / "_C.so")
    assert (tmp_path / "build/ninja-address/build.ninja").read_text() == "# (None, [])\n"


# --- what cannot be done


@pytest.mark.parametrize("machine,message", [
    (dict(archs="90a sm_80"), "unknown architecture 'sm_80'"),
    (dict(archs="all", release="12.4"), "is of CUDA 12.4, which cannot compile for 100f 120f"
     r" \(needs 12.9 or newer\): pip install 'cuda-toolkit.*or leave them out"),
    (dict(release="none"), "nvcc --version exits with 0 and says: Cuda compilation tools, rel"),
])  # fmt: skip
def test_one_message_with_the_fix(machine, message, asked, library):
    asked(**machine)
    with pytest.raises(PlatformError, match=message):
        library.find_cuda()


def test_no_nvcc(asked, library, monkeypatch):
    asked()
    monkeypatch.setattr(library.toolchain, "find_nvcc", lambda: None)
    with pytest.raises(PlatformError, match="no nvcc was found to compile CUDA kernels for 90a"):
        library.find_cuda()


def test_a_named_nvcc_that_is_none(asked, library, monkeypatch):
    asked().unlink()
    with pytest.raises(PlatformError, match="FUSEDRES_NVCC: wanted the path of nvcc"):
        library.find_cuda()


# --- the whole build, with compilers that only pretend

# Writes what it is asked for; the library's first half only, where it is told to break there.
CXX = """
while [ $# -gt 0 ]; do case $1 in -o) out=$2 ;; -MF) deps=$2 ;; esac; shift; done
test -z "$deps" || echo "$out:" > $deps
test -z "$out" || echo half > $out
case $out in *_C.so.part) {link} ;; esac
"""


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what setup.py reads, so that no real object is overwritten."""
    copy = tmp_path / "sources"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy)
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fusedres", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=no_binaries)
    return copy


def built(sources: Path, tmp_path: Path, link: str = "exit 0", *, archs="90a", **nvcc):
    environment = os.environ | {
        "FUSEDRES_CUDA_ARCHS": archs,
        "FUSEDRES_NVCC": str(fake_nvcc(tmp_path, **nvcc)),
        "FUSEDRES_CXX": str(script(tmp_path / "cxx", CXX.format(link=link))),
    }
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "out"]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


WRITES = (
    "while [ $# -gt 0 ]; do case $1 in -o) echo half > $2 ;; -MF) echo x: > $2 ;; esac; shift; done"
)


@pytest.mark.parametrize("harm", [
    dict(compiles="echo 'residual_mix.cu(7): error: no such thing' >&2; exit 2"),
    dict(compiles=WRITES, link="echo 'ld: cannot find -lcudart_static' >&2; exit 1"),
], ids=["nvcc fails", "the linker fails"])  # fmt: skip
def test_a_compiler_that_fails_leaves_nothing(harm, sources, tmp_path):
    done = built(sources, tmp_path, **harm)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "failed: its message is above" in errors[0]
    assert "FUSEDRES_CUDA_ARCHS= (empty) leaves the CUDA kernels out" in errors[0]
    assert "Traceback" not in done.stderr
    assert ("no such thing" in done.stdout) or ("cannot find -lcudart" in done.stdout)
    assert not list(sources.glob("out/*")) and not list(sources.rglob("_C.so"))


def test_a_build_that_succeeds_makes_one_wheel(sources, tmp_path):
    done = built(sources, tmp_path, compiles=WRITES)
    assert done.returncode == 0, done.stderr
    (wheel,) = sources.glob("out/*")
    assert re.fullmatch(r"fusedres-[\d.]+\+cu130\.sm90a-py3-none-\w+\.whl", wheel.name)


def test_without_nvcc_the_wheel_is_for_cpus(sources, tmp_path):
    done = built(sources, tmp_path, archs="", compiles="exit 1")
    assert done.returncode == 0, done.stderr
    (wheel,) = sources.glob("out/*")
    assert re.fullmatch(r"fusedres-[\d.]+\+cpu-py3-none-\w+\.whl", wheel.name)


COUNTED = 'test -z "$out" || echo $out >> {log}\n'


def test_what_has_not_changed_is_not_compiled_again(asked, library, sources, tmp_path, monkeypatch):
    """Two builds at once spoilt the log in which ninja kept who includes what, for good."""
    log = tmp_path / "log"
    asked("", compiles="exit 1")
    counting = CXX.format(link=":") + COUNTED.format(log=log)
    monkeypatch.setenv("FUSEDRES_CXX", str(script(tmp_path / "cxx", counting)))
    monkeypatch.setattr(library, "ROOT", sources)
    with ThreadPoolExecutor(2) as both:
        list(both.map(library.build, [sources / "_C.so"] * 2))
    compiled = log.read_text().splitlines()
    assert len(compiled) == len(set(compiled)) > 20
    library.build(sources / "_C.so")
    assert log.read_text().splitlines() == compiled
    (sources / "csrc" / "cpu" / "simd.h").touch()  # the fake compiler says that nobody includes it
    (sources / "csrc" / "view.cpp").touch()
    library.build(sources / "_C.so")
    again = [Path(name).name for name in log.read_text().splitlines()[len(compiled) :]]
    assert again == ["csrc.view.o", "_C.so.part"]


REQUIRES = """
import sys
sys.modules["nvidia"] = None  # as if CUDA's packages were not installed
from setuptools import build_meta
print("requires", *build_meta.get_requires_for_build_wheel())
"""


@pytest.mark.parametrize("archs,nvcc,wanted", [
    ("90a", False, [toolchain.PACKAGES]), ("90a", True, []), ("", False, []),
])  # fmt: skip
def test_an_isolated_build_installs_nvcc_where_it_is_needed(archs, nvcc, wanted, sources, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | {
        "FUSEDRES_CUDA_ARCHS": archs,
        "PATH": str(fake_nvcc(tmp_path).parent) if nvcc else "/nowhere",
    }
    command = [sys.executable, "-c", REQUIRES]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[1:] == wanted


# --- what is in a library


def test_a_library_without_cuda_has_no_archs(tmp_path):
    nothing = tmp_path / "nothing.so"
    nothing.write_bytes(b"not a library")
    assert elf.cuda_archs(nothing) == ()
    assert elf.cuda_archs(Path(sys.executable).resolve()) == ()


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no nvcc")
@pytest.mark.skipif(triton_kernels.missing() is not None, reason="cuobjdump is Triton's")
def test_archs_are_read_as_cuobjdump_lists_them(library, tmp_path):
    """Code for a chip, for a family, for all of a generation; PTX is no code."""
    kernel, made = tmp_path / "kernel.cu", tmp_path / "made.so"
    kernel.write_text("__global__ void kernel(int* x) { *x = 7; }\n")
    archs, nvcc = {"80", "90a", "100f", "120"}, toolchain.find_nvcc()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(archs)]
    codes += ["-gencode=arch=compute_89,code=compute_89", "--compress-mode=size"]
    folders = [f"-L{folder}" for folder in library._library_folders(nvcc)]
    command = [nvcc, "-shared", "-Xcompiler=-fPIC", *folders, *codes, kernel, "-o", made]
    subprocess.run([*map(str, command)], check=True)
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    path = f"{tool.parent}:{os.environ['PATH']}"  # it starts another one
    told = subprocess.run(
        [tool, "--dump-sass", made], env=os.environ | {"PATH": path}, capture_output=True, text=True
    ).stdout
    listed = set(re.findall(r"^Fatbin elf code:\n=+\narch = sm_(\w+)$", told, re.M))
    assert set(elf.cuda_archs(made)) == listed == archs
