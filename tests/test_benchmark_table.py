"""The benchmarks' cases, and the table of goals that is made of them."""

from __future__ import annotations

import json

import pytest
import torch

import fusedres
from benchmark_harness import RATES, TRUTH, X, competitor, no_measuring
from benchmarks import cases, floors, measure, model_cases, op_cases, peers, plain, run_table
from benchmarks.table import ROWS, Goal, Row, Scale

__all__ = ["no_measuring"]  # a fixture


# --- cases


@pytest.mark.parametrize("name", op_cases.OPS)
def test_every_op_case_passes_its_own_check(no_measuring, name):
    for dtype in (torch.float32, torch.bfloat16):
        case = op_cases.case(op_cases.OPS[name], (2, 16, 6, 6), dtype, compiled=False)
        race = case.race(lambda: None)
        race.run(2)
        found = cases.report(case, race, floor=False, memory=True)
        assert not found["refused"]
        assert found["peers"].keys() == {peers.EAGER}
        assert found["missing"] == {peers.COMPILE: peers.UNSELECTED}
        ours, eager = found["memory"][peers.OURS], found["memory"][peers.EAGER]
        assert 0 < ours["saved"] < eager["saved"]
        json.dumps(found)


def test_gigabytes_per_second_come_from_the_ops_own_bytes(no_measuring):
    with fusedres.backend("reference"):
        case = op_cases.case(op_cases.OPS["bn_act"], (2, 16, 6, 6), torch.float32, compiled=False)
        assert case.traffic is None  # nobody counts the passes of PyTorch's own ops
    case.traffic = floors.Traffic(bytes_moved=10**6, eager_bytes=10**7, launches=1)
    figures = cases._traffic_figures(case, seconds=1e-3)
    assert figures["gigabytes_per_second"] == pytest.approx(1.0)
    assert figures["percent_of_copy"] == pytest.approx(10.0)


def test_convolutions_of_a_network_are_all_found():
    work = model_cases.network("se_resnet18", 1, 64)
    with torch.device("meta"):
        found = floors.convolutions(work.plain(), torch.empty(work.x))
    assert found.total() == 20  # not squeeze-excite's, which see one pixel
    assert sum(not conv.needs_dx for conv in found) == 1


@pytest.mark.parametrize("name", plain.NETWORKS)
def test_plain_and_fused_networks_share_their_weights(name):
    with torch.device("meta"):
        plain_keys = plain.plain_network(name).state_dict()
        fused_keys = getattr(fusedres.models, name)().state_dict()
    assert list(plain_keys) == list(fused_keys)
    assert all(plain_keys[k].shape == fused_keys[k].shape for k in plain_keys)


def test_a_block_in_training_and_inference_passes_its_own_check(no_measuring, monkeypatch):
    absent = peers.Missing(peers.OPENVINO, "not installed")
    monkeypatch.setattr(model_cases, "openvino_inference", lambda *args: absent)
    work = model_cases.block("SEBottleneck", 64, 16, 2, 6)
    for make in (model_cases.training_case, model_cases.inference_case):
        case = make(work, torch.float32, compiled=False)
        race = case.race(lambda: None)
        assert not race.refused
        assert set(race.competitors) == {peers.OURS, peers.EAGER}
    assert case.missing[peers.OPENVINO] == "not installed"
    found = model_cases.memory_of_training(work, torch.float32)
    assert found[peers.OURS].saved < found[peers.EAGER].saved


# --- the table


def _row(id: str, ours=None, eager=None) -> Row:
    """Ours takes 2 seconds and eager 3.2, where a call's result is taken for its time."""

    def case(scale: Scale) -> cases.Case:
        competitors = [
            competitor(peers.OURS, [], ours, call=lambda: 2.0),
            competitor(peers.EAGER, [], eager, call=lambda: 3.2),
        ]
        missing = {peers.COMPILE: "no compiler"}
        return cases.Case("a square", competitors, missing, TRUTH)

    goals = Goal(peers.EAGER, 1.3, 1.5), Goal(peers.COMPILE, None, 1.0)
    return Row(id, goals, "a test", case)


def test_table_is_written_with_verdicts(no_measuring, monkeypatch, tmp_path, capsys):
    saved = {peers.OURS: cases.Memory(9, 60), peers.EAGER: cases.Memory(9, 100)}
    rows = (
        _row("timed"),
        _row("refused", eager=X),
        Row("memory", (Goal(peers.EAGER, 0.25, 0.5),), "a test", memory=lambda scale: saved),
    )
    monkeypatch.setattr(run_table, "ROWS", rows)
    monkeypatch.setattr(measure, "timed", lambda call, flush: call())
    out = tmp_path / "results" / "table.json"
    assert run_table.main(["--seconds", "0.05", "--threads", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["schema"] == 1
    assert found["machine"]["measured"]["copy_bandwidth"] == RATES.copy_bandwidth
    assert {"versions", "commit", "date", "settings"} <= found.keys()
    timed, refused, kept = found["rows"]
    assert timed["verdicts"][0]["verdict"] == "aim reached"
    assert timed["verdicts"][1]["verdict"] == "not measured: no compiler"
    assert timed["peers"][peers.EAGER]["ratio"] == pytest.approx(1.6)
    assert len(timed["peers"][peers.EAGER]["halves"]) == 2
    assert refused["verdicts"][0]["verdict"].startswith("not measured: y: largest error")
    assert kept["verdicts"][0]["share_saved"] == pytest.approx(0.4)
    assert kept["verdicts"][0]["verdict"] == "at least reached"
    assert "no compiler" in capsys.readouterr().out


def test_table_resumes_after_an_interrupt(no_measuring, monkeypatch, tmp_path):
    out = tmp_path / "table.json"
    args = ["--seconds", "0.01", "--threads", "2", "--out", str(out)]

    def interrupt(scale):
        raise KeyboardInterrupt

    interrupted = Row("second", (), "a test", memory=interrupt)
    monkeypatch.setattr(run_table, "ROWS", (_row("first"), interrupted))
    with pytest.raises(KeyboardInterrupt):
        run_table.main(args)
    first = json.loads(out.read_text())["rows"]
    monkeypatch.setattr(run_table, "ROWS", (_row("first"), _row("second")))
    assert run_table.main([*args, "--resume"]) == 0
    found = json.loads(out.read_text())["rows"]
    assert found[:1] == first
    assert [row["id"] for row in found] == ["first", "second"]
    with pytest.raises(SystemExit, match="has another settings"):
        run_table.main([*args, "--seconds", "2", "--resume"])
    out.write_text("{")
    with pytest.raises(SystemExit, match="is not JSON"):
        run_table.main([*args, "--resume"])


def test_table_with_our_own_wrong_result_fails(no_measuring, monkeypatch, tmp_path):
    monkeypatch.setattr(run_table, "ROWS", (_row("wrong", ours=X),))
    out = tmp_path / "table.json"
    assert run_table.main(["--out", str(out)]) == 1
    assert json.loads(out.read_text())["rows"][0]["status"] == "wrong"


def test_rows_are_chosen_by_pattern(capsys):
    assert run_table.main(["--list", "--rows", "resnet50-*-fp32"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == ["resnet50-memory-fp32", "resnet50-inference-fp32", "resnet50-training-fp32"]
    assert run_table.main(["--rows", "resnet51-*"]) == 2
    assert "nothing matches resnet51-*" in capsys.readouterr().err
    assert len({row.id for row in ROWS}) == len(ROWS)
