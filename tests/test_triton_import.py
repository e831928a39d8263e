"""Triton in a process of its own: nothing imports it that does not run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fusedres
from test_triton_dispatch import on_this_cpu

LAZY = """
import sys, torch, fusedres
block = fusedres.SEBottleneck(16, 4)
block.train()(torch.randn(2, 16, 5, 5)).sum().backward()
fusedres.backends()
assert "triton" not in sys.modules
try:
    with fusedres.backend("triton"):
        block(torch.randn(2, 16, 5, 5))
except RuntimeError as error:
    print(error)
"""

WITHOUT = """
import importlib.machinery, sys

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] != "triton":
            return super().find_spec(name, path, target)

finders = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder]
sys.meta_path[:] = [*finders, Hiding]
"""


def run(code: str, **environment: str) -> str:
    root = fusedres.__path__[0].removesuffix("fusedres")
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=inherited | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_this_cpu
def test_triton_is_imported_only_to_run_it():
    assert "set TRITON_INTERPRET=1 before the first import" in run(LAZY)


def test_without_triton_everything_runs_and_says_why():
    told = run(WITHOUT + LAZY, TRITON_INTERPRET="1")
    assert "backend 'triton' cannot run" in told and "Triton is not installed" in told
    doctor = "from fusedres.report import doctor; print(*doctor.examine())"
    assert re.search("Triton.*not installed", run(WITHOUT + doctor))
