"""The terminal's side of a run: progress while it lasts, and the table at its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .goals import outcomes
from .peers import OURS, UNSELECTED

WIDTH = 150
_COLOURS = {"aim reached": "green", "at least reached": "green", "faster": "green"}
_COLOURS |= {"missed": "red", "aim missed": "yellow", "tie": "yellow", "slower": "red"}


class Progress:
    """One bar over the benchmarks; its text says which one and which round is being timed.

    On a terminal it is a live bar, else a line a benchmark.

    Args:
        estimate: seconds that all of it may take.
        capture: pytest's capture manager, which has the terminal while a test runs.
    """

    def __init__(self, total: int, estimate: float, capture=None):
        self._total, self._estimate = total, estimate
        stream = sys.stdout
        if capture is not None:
            with capture.global_and_fixture_disabled():
                stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        self._console = console_for(stream)
        columns = bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()
        self._bar = bars.Progress(*columns, bars.TimeElapsedColumn(), console=self._console)
        self._done = 0

    def begin(self, skipped: int) -> None:
        about = timedelta(seconds=round(self._estimate))
        before = f", {skipped} measured before" if skipped else ""
        self._console.print(f"{self._total} benchmarks{before}; about {about} in all")
        self._task = self._bar.add_task("", total=self._total)
        if self._console.is_terminal:
            self._bar.start()

    def start(self, name: str) -> None:
        self._name, self._started = name, time.perf_counter()
        self._bar.update(self._task, description=f"{name}: checking results")

    def rounds(self, done: int, of: int) -> None:
        self._bar.update(self._task, description=f"{self._name}: round {done}/{of}")

    def done(self) -> None:
        self._done += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            seconds = time.perf_counter() - self._started
            line = f"[{self._done}/{self._total}] {self._name} took {seconds:.0f} s"
            self._console.print(line, markup=False)

    def end(self) -> None:
        self._bar.stop()


def console_for(stream) -> Console:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH  # a file has no width: rich would fold the table at 80 columns
    return console


def table(found: dict, stream=None) -> None:
    """Print a result."""
    console = console_for(stream)
    console.print(headline(found))
    names = "median, ms", "of floor", "GB/s", "calls", "kept", "ratio", "halves", "goals"
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    lines = Table(Column("work", overflow="fold"), *columns, "verdict")
    for row in found["rows"]:
        for line in _lines(row):
            lines.add_row(*line)
        lines.add_section()
    console.print(lines)
    for kind in ("missing", "refused"):
        for name, reason, rows in absent(found, kind):
            console.print(f"{kind}: {name} ({rows}): {escape(reason)}")
    notes: dict[str, int] = {}
    for note in (note for row in found["rows"] for note in row.get("notes", ())):
        notes[note] = notes.get(note, 0) + 1
    for note, count in notes.items():
        console.print(f"note ({count} rows): {escape(note)}")


def headline(found: dict) -> str:
    """The machine, its rates and the versions, in one line."""
    what = found["machine"]
    parts = [f"{what['cpu']}, {what['isa']}, {what['threads']} threads"]
    if found["gpu"] is not None:
        parts.append(f"{found['gpu']['name']}, driver {found['gpu']['driver']}")
    for device, rates in what["measured"].items():
        matmul = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rates["matmul"].items())
        parts.append(f"{device}: copy {rates['copy_bandwidth'] / 1e9:.1f} GB/s, matmul {matmul}")
    return "; ".join([*parts, f"torch {found['versions']['torch']}"])


def absent(found: dict, kind: str) -> list[tuple[str, str, str]]:
    """(peer, reason, rows) of the peers that were not timed though they were asked for."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for name, reason in row.get(kind, {}).items():
            if reason != UNSELECTED:
                rows.setdefault((name, reason), []).append(row["id"])
    listed = []
    for (name, reason), ids in rows.items():
        more = f" and {len(ids) - 2} more" if len(ids) > 2 else ""
        listed.append((name, reason, ", ".join(ids[:2]) + more))
    return listed


def _lines(row: dict) -> Iterator[tuple[str, ...]]:
    """A row's lines: the work, then each competitor."""
    if row["status"] != "measured":
        yield row["id"], "[red]wrong[/]", *[""] * 7, escape(row["reason"])
        return
    yield f"[bold]{row['id']}[/]", *[""] * 9
    judged = {(o.goal.peer, o.goal.memory): o for o in outcomes(row)}
    for name, figures in row["competitors"].items():
        times = (
            f"  {name}", milliseconds(figures), _number(figures["percent_of_floor"], "{:.0f}%"),
            _number(figures["gigabytes_per_second"], "{:.1f}"),
            _number(figures["launches"], "{}"), mebibytes(figures["saved"]),
        )  # fmt: skip
        if name == OURS:
            yield *times, "", "", "", ""
            continue
        halves = " ".join(f"{h:.2f}" for h in figures["halves"] or ())
        goal = judged.get((name, False))
        word = goal.verdict if goal else _without_goal(figures)
        limits = "" if goal is None else _limits(goal.goal, "{:.2f}x")
        yield *times, f"{figures['ratio']:.2f}x", halves, limits, _coloured(word)
        memory = judged.get((name, True))
        if memory is not None and memory.value is not None:
            limits = _limits(memory.goal, "-{:.0%}")
            share = f"{-memory.value:+.0%}"
            yield "    memory kept", *[""] * 5, share, "", limits, _coloured(memory.verdict)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def milliseconds(times: dict) -> str:
    spread = (times["q3"] - times["q1"]) / 2
    return f"{1e3 * times['median']:.2f} ±{1e3 * spread:.2f}"


def _without_goal(peer: dict) -> str:
    if peer["tie"]:
        return "tie"
    return "faster" if peer["ratio"] > 1 else "slower"


def _limits(goal, form: str) -> str:
    return " / ".join("-" if g is None else form.format(g) for g in (goal.at_least, goal.aim))


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word)
    return f"[{colour}]{escape(word)}[/]" if colour else escape(word)
