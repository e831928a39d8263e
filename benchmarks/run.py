"""One run: what it measures of a benchmark, the file it fills, and what it finds there before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from . import machine, results
from .cases import report
from .clock import Clock
from .measure import FEWEST_ROUNDS, WrongResult, rounds_within
from .peers import Choice
from .suites import Spec

__all__ = ["Run", "WrongResult", "measure"]
WANTED_ROUNDS = 20
CHECK_SECONDS = 30  # a guess at checking and compiling, for a benchmark that nobody has run here
MOST_ROUNDS = 40
QUIET_CORES = 0.1  # busy with other processes; more than that is told beside the figure
SAME = ("schema", "commit", "settings")  # what an interrupted run must share to be gone on with


class Run:
    """A result file that grows row by row.

    Args:
        resume: keep the rows that the file has.

    Raises:
        ResultError: they are no result, or from another commit or other settings.
    """

    def __init__(self, path: Path, settings: dict, *, resume: bool):
        self.path, self.settings = path, settings
        self.found = {"schema": results.SCHEMA, **machine.describe()}
        self.found |= {"settings": settings, "rows": []}
        if resume and path.exists():
            before = results.load(path)
            for key in SAME:
                if before[key] != self.found[key]:
                    changed = _changed(key, before[key], self.found[key])
                    raise results.ResultError(f"{path}: {', '.join(changed)}")
            self.found["rows"] = [row for row in before["rows"] if row["status"] == "measured"]

    @property
    def done(self) -> set[str]:
        return {row["id"] for row in self.found["rows"]}

    def add(self, row: dict) -> None:
        self.found["rows"].append(row)
        results.save(self.path, self.found)

    def how_to_go_on(self) -> str:
        count = len(self.found["rows"])
        if not count:
            return "nothing has been measured"
        there = "1 result is" if count == 1 else f"{count} results are"
        again = "the same command with --resume goes on (make bench: with ARGS=--resume)"
        return f"{there} in {self.path}; {again}"

    def estimate(self, ids: Iterable[str]) -> float:
        """Seconds that the benchmarks may take: as recorded last on this CPU, else a guess."""
        recorded: dict[str, float] = {}
        for found in results.load_folder().values():
            if found["machine"]["cpu"] == self.found["machine"]["cpu"]:
                recorded |= {row["id"]: row["took_seconds"] for row in found["rows"]}
        guess = 3 * self.settings["seconds"] + CHECK_SECONDS
        return sum(recorded.get(id, guess) for id in ids)


def _changed(key: str, before: object, now: object) -> list[str]:
    """What differs, named; of two dictionaries only the entries that do."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [f"{key}: {before!r} there, {now!r} now"]
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return [f"{key}.{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in keys]


def measure(
    spec: Spec,
    chosen: Choice,
    clocks: Mapping[str, Clock],
    seconds: float,
    benchmark,
    on_round: Callable[[int, int], object] = lambda done, of: None,
) -> dict:
    """A benchmark's outcome in JSON's types.

    Args:
        seconds: of timing each competitor.
        benchmark: pytest-benchmark's fixture; its rounds are our own calls.

    Raises:
        WrongResult: our own result is wrong.
    """
    gc.collect()
    case = spec.make(chosen)
    clock = clocks[case.device.type]
    race = case.race(clock)  # every result has been checked from here on
    inspected = {name: seen for name, seen in case.inspect().items() if name in race.competitors}
    rounds = FEWEST_ROUNDS
    if not spec.slow:
        seconds *= len(race.competitors)
        rounds = rounds_within(seconds, race.warm_up(), MOST_ROUNDS)
        rounds = rounds_within(seconds, race.warm_up(), MOST_ROUNDS) if rounds > 4 else rounds
    done = iter(range(1, rounds + 1))

    def others_turn() -> None:
        on_round(next(done), rounds)
        race.until_ours()

    with machine.OtherLoad() as load:
        benchmark.pedantic(race.our_turn, setup=others_turn, rounds=rounds)
        race.finish_round()
    alone = clock if spec.table and not spec.slow else None
    found = report(case, race, inspected, convolutions=alone)
    if rounds < WANTED_ROUNDS:
        found["notes"].append(f"fewer rounds than the {WANTED_ROUNDS} that a firm figure wants")
    if load.cores is not None and load.cores > QUIET_CORES:
        found["notes"].append("other processes were busy meanwhile: see other_load_cores")
    return {"status": "measured", **found, "other_load_cores": load.cores}
