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
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run with, or None without the library."""
    if load_error() is not None:
        return None
    return ISA_NAMES[torch.ops.fusedres_native.cpu_isa()]
