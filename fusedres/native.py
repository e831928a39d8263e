"""Loads the compiled library, and remembers why when it cannot."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

ISA_NAMES = ("portable", "avx2", "avx512")


def library_path() -> Path:
    """Where the compiled library is looked for; FUSEDRES_LIBRARY names another one."""
    override = os.environ.get("FUSEDRES_LIBRARY")
    return Path(override) if override else Path(__file__).with_name("_C.so")


@cache
def load_error() -> str | None:
    """Load the library once; None, or the reason it is not there."""
    path = library_path()
    if not path.is_file():
        return f"{path.name} is not built: run `make build`, or install a wheel"
    if _cut_short(path):
        return f"{path.name} does not load: the file is cut short; build or install it again"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def _cut_short(path: Path) -> bool:
    # dlopen maps such a file and dies of SIGBUS, where an error could not be caught. An ELF file
    # of 64 bits ends with its section headers: their offset, entry size and number (ELF-64, 1).
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False  # dlopen says what is wrong with these
    order = "little" if header[5] == 1 else "big"
    offset, size, number = (
        int.from_bytes(header[a:b], order) for a, b in ((40, 48), (58, 60), (60, 62))
    )
    return offset + size * number > path.stat().st_size


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run with, or None without the library."""
    if load_error() is not None:
        return None
    return ISA_NAMES[torch.ops.fusedres_native.cpu_isa()]
