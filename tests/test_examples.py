"""Every example runs, in its smallest form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(p.stem for p in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "_digits", raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--smoke"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() and "nan" not in printed


def test_there_is_an_example_for_every_system():
    assert {
        "degradation", "densenet", "highway", "lstm", "perceptrons", "plain_network",
        "preactivation", "projection_shortcut", "resnext", "scaled_residual", "squeeze_excite",
        "stochastic_depth", "transformer", "wide_resnet",
    } <= {*EXAMPLES}  # fmt: skip
