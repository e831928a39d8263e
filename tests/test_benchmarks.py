"""The benchmarks' machinery: statistics, turns, memory counts, the check before the time."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmark_harness import TRUTH, X, competitor, no_measuring
from benchmarks import measure, memory, op_cases

__all__ = ["no_measuring"]  # a fixture


# --- statistics


def test_median_and_quartiles():
    times = measure.summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert times == measure.Times(rounds=5, median=3.0, q1=2.0, q3=4.0, least=1.0)
    assert measure.summarise([2.0]) == measure.Times(1, 2.0, 2.0, 2.0, 2.0)


def test_ratio_is_of_medians_and_halves_follow_the_rounds():
    found = measure.ratio(peer=[4.0, 4.0, 3.0, 3.0], ours=[2.0, 2.0, 2.0, 2.0])
    assert found == measure.Ratio(1.75, (2.0, 1.5))
    assert measure.ratio([3.0], [2.0]) == measure.Ratio(1.5, None)
    with pytest.raises(ValueError, match="wanted 2 rounds"):
        measure.ratio([1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    "value, halves, tie",
    [
        (1.5, (1.6, 1.4), False),
        (1.1, (1.3, 0.9), True),  # the halves differ by more than the gain
        (0.9, (0.7, 1.1), True),  # or than the loss
        (0.9, (0.92, 0.88), False),
        (1.5, None, True),  # one round proves nothing
    ],
)
def test_tie(value, halves, tie):
    assert measure.Ratio(value, halves).tie is tie


@pytest.mark.parametrize(
    "value, at_least, aim, word",
    [
        (1.6, 1.3, 1.5, "aim reached"),
        (1.4, 1.3, 1.5, "at least reached"),
        (1.2, 1.3, 1.5, "missed"),
        (1.2, None, 1.0, "aim reached"),
        (0.8, None, 1.0, "aim missed"),
        (1.2, None, None, "faster"),
        (0.8, None, None, "slower"),
    ],
)
def test_verdict(value, at_least, aim, word):
    assert measure.verdict(measure.Ratio(value, (value, value)), at_least, aim) == word
    assert measure.verdict(measure.Ratio(value, (9.0, 0.1)), at_least, aim) == "tie"


def test_rounds_follow_the_budget_within_bounds():
    assert measure.rounds_within(10, 1.0, least=4, most=60) == 10
    assert measure.rounds_within(10, 40.0, least=4, most=60) == 4
    assert measure.rounds_within(10, 1e-3, least=4, most=60) == 60


# --- turns


def test_turns_are_fair():
    names = ["a", "b", "c"]
    turns = list(itertools.islice(measure._turns(names), 18))
    assert all(sorted(turns[i : i + 3]) == names for i in range(0, 18, 3))
    followers = {name: set() for name in names}
    for first, second in itertools.pairwise(turns):
        followers[first].add(second)
    assert all(len(seen - {name}) == 2 for name, seen in followers.items())
    pair = list(itertools.islice(measure._turns(["a", "b"]), 8))
    assert "".join(pair) == "abbabaab"


def test_race_prepares_flushes_then_times_each_in_turn(no_measuring):
    log = []
    competitors = [competitor(name, log) for name in ("ours", "peer")]
    race = measure.Race(competitors, TRUTH, lambda: log.append("flush"))
    race.run(2)
    assert log == [
        step for name in ("ours", "peer", "peer", "ours")
        for step in (f"prepare {name}", "flush", name)
    ]  # fmt: skip
    assert {len(s) for s in race.seconds.values()} == {2}


def test_rounds_driven_from_outside_give_everybody_as_many(no_measuring):
    log = []
    competitors = [competitor(name, log) for name in ("ours", "a", "b")]
    race = measure.Race(competitors, TRUTH, lambda: log.append("flush"))
    for _ in range(5):
        race.until_ours()
        assert log[-2:] == ["prepare ours", "flush"]
        race.our_turn()
        assert log[-1] == "ours"
    race.finish_round()
    assert {len(s) for s in race.seconds.values()} == {5}
    assert log.count("ours") == 5


# --- a wrong result is never timed


def _raise():
    raise RuntimeError


def test_a_wrong_peer_is_refused_and_not_timed(no_measuring):
    log = []
    wrong = X**2 + 1e-4
    nan = torch.where(X > 0.9, torch.nan, X**2)
    spoiled = {
        "wrong": competitor("wrong", log, y=wrong),
        "nan": competitor("nan", log, y=nan),
        "shape": competitor("shape", log, y=X[:-1] ** 2),
        "none": measure.Competitor("none", lambda: log.append("none"), dict),
        "raises": measure.Competitor("raises", lambda: log.append("raises"), lambda: 1 / 0),
        "silent": measure.Competitor("silent", lambda: log.append("silent"), _raise),
    }
    honest = [competitor("ours", log), competitor("peer", log)]
    race = measure.Race([*honest, *spoiled.values()], TRUTH, lambda: None)
    race.run(3)
    assert set(race.refused) == set(spoiled)
    assert set(race.seconds) == {"ours", "peer"}
    assert not set(log) & set(spoiled)
    assert race.refused["wrong"].startswith("y: largest error 0.0001")
    assert race.refused["raises"] == "ZeroDivisionError: division by zero"
    assert race.refused["silent"] == "RuntimeError: no message"


def test_our_own_wrong_result_stops_the_race():
    competitors = [competitor("ours", [], y=X**2 + 1e-4), competitor("peer", [])]
    with pytest.raises(measure.WrongResult, match="ours is not timed: y: largest error"):
        measure.Race(competitors, TRUTH, lambda: None)


@pytest.mark.parametrize("tensor", ["y", "dx", "dweight"])
def test_a_planted_error_in_one_tensor_of_an_op_is_seen(no_measuring, tensor):
    case = op_cases.case(op_cases.OPS["bn_act"], (2, 8, 5, 5), torch.float32, compiled=False)
    honest = case.competitors[0]

    def spoiled():
        return {k: 1.01 * t if k == tensor else t for k, t in honest.results().items()}

    case.competitors[0] = measure.Competitor(honest.name, honest.call, spoiled)
    with pytest.raises(measure.WrongResult, match=f"{tensor}: largest error"):
        case.race(lambda: None)


# --- memory


def test_saved_memory_counts_a_storage_once_and_leaves_parameters_out():
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(32, 8, requires_grad=True)

    def forward():
        h = x @ weight  # keeps x (and the weight)
        return torch.relu(h).view(-1)  # keeps its result, [32, 16]

    assert memory.saved_for_backward(forward, [weight]) == 4 * (32 * 8 + 32 * 16)
    assert memory.saved_for_backward(forward) == 4 * (32 * 8 + 32 * 16 + 8 * 16)
    assert memory.saved_for_backward(lambda: (x * x).exp(), [x]) == 4 * 32 * 8


def test_allocations_hear_temporaries():
    found = memory.allocations(lambda: torch.ones(1000).add(1).mul(2).sum())
    assert found.kept == 4
    assert 8000 <= found.peak <= 8100
