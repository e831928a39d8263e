"""A run's file: its schema, going on after an interrupt, goals, comparison of two runs."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmark_harness import (
    CPU,
    ID,
    ROOT,
    TRUTH,
    FakeClock,
    X,
    competitor,
    no_measuring,
    own_environment,
    recorded,
    result,
)
from benchmarks import cases, goals, machine, peers, results, run
from benchmarks.peers import EAGER, OURS
from benchmarks.suites import Spec

__all__ = ["no_measuring"]  # a fixture


def _write(path, found):
    path.write_text(json.dumps(found))
    return path


# --- the schema


def test_a_result_is_read_as_it_was_written(tmp_path):
    found = recorded()
    results.save(tmp_path / "new" / "run.json", found)
    assert results.load(tmp_path / "new" / "run.json") == found
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]


def test_every_committed_result_fits_the_schema():
    found = results.load_folder()
    dates = [run_["date"] for run_ in found.values()]
    assert dates == sorted(dates)
    for run_ in found.values():
        assert run_["versions"]["torch"]


def _set(path, value):
    def spoil(found):
        *steps, last = path
        for step in steps:
            found = found[step]
        found[last] = value

    return spoil


def _drop(*path):
    def spoil(found):
        *steps, last = path
        for step in steps:
            found = found[step]
        del found[last]

    return spoil


_OURS = ("rows", 0, "competitors", OURS)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_set(["schema"], 1), "schema: wanted 2, got 1"),
        (_drop("machine"), "machine: is missing"),
        (_drop("machine", "cpu"), "machine.cpu: is missing"),
        (_set(["versions", "torch"], 2.13), "versions.torch: wanted a string, got 2.13"),
        (_set(["gpu"], {}), "gpu.name: is missing"),
        (_set(["rows"], {}), "rows: wanted a list, got {}"),
        (_set(["rows", 0], "x"), 'rows[0]: wanted an object, got "x"'),
        (_set(["rows", 0, "status"], "fine"), "rows[0].status: wanted measured or wrong"),
        (_set(["rows", 0, "competitors"], {}), "rows[0].competitors: wanted ours at least"),
        (_set([*_OURS, "median"], "fast"), ".median: wanted a number above 0, got \"fast\""),
        (_set([*_OURS, "median"], 0), ".median: wanted a number above 0, got 0"),
        (_set([*_OURS, "median"], float("nan")), ".median: wanted a number above 0, got NaN"),
        (_set([*_OURS, "rounds"], True), ".rounds: wanted a whole number, got true"),
        (_drop(*_OURS, "launches"), f"rows[0].competitors['{OURS}'].launches: is missing"),
        (_drop("rows", 0, "competitors", EAGER, "tie"), f"['{EAGER}'].tie: is missing"),
        (_set(["rows", 0, "notes"], ["a", 3]), "rows[0].notes[1]: wanted a string, got 3"),
        (lambda f: f["rows"].append(f["rows"][0]), f"rows[1].id: '{ID}' is there twice"),
    ],
)  # fmt: skip
def test_a_corrupt_result_is_refused_by_file_and_field(tmp_path, spoil, message):
    found = copy.deepcopy(recorded())
    spoil(found)
    path = _write(tmp_path / "run.json", found)
    with pytest.raises(results.ResultError) as error:
        results.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "data, message",
    [(b"{", "is not JSON"), (b"\xff\xfe", "cannot be read"), (b"[]", "wanted an object, got []")],
)
def test_a_file_that_is_no_result(tmp_path, data, message):
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(results.ResultError, match="run.json: ") as error:
        results.load(path)
    assert message in str(error.value)
    with pytest.raises(results.ResultError, match="cannot be read"):
        results.load(tmp_path / "absent.json")


# --- a run


class _Rounds:
    """pytest-benchmark's fixture, as far as it is used."""

    def pedantic(self, call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()


def _spec(id=ID, y=None, log=None, slow=False):
    """Ours takes 2 seconds and eager 3.2, where a call's result is taken for its time."""
    log = [] if log is None else log

    def make(chosen):
        found = [
            competitor(OURS, log, y, call=lambda: log.append(OURS) or 2.0),
            competitor(EAGER, log, call=lambda: log.append(EAGER) or 3.2),
        ]
        facts = {"network": "x", "mode": "y", "batch": 1, "dtype": "fp32"}
        missing = {peers.COMPILE: "no compiler"}
        return cases.Case("a square", CPU, torch.float32, found, missing, TRUTH, facts)

    return Spec(id, make, slow=slow)


class _CallsAreTimes(FakeClock):
    def _time(self, call):
        return None, call()


def _measure(spec):
    return run.measure(spec, peers.ALL, {"cpu": _CallsAreTimes()}, 0.5, _Rounds())


def test_a_benchmark_is_measured_and_judged(no_measuring):
    log = []
    body = _measure(_spec(log=log))
    measured = {"id": ID, "suite": "models", **body, "took_seconds": 1.0}
    results.check(result(measured))
    assert measured["competitors"][EAGER]["ratio"] == pytest.approx(1.6)
    assert log.count(OURS) == log.count(EAGER) > measured["competitors"][OURS]["rounds"]
    judged = {(o.goal.peer, o.goal.memory): o.verdict for o in goals.outcomes(measured)}
    assert judged[EAGER, False] == "aim reached"
    assert judged[peers.COMPILE, False] == "not measured: no compiler"
    assert judged[EAGER, True] == "not measured"


def test_a_slow_benchmark_has_two_rounds_and_says_so(no_measuring):
    log = []
    body = _measure(_spec(log=log, slow=True))
    assert log.count(OURS) == body["competitors"][OURS]["rounds"] == 2
    assert "fewer rounds than the 20 that a firm figure wants" in body["notes"]


def test_a_wrong_result_is_never_timed(no_measuring):
    log = []
    with pytest.raises(run.WrongResult, match="fusedres is not timed: y: largest error"):
        _measure(_spec(y=X, log=log))
    assert log == []


SETTINGS = {"seconds": 1.0, "suite": "table", "peers": "*"}


def test_a_run_goes_on_where_it_was(no_measuring, tmp_path):
    path = tmp_path / "run.json"
    first = run.Run(path, SETTINGS, resume=True)
    assert first.done == set()
    (measured,) = recorded()["rows"]
    first.add(measured)
    first.add({
        "id": "b", "suite": "models", "status": "wrong", "reason": "y", "took_seconds": 1.0,
    })  # fmt: skip
    again = run.Run(path, SETTINGS, resume=True)
    assert again.found["rows"] == [measured]  # the wrong one is measured again
    assert run.Run(path, SETTINGS, resume=False).done == set()
    assert first.how_to_go_on().startswith(f"2 results are in {path}; ")
    changed = "run.json: settings.seconds: 1.0 there, 2.0 now, settings.new: None there, 'x' now$"
    with pytest.raises(results.ResultError, match=changed):
        run.Run(path, SETTINGS | {"seconds": 2.0, "new": "x"}, resume=True)
    path.write_text("{")
    with pytest.raises(results.ResultError, match="run.json: is not JSON"):
        run.Run(path, SETTINGS, resume=True)


def test_the_estimate_takes_what_was_recorded_on_this_cpu(no_measuring, monkeypatch, tmp_path):
    here = machine.identity()["cpu"]
    before = recorded()
    before["machine"]["cpu"] = here
    before["rows"][0]["took_seconds"] = 100.0
    monkeypatch.setattr(results, "load_folder", lambda: {"a.json": before, "b": recorded()})
    found = run.Run(tmp_path / "run.json", SETTINGS, resume=False)
    assert found.estimate([ID]) == 100
    assert found.estimate([ID, "unknown"]) == 100 + 3 * SETTINGS["seconds"] + run.CHECK_SECONDS


def _bench(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", "--benchmark-quiet", "--seconds", "0.1", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=own_environment() | environment,
    )  # fmt: skip


def test_an_interrupted_run_resumes(tmp_path):
    path = tmp_path / "run.json"
    names = [
        f"{op}+residual-both-8x{n}x56x56-fp32" for op, n in (("bn_act", 64), ("bn_se_act", 256))
    ]
    arguments = ["-k", " or ".join(names), "--peers", EAGER, "--results", str(path)]
    process = _bench(*arguments)
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert path.exists(), printed
    assert process.returncode == 130, printed
    assert f"interrupted: 1 result is in {path}; the same command with --resume" in printed
    assert "Traceback" not in printed and "KeyboardInterrupt" not in printed
    first = results.load(path)["rows"]
    assert [r["id"] for r in first] == names[:1]
    again = _bench(*arguments, "--resume")
    printed = again.communicate(timeout=240)[0]
    assert again.returncode == 0, printed
    found = results.load(path)["rows"]
    assert found[0] == first[0]
    assert [r["id"] for r in found[1:]] == names[1:]
    assert "1 benchmarks, 1 measured before; about 0:00:" in printed
    assert f"[1/1] {names[1]} took" in printed
    assert "fusedres and its peers, in turns" in printed


def test_a_run_refuses_settings_that_mean_nothing():
    process = _bench("--seconds", "0", PYTHONWARNINGS="ignore")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--seconds" in printed
