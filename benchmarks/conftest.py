"""What every benchmark runs under, and the fixture that times a case and its peers in turns."""

from __future__ import annotations

import os

import pytest
import torch

from . import machine
from .cases import Case, report
from .measure import rounds_within
from .selection import full

FEWEST_ROUNDS, MOST_ROUNDS = 4, 60
OUTCOMES = pytest.StashKey[list[dict]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(scope="session")
def flush():
    return machine.CacheFlush()


@pytest.fixture
def race(benchmark, flush, request):
    """Times a case: our own calls are pytest-benchmark's rounds, the peers' turns lie between them.

    pytest-benchmark's columns also hold the freeing of the result; ours, in ``extra_info``, do not.
    The ratios, GB/s, share of the copy bandwidth and memory go to ``extra_info``. The rounds fill
    two seconds a case, thirty with FULL=1.
    """

    def run(case: Case) -> None:
        race = case.race(flush)
        seconds = 30 if full() else 2
        rounds = rounds_within(seconds, race.warm_up(2), FEWEST_ROUNDS, MOST_ROUNDS)
        benchmark.pedantic(race.our_turn, setup=race.until_ours, rounds=rounds)
        race.finish_round()
        found = report(case, race, floor=full(), memory=True)
        found["copy_bandwidth"] = machine.rates().copy_bandwidth
        benchmark.extra_info.update(found)
        request.config.stash[OUTCOMES].append(found)
        torch.compiler.reset()

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    if not outcomes:
        return
    terminalreporter.section("fusedres and its peers, in turns (their time over ours; ~ is a tie)")
    for found in outcomes:
        parts = [
            f"{name} {peer['ratio']:.2f}x{' ~' if peer['tie'] else ''}"
            for name, peer in found["peers"].items()
        ]
        parts += [f"{name} refused: {reason}" for name, reason in found["refused"].items()]
        if "percent_of_copy" in found:
            parts.append(f"{found['percent_of_copy']:.0f}% of copy bandwidth")
        ours = 1e3 * found["ours"]["median"]
        terminalreporter.line(f"{found['title']}: {ours:.2f} ms; {'; '.join(parts)}")
    missing = {(name, why) for found in outcomes for name, why in found["missing"].items()}
    for name, reason in sorted(missing):
        terminalreporter.line(f"missing: {name}: {reason}")
