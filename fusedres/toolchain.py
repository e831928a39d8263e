"""GPU architectures by nvcc's names, which GPUs they run on, and where nvcc is.

The build (csrc/build.py) reads this file too, without importing fusedres: standard library only.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Capability = tuple[int, int]

ALL = ("80", "86", "89", "90a", "100f", "120f")  # what a wheel for every GPU holds
LOWEST = (8, 0)  # the kernels need asynchronous copies to shared memory

# The first CUDA release that compiles for an architecture (its release notes, "new features").
FIRST_RELEASE = {
    "80": (11, 0), "86": (11, 1), "87": (11, 4), "88": (13, 0), "89": (11, 8), "90": (11, 8),
    "90a": (12, 0), "100": (12, 8), "100a": (12, 8), "100f": (12, 9), "103": (12, 9),
    "103a": (12, 9), "103f": (12, 9), "110": (13, 0), "110a": (13, 0), "110f": (13, 0),
    "120": (12, 8), "120a": (12, 8), "120f": (12, 9), "121": (12, 9), "121a": (12, 9),
    "121f": (12, 9),
}  # fmt: skip

# nvcc and what a build with it needs, from the package index: 271 MB.
PACKAGES = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2"


def parse(text: str) -> tuple[str, ...]:
    """The architectures that FUSEDRES_CUDA_ARCHS names, in ascending order; "all" is ``ALL``.

    Raises:
        ValueError: a name that is none, or two for the same GPU.
    """
    names = re.split(r"[\s,;]+", text.strip()) if text.strip() else []
    if names == ["all"]:
        return ALL
    for name in names:
        if name not in FIRST_RELEASE:
            raise ValueError(
                f"FUSEDRES_CUDA_ARCHS: unknown architecture {name!r} in {text!r}: wanted all, or"
                f" some of {' '.join(FIRST_RELEASE)}, or nothing for CPU kernels only"
            )
    archs = sorted(set(names), key=lambda name: (_number(name), name))
    for one, other in itertools.pairwise(archs):
        if _number(one) == _number(other):
            raise ValueError(
                f"FUSEDRES_CUDA_ARCHS: wanted one architecture for a GPU, got {one} and {other}"
            )
    return tuple(archs)


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def covers(arch: str, capability: Capability) -> bool:
    """Whether machine code for ``arch`` runs on a GPU of this compute capability.

    It runs on GPUs of the same major version and the same or a higher minor one; with "a" on that
    GPU alone, with "f" on the family, which has the major version in common (CUDA programming
    guide, "compute capabilities").
    """
    major, minor = divmod(_number(arch), 10)
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def arch_of(capability: Capability) -> str | None:
    """The architecture to compile for on a GPU of this compute capability, or None."""
    covering = [arch for arch in ALL if covers(arch, capability)]
    own = "{}{}".format(*capability)
    return covering[-1] if covering else own if own in FIRST_RELEASE else None


def present_archs() -> tuple[str, ...]:
    """The architectures of the GPUs in this machine, from the driver's own tool."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ()
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.M) if done.returncode == 0 else []
    archs = {arch_of((int(major), int(minor))) for major, minor in found} - {None}
    return parse(" ".join(archs))


def candidates() -> Iterable[tuple[str, str]]:
    """Where nvcc may be, and who says so, in the order in which it is looked for."""
    if given := os.environ.get("FUSEDRES_NVCC"):
        yield "FUSEDRES_NVCC", given
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec is not None else ():
        for path in sorted(Path(root).glob("cu*/bin/nvcc"), reverse=True):
            yield "the packages", str(path)
    if home := os.environ.get("CUDA_HOME"):
        yield "CUDA_HOME", str(Path(home) / "bin" / "nvcc")
    yield "PATH", "nvcc"


def find_nvcc() -> str | None:
    """The nvcc that a build takes, or None.

    Raises:
        ValueError: FUSEDRES_NVCC is set and no program.
    """
    for source, candidate in candidates():
        path = shutil.which(candidate)
        if path is not None:
            return path
        if source == "FUSEDRES_NVCC":
            raise ValueError(f"FUSEDRES_NVCC: wanted the path of nvcc, got {candidate!r}")
    return None


def release_of(version_text: str) -> tuple[int, int] | None:
    """The CUDA release in what ``nvcc --version`` prints."""
    found = re.search(r"release (\d+)\.(\d+)", version_text)
    return (int(found[1]), int(found[2])) if found else None


def too_new(archs: Sequence[str], release: tuple[int, int]) -> list[str]:
    """Those of ``archs`` that a CUDA release cannot compile for."""
    return [arch for arch in archs if FIRST_RELEASE[arch] > release]


def local_version(archs: Sequence[str], release: tuple[int, int] | None) -> str:
    """What tells a wheel for these architectures from the one for all: "+cu130.sm90a", "+cpu"."""
    if not archs:
        return "+cpu"
    if tuple(archs) == ALL:
        return ""
    return "+cu{}{}.".format(*release) + ".".join(f"sm{arch}" for arch in archs)


if __name__ == "__main__":  # the Makefile asks whether a build finds nvcc
    print(find_nvcc() or "no nvcc")
    sys.exit(find_nvcc() is None)
