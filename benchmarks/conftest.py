"""Runs the benchmarks of a selection: each case timed with its peers in turns, written at once.

pytest benchmarks --benchmark-only                    the smoke selection
pytest benchmarks --benchmark-only --suite table      the work that goals are set for
FULL=1 pytest benchmarks --benchmark-only             everything
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import machine, options, results, run, show
from .clock import Clock
from .inspection import NOTE as MEMORY_NOTE
from .peers import Choice
from .suites import Spec

DEFAULT_SECONDS = {"smoke": 0.7, "table": 10.0, "full": 10.0}
# Compiling takes longer than everything else in a smoke run together.
DEFAULT_PEERS = {"smoke": "eager*,OpenVINO,onnxruntime,TensorRT,cuDNN*,apex"}
RUN = pytest.StashKey[run.Run]()
PROGRESS = pytest.StashKey[show.Progress]()
INTERRUPTED = pytest.StashKey[bool]()
SIGNALLED = 130  # the shell's exit status of a program that Ctrl-C ended


def pytest_addoption(parser: pytest.Parser) -> None:
    options.declare(parser.getgroup("fusedres benchmarks").addoption)


def pytest_configure(config: pytest.Config) -> None:
    # OpenVINO, onnx and inductor still use it.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")
    # Where a run is interrupted.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    # Live progress stands in for pytest's own: one line a benchmark, rewritten.
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.showfspath = False


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = config.option
    wanted = [item for item in items if _selected(item, given.suite)]
    if given.collectonly:
        items[:] = wanted
        return
    torch.set_num_threads(given.threads)
    settings = {
        "suite": given.suite,
        "seconds": given.seconds or DEFAULT_SECONDS[given.suite],
        "peers": given.peers or DEFAULT_PEERS.get(given.suite, "*"),
        "units": "seconds and bytes; a ratio is the peer's time over ours, of the medians",
        "halves": "the same ratio of the first and of the second half of the rounds",
        "tie": "the halves differ by more than the ratio differs from 1",
        "memory": MEMORY_NOTE,
    }
    try:
        config.stash[RUN] = the_run = run.Run(given.results, settings, resume=given.resume)
    except results.ResultError as error:
        raise pytest.UsageError(f"--resume: {error}") from None
    left = [item for item in wanted if _spec(item) is None or _spec(item).id not in the_run.done]
    left.sort(key=lambda item: _spec(item) is None or _spec(item).slow)  # cheap ones first
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left
    terminal = config.pluginmanager.get_plugin("capturemanager")
    estimate = the_run.estimate([spec.id for spec in map(_spec, left) if spec is not None])
    config.stash[PROGRESS] = progress = show.Progress(len(left), estimate, terminal)
    progress.begin(skipped=len(wanted) - len(left))


def _spec(item: pytest.Item) -> Spec | None:
    """None for a benchmark that brings a harness of its own; it writes no result."""
    return item.callspec.params.get("spec") if hasattr(item, "callspec") else None


def _selected(item: pytest.Item, suite: str) -> bool:
    spec = _spec(item)
    return suite == "full" if spec is None else spec.selected(suite)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return ("passed", "", "") if report.when == "call" and report.passed else None


@pytest.fixture(scope="session")
def clocks() -> dict[str, Clock]:
    return {device.type: Clock(device) for device in machine.devices()}


@pytest.fixture
def race(benchmark, clocks, request):
    """Times a benchmark: our own calls are pytest-benchmark's rounds, the peers' lie between them.

    pytest-benchmark's columns also hold the freeing of the result; ours, in ``extra_info``, do not.
    """
    config = request.config
    the_run, progress = config.stash[RUN], config.stash[PROGRESS]

    def measure(spec: Spec) -> None:
        progress.start(spec.id)
        chosen = Choice(the_run.settings["peers"].split(","))
        started = time.perf_counter()
        suite = Path(str(request.node.path)).stem.removeprefix("bench_")
        head = {"id": spec.id, "suite": suite}
        try:
            body = run.measure(
                spec, chosen, clocks, the_run.settings["seconds"], benchmark, progress.rounds
            )
        except run.WrongResult as error:
            body = {"status": "wrong", "reason": str(error)}
        took = round(time.perf_counter() - started, 1)
        the_run.add(head | body | {"took_seconds": took})
        progress.done()
        if body["status"] == "wrong":
            pytest.fail(body["reason"], pytrace=False)
        benchmark.extra_info.update({k: v for k, v in body.items() if k != "notes"})

    yield measure
    torch.compiler.reset()


# Ctrl-C ends a run as its end does: what was measured is written, and one line says so.
@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    try:
        return (yield)
    except KeyboardInterrupt:
        session.config.stash[INTERRUPTED] = True
        session.items = []


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    try:
        return (yield)
    except KeyboardInterrupt:
        session.config.stash[INTERRUPTED] = True
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    the_run = config.stash.get(RUN, None)
    if PROGRESS in config.stash:
        config.stash[PROGRESS].end()
    if INTERRUPTED in config.stash:
        there = "nothing has been measured" if the_run is None else the_run.how_to_go_on()
        terminalreporter.line(f"interrupted: {there}")
    elif the_run is not None and the_run.found["rows"]:
        terminalreporter.section("fusedres and its peers, in turns")
        show.table(the_run.found, terminalreporter._tw._file)
        terminalreporter.line(f"written to {the_run.path}")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Everything measured before: nothing is left to run, and that is no failure."""
    if INTERRUPTED in session.config.stash:
        session.exitstatus = SIGNALLED
    nothing_left = RUN in session.config.stash and session.config.stash[RUN].done
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and nothing_left:
        session.exitstatus = pytest.ExitCode.OK
    yield
