"""The benchmarks' machinery: statistics, turns, what is counted, the check before the time."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmark_harness import CPU, TRUTH, FakeClock, X, competitor
from benchmarks import clock, inspection, measure, op_cases, peers

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
        (0.96, (1.12, 1.13), True),  # both halves say the contrary of the whole
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
    assert measure.rounds_within(10, 1.0, most=60) == 10
    assert measure.rounds_within(10, 40.0, most=60) == 2
    assert measure.rounds_within(10, 1e-3, most=60) == 60


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


def _race(names, log, **kwargs):
    competitors = [competitor(name, log) for name in names]
    return measure.Race(
        competitors, TRUTH, FakeClock(log=log), lambda i: log.append(f"inputs {i}"), **kwargs
    )


def test_race_draws_inputs_prepares_flushes_then_times_each_in_turn():
    log = []
    race = _race(("ours", "peer"), log)
    race.run(2)
    turns = [("inputs 0",), "ours", "peer", ("inputs 1",), "peer", "ours"]
    steps = [[f"prepare {t}", "flush", t] if isinstance(t, str) else list(t) for t in turns]
    assert log == list(itertools.chain(*steps))
    assert {len(s) for s in race.seconds.values()} == {2}


def test_rounds_driven_from_outside_give_everybody_as_many():
    log = []
    race = _race(("ours", "a", "b"), log)
    for _ in range(5):
        race.until_ours()
        assert log[-2:] == ["prepare ours", "flush"]
        race.our_turn()
        assert log[-1] == "ours"
    race.finish_round()
    assert {len(s) for s in race.seconds.values()} == {5}
    assert log.count("ours") == 5
    assert [step for step in log if step.startswith("inputs")] == [f"inputs {i}" for i in range(5)]


def test_inputs_are_fresh_each_round_and_the_same_in_each_run():
    case = op_cases.case(op_cases.OPS["bn_act"], (2, 8, 5, 5), torch.float32, chosen=_NOBODY)
    x = case.competitors[0].results  # the competitor's own operands are the case's
    drawn = []
    for round_ in (0, 1, 0):
        case.refresh(round_)
        drawn.append(x()["y"].clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_cuda_graphs_are_for_everybody_or_nobody(monkeypatch):
    def capture(name, call):
        if name == "stubborn":
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        return lambda: log.append(f"replay {name}")

    log = []
    monkeypatch.setattr(clock, "_capture", capture)
    everybody = _race(("ours", "peer"), log, graphs=True)
    everybody.run(1)
    assert everybody.graphs == "of everybody"
    assert {"replay ours", "replay peer"} <= set(log)
    assert "ours" not in log
    log.clear()
    nobody = _race(("ours", "stubborn"), log, graphs=True)
    nobody.run(1)
    assert nobody.graphs.startswith("of nobody: stubborn: operation not permitted")
    assert {"ours", "stubborn"} <= set(log)
    assert not any(step.startswith("replay") for step in log)


# --- a wrong result is never timed


def _raise():
    raise RuntimeError


def test_a_wrong_peer_is_refused_and_not_timed():
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
    race = measure.Race([*honest, *spoiled.values()], TRUTH, FakeClock())
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
        measure.Race(competitors, TRUTH, FakeClock())


_NOBODY = peers.Choice(["nobody"])


@pytest.mark.parametrize("tensor", ["y", "dx", "dweight"])
def test_a_planted_error_in_one_tensor_of_an_op_is_seen(tensor):
    case = op_cases.case(op_cases.OPS["bn_act"], (2, 8, 5, 5), torch.float32, chosen=_NOBODY)
    honest = case.competitors[0]

    def spoiled():
        return {k: 1.01 * t if k == tensor else t for k, t in honest.results().items()}

    case.competitors[0] = measure.Competitor(honest.name, honest.call, spoiled)
    with pytest.raises(measure.WrongResult, match=f"{tensor}: largest error"):
        case.race(FakeClock())


# --- peers


def test_a_peer_that_cannot_run_is_missing_with_its_reason():
    def unavailable():
        raise peers.Unavailable("not installed")

    def broken():
        raise OSError("no such driver\nand a long story")

    makers = {"a": unavailable, "b": broken, "c": lambda: competitor("c", []), "d": unavailable}
    chosen = peers.Choice(["a", "b", "c"]).only(["?"], "never")
    found, missing = peers.make(makers, chosen)
    assert [c.name for c in found] == ["c"]
    assert missing == {
        "a": "not installed",
        "b": "it could not be built: OSError: no such driver",
        "d": peers.UNSELECTED,
    }
    assert peers.ALL.only(["x*"], "too slow").why_not("y") == "too slow"
    assert peers.ALL.only(["x*"], "too slow").why_not("xy") is None


# --- what one call does


def test_saved_memory_counts_a_storage_once_and_leaves_parameters_out():
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(32, 8, requires_grad=True)

    def step():
        h = x @ weight  # keeps x (and the weight)
        torch.relu(h).view(-1).sum().backward()  # keeps its result, [32, 16]

    def saved(exclude):
        return inspection.inspect(step, 32, CPU, exclude=exclude, saves=True).saved

    assert saved([weight]) == 4 * (32 * 8 + 32 * 16)
    assert saved([]) == 4 * (32 * 8 + 32 * 16 + 8 * 16)


def test_peak_hears_temporaries_and_launches_are_operators_on_activations():
    x = torch.ones(2, 5, 10, 10)

    def call():
        return x.add(1).mul(2).sum()

    seen = inspection.inspect(call, 2, CPU)
    assert 8000 <= seen.peak <= 8300
    assert seen.saved is None
    assert seen.launches == 3
    assert seen.bytes_moved == 5 * 4000  # two operators RW, one R
    assert inspection.inspect(call, 2, CPU, compiled=True).launches is None


def test_clock_times_on_cold_caches(monkeypatch):
    monkeypatch.setattr(clock, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(clock, "last_level_cache", lambda device: 2**20)
    found = clock.Clock(CPU)
    before = found._buffer[0].item()
    assert found.typical(lambda: sum(range(20000)), rounds=2) > 1e-5
    assert found._buffer[0].item() == before + 2
    assert found._buffer.nbytes == 64 * 2**20  # no less, however small the caches
