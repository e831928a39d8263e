"""The published tables: times of every competitor, goals, memory, and who was not timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import charts, show
from .goals import outcomes
from .peers import OURS

Rows = Iterable[Sequence[str]]


def page(found: dict, images: Iterable[str], folder: str) -> str:
    """A Markdown page; ``images`` are names of PNG files in ``folder`` beside it."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.report --publish benchmarks/results`; do not edit.",
        f"{show.headline(found)}.",
        f"Commit {found['commit'] or 'unknown'}{', modified' if found['modified'] else ''};"
        f" {found['date']}; selection {found['settings'].get('suite', '?')}.",
        *(f"![{name.replace('_', ' ')}]({folder}/{name}.png)" for name in images),
        "## Times\n\nMedian of a call in ms; in brackets the ratio to fusedres, `~` marks a tie.",
        table(*times(found)),
        "## Goals",
        table(GOALS, goals(found)),
        "## Memory kept for the backward, MiB",
        table(*memory(found)),
        "## Not timed",
        table(("peer", "reason", "work"), absent(found)),
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def times(found: dict) -> tuple[Sequence[str], Rows]:
    rows = charts.measured(found)
    names = list(dict.fromkeys(name for row in rows for name in row["competitors"]))
    columns = ("work", *names, "convolutions alone", "other load, cores")
    return columns, [_times(row, names) for row in rows]


def _times(row: dict, names: Sequence[str]) -> list[str]:
    cells = [row["id"]]
    for name in names:
        figures = row["competitors"].get(name)
        if figures is None:
            cells.append("")
            continue
        text = f"{1e3 * figures['median']:.4g}"
        if name != OURS:
            text += f" ({figures['ratio']:.2f}x{' ~' if figures['tie'] else ''})"
        cells.append(text)
    alone, load = row["convolutions_alone"], row["other_load_cores"]
    cells.append("" if alone is None else f"{1e3 * alone:.4g}")
    return [*cells, "" if load is None else f"{load:.1f}"]


GOALS = ("work", "peer", "at least", "aim", "measured", "verdict")


def goals(found: dict) -> Rows:
    for row in found["rows"]:
        for outcome in outcomes(row):
            goal = outcome.goal
            form = "-{:.0%}" if goal.memory else "{:.2f}x"
            values = (goal.at_least, goal.aim, outcome.value)
            cells = ("" if v is None else form.format(v) for v in values)
            what = f"{row['id']}, memory kept" if goal.memory else row["id"]
            yield what, goal.peer, *cells, outcome.verdict


def memory(found: dict) -> tuple[Sequence[str], Rows]:
    kept = [
        (row["id"], {n: f["saved"] for n, f in row["competitors"].items() if f["saved"]})
        for row in charts.networks(found)
    ]
    names = list(dict.fromkeys(name for _, saved in kept for name in saved))

    def cell(saved: dict[str, int], name: str) -> str:
        if name not in saved:
            return ""
        size = f"{saved[name] / charts.MIB:.0f}"
        return size if name == OURS else f"{size} ({saved[OURS] / saved[name] - 1:+.0%})"

    rows = ([id, *(cell(saved, name) for name in names)] for id, saved in kept if OURS in saved)
    return ("work", *names), list(rows)


def absent(found: dict) -> Rows:
    for kind in ("missing", "refused"):
        for name, reason, rows in show.absent(found, kind):
            yield name, f"{kind}: {reason}", rows
