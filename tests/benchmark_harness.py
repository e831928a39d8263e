"""The benchmarks' package for its tests, and competitors that compute nothing but a square."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def _import_package() -> None:
    """Import it from its folder: the root of the repository stays off sys.path."""
    if "benchmarks" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_package()
from benchmarks import machine, measure  # noqa: E402

RATES = machine.Rates(1e10, {"float32": 1e11})


@pytest.fixture
def no_measuring(monkeypatch):
    """The machine's rates given, and no cache to flush: these tests look at the machinery."""
    monkeypatch.setattr(machine, "rates", lambda: RATES)
    monkeypatch.setattr(machine, "CacheFlush", lambda: lambda: None)
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0)


X = torch.linspace(-1, 1, 101)
TRUTH = measure.Truth({"y": X.double() ** 2}, {"y": X**2})


def competitor(name, log, y=None, call=None):
    return measure.Competitor(
        name,
        call or (lambda: log.append(name)),
        lambda: {"y": X**2 if y is None else y},
        lambda: log.append(f"prepare {name}"),
    )
