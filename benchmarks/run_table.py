"""``python -m benchmarks.run_table``: measures the table of goals and writes it as JSON.

    python -m benchmarks.run_table --out benchmarks/results/NAME.json
    python -m benchmarks.run_table --list
    python -m benchmarks.run_table --rows '*-fp32' 'resnet50-memory-*'
    python -m benchmarks.run_table --quick        tries out the harness on tiny shapes, in minutes

Each row is written as soon as it is measured; --resume goes on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch

from . import machine, show
from .cases import report
from .measure import Race, Ratio, WrongResult, rounds_within, verdict
from .memory import SCHEMA_NOTE as MEMORY_NOTE
from .peers import OURS
from .table import ROWS, Goal, Row, Scale

SCHEMA = 1
FEWEST_ROUNDS = 4  # two for each half
WANTED_ROUNDS = 20
MOST_ROUNDS = 60
QUIET_CORES = 0.1  # of load by other processes; more than that is told beside the figure


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    rows = [r for r in ROWS if any(fnmatch(r.id, pattern) for pattern in args.rows)]
    if args.list:
        print("\n".join(row.id for row in rows))
        return 0
    if not rows:
        print(f"--rows: nothing matches {' '.join(args.rows)}; --list shows them", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    budget = args.seconds or (5.0 if args.quick else 90.0)
    found = _head(args, budget)
    if args.resume:
        found["rows"] = _measured_before(args.out, found)
    done = {row["id"] for row in found["rows"]}
    rows = [row for row in rows if row.id not in done]
    with show.Progress(len(rows)) as progress:
        for row in rows:
            progress.start(row.id)
            found["rows"].append(measure_row(row, Scale(args.quick), budget, progress.rounds))
            progress.done()
            _write(args.out, found)
    show.table(found)
    print(f"written to {args.out}")
    return 1 if any(row["status"] == "wrong" for row in found["rows"]) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_table", description="Measure the table of goals."
    )
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names (all)")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries out the harness")
    parser.add_argument(
        "--seconds", type=float, help="of timing a row, without compiling (90; 5 with --quick)"
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --out has of this very commit"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/table.json"))
    return parser.parse_args(argv)


def _head(args: argparse.Namespace, budget: float) -> dict:
    settings = {
        "quick": args.quick,  # tiny shapes: nothing is judged by them
        "seconds_a_row": budget,
        "fewest_rounds": FEWEST_ROUNDS,
        "most_rounds": MOST_ROUNDS,
        "units": "seconds and bytes; a ratio is the peer's time over ours, of the medians",
        "halves": "the same ratio of the first and of the second half of the rounds",
        "tie": "the halves differ by more than the ratio differs from 1",
        "memory": MEMORY_NOTE,
    }
    return {"schema": SCHEMA, **machine.describe(), "settings": settings, "rows": []}


def _measured_before(path: Path, head: dict) -> list[dict]:
    """The rows of an interrupted run; they must come from the same code and settings."""
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"--resume: {path} is not JSON: {error}") from None
    for key in ("schema", "commit", "settings"):
        if before.get(key) != head[key]:
            raise SystemExit(
                f"--resume: {path} has another {key}: {before.get(key)}, now {head[key]}"
            )
    return before["rows"]


def measure_row(row: Row, scale: Scale, budget: float, on_round=lambda done, of: None) -> dict:
    """One row's outcome as JSON types; ``status`` is "measured" or "wrong"."""
    head = {"id": row.id, "goals_from": row.source}
    started = time.perf_counter()
    try:
        if row.memory:
            body = _memory_row(row, scale)
        else:
            body = _timed_row(row, scale, budget, on_round)
    except WrongResult as error:
        body = {"status": "wrong", "reason": str(error)}
    torch.compiler.reset()
    gc.collect()
    seconds = round(time.perf_counter() - started, 1)
    return head | body | {"took_seconds": seconds}


def _timed_row(row: Row, scale: Scale, budget: float, on_round) -> dict:
    case = row.case(scale)
    race = case.race(machine.CacheFlush())
    per_round = race.warm_up(1)
    if per_round < budget / WANTED_ROUNDS:
        per_round = race.warm_up(2)
    rounds = rounds_within(budget, per_round, FEWEST_ROUNDS, MOST_ROUNDS)
    done = iter(range(1, rounds + 1))
    with machine.OtherLoad() as load:
        race.run(rounds, lambda: on_round(next(done), rounds))
    found = report(case, race, floor=True, memory=case.streaming)
    if rounds < WANTED_ROUNDS:
        found["notes"] += [f"{rounds} rounds only; a firm figure wants {WANTED_ROUNDS}"]
    if load.cores is not None and load.cores > QUIET_CORES:
        found["notes"] += [f"other processes kept {load.cores} cores busy meanwhile"]
    found["other_load_cores"] = load.cores
    found["verdicts"] = [_judge(goal, race, found, scale) for goal in row.goals]
    return {"status": "measured"} | found


def _judge(goal: Goal, race: Race, found: dict, scale: Scale) -> dict:
    entry = asdict(goal)
    if goal.peer not in found["peers"]:
        reason = (found["missing"] | found["refused"]).get(goal.peer, "not run")
        return entry | {"ratio": None, "verdict": f"not measured: {reason}"}
    ratio = race.ratio(goal.peer)
    word = "not judged" if scale.quick else verdict(ratio, goal.at_least, goal.aim)
    return entry | {"ratio": ratio.value, "verdict": word}


def _memory_row(row: Row, scale: Scale) -> dict:
    memory = row.memory(scale)
    verdicts = []
    for goal in row.goals:
        saved = 1 - memory[OURS].saved / memory[goal.peer].saved
        # The two counts are exact: as a ratio with equal halves they go by the same words.
        word = verdict(Ratio(1 + saved, (1 + saved,) * 2), 1 + goal.at_least, 1 + goal.aim)
        word = "not judged" if scale.quick else word
        verdicts.append(asdict(goal) | {"share_saved": saved, "verdict": word})
    found = {name: asdict(m) for name, m in memory.items()}
    title = row.id.replace("-", " ") + " saved for backward"
    return {"status": "measured", "title": title, "memory": found, "verdicts": verdicts}


def _write(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
