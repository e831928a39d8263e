"""``python -m benchmarks.compare A.json B.json``: what got slower from A to B, beyond noise.

Two runs meet different states of a machine, so fusedres is not compared with itself but in its
ratio to the first peer that both runs timed (eager, where there is one): who is slower against a
peer that stayed the same has become slower. The change counts where it exceeds the noise: the
larger difference between the two halves of either run. Rows without such a peer are compared in
their times, and the change counts where the quartiles do not overlap. What is kept for the backward
is an exact count: any growth counts.

Exits with 1 when something got slower or keeps more, with 2 when a file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from . import results
from .peers import OURS
from .show import console_for

WORSE, BETTER, SAME = "slower", "faster", "same"
MORE, LESS = "keeps more", "keeps less"


@dataclass(frozen=True)
class Change:
    """One figure of one row in both runs; ``of`` says which."""

    row: str
    of: str
    before: float
    after: float
    noise: float
    verdict: str


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Every figure that both runs have."""
    rows = {row["id"]: row for row in before["rows"] if row["status"] == "measured"}
    for row in after["rows"]:
        if row["status"] == "measured" and row["id"] in rows:
            yield from _changes_of_row(rows[row["id"]], row)


def _changes_of_row(a: dict, b: dict) -> Iterator[Change]:
    ours_a, ours_b = a["competitors"][OURS], b["competitors"][OURS]
    shared = [
        name for name, peer in a["competitors"].items()
        if name != OURS and peer["halves"] and b["competitors"].get(name, {}).get("halves")
    ]  # fmt: skip
    if shared:
        peer = shared[0]
        was, now = a["competitors"][peer], b["competitors"][peer]
        noise = max(abs(first - second) for first, second in (was["halves"], now["halves"]))
        change = now["ratio"] - was["ratio"]
        word = SAME if abs(change) <= noise else (BETTER if change > 0 else WORSE)
        yield Change(a["id"], f"ratio to {peer}", was["ratio"], now["ratio"], noise, word)
    else:
        spread = max(f["q3"] - f["q1"] for f in (ours_a, ours_b))
        word = SAME
        if ours_b["q1"] > ours_a["q3"]:
            word = WORSE
        elif ours_b["q3"] < ours_a["q1"]:
            word = BETTER
        yield Change(a["id"], "seconds", ours_a["median"], ours_b["median"], spread, word)
    if ours_a["saved"] is not None and ours_b["saved"] is not None:
        was, now = ours_a["saved"], ours_b["saved"]
        word = SAME if was == now else (MORE if now > was else LESS)
        yield Change(a["id"], "bytes kept", was, now, 0, word)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="What got slower from A to B."
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    args = parser.parse_args(argv)
    try:
        before, after = results.load(args.before), results.load(args.after)
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return 2
    found = list(changes(before, after))
    if not found:
        print("the two results have no row in common", file=sys.stderr)
        return 2
    _print(found)
    gone = _measured(before) - _measured(after)
    wrong = [row["id"] for row in after["rows"] if row["status"] == "wrong"]
    for what, ids in (("no longer measured", gone), ("wrong now", wrong)):
        if ids:
            print(f"{what}: {', '.join(sorted(ids))}")
    return 1 if wrong or any(c.verdict in (WORSE, MORE) for c in found) else 0


def _measured(found: dict) -> set[str]:
    return {row["id"] for row in found["rows"] if row["status"] == "measured"}


def _print(found: list[Change]) -> None:
    console = console_for(sys.stdout)
    table = Table("work", "figure", "A", "B", "noise", "verdict")
    colours = {WORSE: "red", MORE: "red", BETTER: "green", LESS: "green"}
    for c in found:
        colour = colours.get(c.verdict)
        word = f"[{colour}]{c.verdict}[/]" if colour else c.verdict
        table.add_row(c.row, c.of, *(f"{v:.4g}" for v in (c.before, c.after, c.noise)), word)
    console.print(table)
    worse = sum(c.verdict in (WORSE, MORE) for c in found)
    console.print(f"{worse} of {len(found)} figures are worse beyond noise")


if __name__ == "__main__":
    raise SystemExit(main())
