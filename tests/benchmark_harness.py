"""The benchmarks' package for its tests, and competitors that compute nothing but a square."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


def own_environment() -> dict[str, str]:
    """For a pytest inside a test: pytest-benchmark refuses to run in a worker of pytest-xdist."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


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
from benchmarks import clock, machine, measure, peers, results  # noqa: E402

CPU = torch.device("cpu")
RATES = machine.Rates(1e10, {"float32": 1e11})


class FakeClock(clock.Clock):
    """Flushes nothing and waits for nothing: these tests look at the machinery."""

    def __init__(self, device=CPU, log=None):
        self.device, self.log = device, log if log is not None else []

    def chill(self):
        self.log.append("flush")


@pytest.fixture
def no_measuring(monkeypatch):
    """The machine's rates given."""
    monkeypatch.setattr(machine, "rates", lambda device: RATES)


X = torch.linspace(-1, 1, 101)
TRUTH = measure.Truth({"y": X.double() ** 2}, {"y": X**2})


def competitor(name, log, y=None, call=None):
    return measure.Competitor(
        name,
        call or (lambda: log.append(name)),
        lambda: {"y": X**2 if y is None else y},
        lambda: log.append(f"prepare {name}"),
    )


# --- a result as a run writes it


def figures(median, **more):
    spread = {"rounds": 20, "median": median, "q1": 0.9 * median, "q3": 1.1 * median}
    return spread | {"least": 0.8 * median} | dict.fromkeys(results._FIGURES) | more


def peer(median, ratio, halves=None, tie=False, **more):
    return figures(median, ratio=ratio, halves=halves or [ratio, ratio], tie=tie, **more)


def row(id, competitors, **more):
    network, mode, batch, dtype = id.split("-")
    facts = {"network": network, "mode": mode, "batch": int(batch[1:]), "dtype": dtype}
    head = {"id": id, "suite": "models", "status": "measured", "took_seconds": 3.0}
    body = {
        "title": id, "device": "cpu", "facts": facts, "competitors": competitors, "missing": {},
        "refused": {}, "graphs": "not asked for", "floor": None, "convolutions_alone": None,
        "notes": [], "other_load_cores": 0.0,
    }  # fmt: skip
    return head | body | more


def result(*rows, **more):
    rates = {"copy_bandwidth": 1e10, "matmul": {"float32": 1e11}}
    cpu = {"cpu": "a CPU", "isa": "AVX2", "cores": 2, "threads": 2, "system": "Linux"}
    return {
        "schema": results.SCHEMA, "machine": cpu | {"measured": {"cpu": rates}}, "gpu": None,
        "versions": {"torch": "2.13.0", "python": "3.11"}, "commit": "c0ffee0" * 5,
        "modified": False, "date": "2026-11-20T10:00:00+00:00", "backends": {},
        "settings": {"seconds": 2.0, "suite": "table"}, "rows": list(rows),
    } | more  # fmt: skip


ID = "resnet50-training-b8-fp32"


def recorded(median=1.0, ratio=1.4, halves=None, saved=60, **more):
    """A result of one row, fusedres against eager."""
    competitors = {
        peers.OURS: figures(median, saved=saved),
        peers.EAGER: peer(ratio * median, ratio, halves, saved=100),
    }
    return result(row(ID, competitors), **more)
