"""The terminal's side of a run: progress while it lasts, and the table at its end."""

from __future__ import annotations

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

WIDTH = 150
_COLOURS = {"aim reached": "green", "at least reached": "green", "faster": "green"}
_COLOURS |= {"missed": "red", "aim missed": "yellow", "tie": "yellow", "slower": "red"}


class Progress:
    """One bar over the rows; its text says which row and round is being timed."""

    def __init__(self, rows: int):
        columns = bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()
        self._bar = bars.Progress(*columns, bars.TimeElapsedColumn(), console=_console())
        self._rows = rows

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._rows)
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()

    def start(self, row: str) -> None:
        self._row = row
        self._bar.update(self._task, description=f"{row}: checking")

    def rounds(self, done: int, of: int) -> None:
        self._bar.update(self._task, description=f"{self._row}: round {done}/{of}")

    def done(self) -> None:
        self._bar.advance(self._task)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH  # a file has no width: rich would fold the table at 80 columns
    return console


def table(found: dict) -> None:
    """Print the outcome of ``benchmarks.run_table``."""
    console = _console()
    what = found["machine"]
    rates = what["measured"]
    console.print(
        f"{what['cpu']}, {what['isa']}, {what['threads']} threads;"
        f" copy {rates['copy_bandwidth'] / 1e9:.1f} GB/s;"
        f" float32 matmul {rates['matmul']['float32'] / 1e9:.0f} GFLOP/s;"
        f" torch {found['versions']['torch']}"
    )
    lines = Table(
        Column("work", no_wrap=True),
        "ours",
        "peer",
        "peer's",
        "ratio",
        "halves",
        "goals",
        "verdict",
    )
    for row in found["rows"]:
        _add_row(lines, row)
    console.print(lines)
    for kind in ("missing", "refused"):
        for name, reason, rows in _absent(found, kind):
            console.print(f"{kind}: {name} ({rows}): {escape(reason)}")
    for row in found["rows"]:
        for note in row.get("notes", ()):
            console.print(f"note: {row['id']}: {escape(note)}")


def _absent(found: dict, kind: str) -> list[tuple[str, str, str]]:
    """(peer, reason, rows) of the peers that were not timed."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for peer in row.get(kind, {}).items():
            rows.setdefault(peer, []).append(row["id"])
    return [(*peer, ", ".join(ids)) for peer, ids in rows.items()]


def _add_row(lines: Table, row: dict) -> None:
    if row["status"] != "measured":
        lines.add_row(row["id"], "[red]wrong[/]", "", "", "", "", "", escape(row["reason"]))
        return
    add = _add_memory if "ours" not in row else _add_timed
    add(lines, row)
    lines.add_section()


def _add_memory(lines: Table, row: dict) -> None:
    for found in row["verdicts"]:
        saved = {name: f"{m['saved'] / 2**20:.0f} MiB" for name, m in row["memory"].items()}
        ours = next(v for name, v in saved.items() if name != found["peer"])
        lines.add_row(
            row["id"], ours, found["peer"], saved[found["peer"]], f"{-found['share_saved']:+.0%}",
            "", f"-{found['at_least']:.0%} / -{found['aim']:.0%}", _coloured(found["verdict"]),
        )  # fmt: skip


def _add_timed(lines: Table, row: dict) -> None:
    title, ours = row["id"], _ms(row["ours"])
    goals = {found["peer"]: found for found in row["verdicts"]}
    for name, peer in row["peers"].items():
        goal = goals.get(name)
        word = goal["verdict"] if goal else _without_goal(peer)
        halves = " ".join(f"{h:.2f}" for h in peer["halves"] or ())
        lines.add_row(
            title, ours, name, _ms(peer), f"{peer['ratio']:.2f}x", halves,
            _goals(goal), _coloured(word),
        )  # fmt: skip
        title = ours = ""
    for kind in ("missing", "refused"):
        for name in row[kind]:
            lines.add_row(title, ours, name, "", "", "", _goals(goals.get(name)), kind)
            title = ours = ""


def _without_goal(peer: dict) -> str:
    if peer["tie"]:
        return "tie"
    return "faster" if peer["ratio"] > 1 else "slower"


def _goals(goal: dict | None) -> str:
    if goal is None:
        return ""
    return " / ".join("-" if g is None else f"{g:.2f}x" for g in (goal["at_least"], goal["aim"]))


def _ms(times: dict) -> str:
    spread = (times["q3"] - times["q1"]) / 2
    return f"{1e3 * times['median']:.2f} ±{1e3 * spread:.2f} ms"


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word)
    return f"[{colour}]{escape(word)}[/]" if colour else escape(word)
