"""What is made of results: goals, the table, the comparison of two runs."""

from __future__ import annotations

import json

import pytest

from benchmark_harness import ID, figures, recorded, result, row
from benchmarks import compare, goals, peers, show
from benchmarks.peers import EAGER, OURS

# --- goals and the table


def test_a_table_tells_everything(capsys):
    found = recorded(saved=60)
    found["rows"][0]["refused"] = {"OpenVINO": "y: largest error 3"}
    found["rows"][0]["missing"] = {"apex": "not installed", "TensorRT": peers.UNSELECTED}
    found["rows"].append({
        "id": "b", "suite": "models", "status": "wrong", "reason": "dx: wrong",
        "took_seconds": 1.0,
    })  # fmt: skip
    show.table(found)
    printed = capsys.readouterr().out
    assert "a CPU, AVX2, 2 threads; cpu: copy 10.0 GB/s, matmul float32 100 GFLOP/s" in printed
    for part in ("1.40x", "aim reached", "-40%", "refused: OpenVINO", "dx: wrong"):
        assert part in printed
    assert f"missing: apex ({ID}): not installed" in printed
    assert "TensorRT" not in printed  # nobody asked for it


def test_goals_are_judged_on_ratios_and_on_memory():
    verdicts = {(o.goal.peer, o.goal.memory): o for o in goals.outcomes(recorded()["rows"][0])}
    assert verdicts[EAGER, True].value == pytest.approx(0.4)
    assert verdicts[EAGER, True].verdict == "aim reached"
    assert verdicts[EAGER, False].verdict == "aim reached"
    noisy = recorded(ratio=1.1, halves=[1.3, 0.9])["rows"][0]
    assert {o.verdict for o in goals.outcomes(noisy) if o.value == 1.1} == {"tie"}


# --- comparison


def _write(path, found):
    path.write_text(json.dumps(found))
    return path


def _compare(tmp_path, a, b):
    paths = [_write(tmp_path / name, found) for name, found in (("a.json", a), ("b.json", b))]
    return compare.main([str(p) for p in paths])


@pytest.mark.parametrize(
    "before, after, code, word",
    [
        ({"ratio": 1.4}, {"ratio": 1.2}, 1, "slower"),
        ({"ratio": 1.4, "halves": [1.5, 1.25]}, {"ratio": 1.2}, 0, "same"),  # within its noise
        ({"ratio": 1.2}, {"ratio": 1.4}, 0, "faster"),
        ({}, {"saved": 61}, 1, "keeps more"),
        ({}, {"saved": 59}, 0, "keeps less"),
        ({"median": 1.0}, {"median": 3.0}, 0, "same"),  # the machine was slower, for everybody
    ],
)
def test_comparison_says_what_got_slower_beyond_noise(tmp_path, capsys, before, after, code, word):
    assert _compare(tmp_path, recorded(**before), recorded(**after)) == code
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("median, code", [(1.1, 0), (1.3, 1), (0.7, 0)])
def test_without_a_common_peer_the_quartiles_decide(tmp_path, median, code):
    a, b = (result(row(ID, {OURS: figures(m)})) for m in (1.0, median))
    assert _compare(tmp_path, a, b) == code


def test_a_comparison_that_cannot_be_made(tmp_path, capsys):
    other = result(row("resnet18-training-b8-fp32", {OURS: figures(1.0)}))
    assert _compare(tmp_path, recorded(), other) == 2
    assert "no row in common" in capsys.readouterr().err
    assert _compare(tmp_path, recorded(), {"schema": 7}) == 2
    assert "b.json: schema: wanted 2, got 7" in capsys.readouterr().err


def test_a_row_that_became_wrong_fails_the_comparison(tmp_path, capsys):
    wrong = {
        "id": "resnet18-training-b8-fp32", "suite": "models", "status": "wrong", "reason": "y",
        "took_seconds": 1.0,
    }  # fmt: skip
    after = recorded()
    after["rows"].append(wrong)
    assert _compare(tmp_path, recorded(), after) == 1
    assert f"wrong now: {wrong['id']}" in capsys.readouterr().out
