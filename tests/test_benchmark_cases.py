"""What the benchmarks measure: each case against its own check, and the roofline against the ops."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from benchmark_harness import CPU, RATES, ROOT, FakeClock, no_measuring, own_environment
from benchmarks import (
    bench_family,
    bench_residuals,
    cases,
    conv_cases,
    floors,
    goals,
    model_cases,
    model_peers,
    networks,
    op_cases,
    peers,
    plain,
    roofline,
    runtimes,
    suites,
)
from benchmarks.peers import EAGER, OURS
from cases import randn

__all__ = ["no_measuring"]  # a fixture
EAGER_ONLY = peers.Choice(["eager*"])


def _report(case, rounds=2):
    race = case.race(FakeClock())
    seen = case.inspect()
    race.run(rounds)
    found = cases.report(case, race, seen)
    assert not found["refused"]
    json.dumps(found)
    return found


# --- cases


@pytest.mark.parametrize("layout", [cases.CHANNELS_LAST, cases.NCHW])
@pytest.mark.parametrize("name", op_cases.OPS)
def test_every_op_case_passes_its_own_check(no_measuring, name, layout):
    eager = EAGER if layout == cases.CHANNELS_LAST else peers.EAGER_NCHW
    for dtype in (torch.float32, torch.bfloat16):
        case = op_cases.case(
            op_cases.OPS[name], (2, 16, 6, 6), dtype, layout=layout, chosen=EAGER_ONLY
        )
        found = _report(case)
        assert found["competitors"].keys() == {OURS, eager}
        assert found["missing"] == dict.fromkeys(
            (peers.COMPILE, peers.MAX_AUTOTUNE), peers.UNSELECTED
        )
        ours, theirs = found["competitors"][OURS], found["competitors"][eager]
        assert 0 < ours["saved"] < theirs["saved"]
        assert ours["launches"] == 2 < theirs["launches"]
        assert ours["percent_of_floor"] > 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_half_of_an_op(no_measuring, direction):
    op = op_cases.OPS["bn_act+residual"]
    case = op_cases.case(op, (2, 16, 6, 6), torch.float32, direction, chosen=EAGER_ONLY)
    found = _report(case)["competitors"][OURS]
    assert found["launches"] == 1
    assert (found["saved"] is None) == (direction == "backward")


def test_conv_cases_pass_their_own_check(no_measuring):
    conv = networks.Conv((16, 6, 6), (24, 3, 3), 3, 2, 1, 1)
    for name in ("conv_bn_act", "conv_bn_act+residual", "conv_stats"):
        case = conv_cases.conv_case(name, conv, 2, torch.float32, chosen=EAGER_ONLY)
        found = _report(case)
        assert set(found["competitors"]) == {OURS, EAGER}
        assert found["floor"]["seconds"] > 0
    # conv_stats trains: its floor holds the convolution's two gradients as well.
    hardware = roofline.Hardware(1e10, 1e11)
    forward = conv_cases.conv_case(
        "conv_stats", conv, 2, torch.float32, direction="forward", chosen=EAGER_ONLY
    )
    assert case.floor(hardware) > 2 * forward.floor(hardware)


def test_figures_come_from_the_ops_own_bytes(no_measuring):
    x = torch.empty(2, 16, 6, 6)
    case = op_cases.case(
        op_cases.OPS["bn_act"], tuple(x.shape), torch.float32, "forward", chosen=EAGER_ONLY
    )
    found = _report(case)
    entry = found["competitors"][OURS]
    assert entry["bytes_moved"] == 3 * x.nbytes  # statistics R, then R and W
    assert found["floor"]["seconds"] == pytest.approx(3 * x.nbytes / RATES.copy_bandwidth)
    rate = 3 * x.nbytes / entry["median"]
    assert entry["gigabytes_per_second"] == pytest.approx(rate / 1e9)
    assert entry["percent_of_copy"] == pytest.approx(100 * rate / RATES.copy_bandwidth)
    with fusedres.backend("reference"):  # nobody counts the passes of PyTorch's own backward
        case = op_cases.case(
            op_cases.OPS["bn_act"], tuple(x.shape), torch.float32, chosen=EAGER_ONLY
        )
        assert case.floor(roofline.Hardware(1e10, 1e11)) is None


@pytest.mark.parametrize("name", plain.NETWORKS)
def test_plain_and_fused_networks_share_their_weights(name):
    with torch.device("meta"):
        plain_keys = plain.plain_network(name).state_dict()
        fused_keys = getattr(fusedres.models, name)().state_dict()
    assert list(plain_keys) == list(fused_keys)
    assert all(plain_keys[k].shape == fused_keys[k].shape for k in plain_keys)


def test_a_block_in_training_and_inference_passes_its_own_check(no_measuring):
    work = model_cases.block("SEBottleneck", 64, 16, 2, 6)
    training = _report(model_cases.training_case(work, torch.float32, chosen=EAGER_ONLY))
    inference = _report(model_cases.inference_case(work, torch.float32, chosen=EAGER_ONLY))
    for found in (training, inference):
        assert set(found["competitors"]) == {OURS, EAGER, peers.EAGER_NCHW}
    entries = training["competitors"]
    assert entries[OURS]["saved"] < entries[EAGER]["saved"]
    assert inference["missing"][peers.OPENVINO] == peers.UNSELECTED


@pytest.mark.parametrize(
    "work", [*bench_family.WORKS, *bench_residuals.WORKS], ids=lambda work: work.name
)
def test_a_residual_system_and_its_peer_are_the_same(work):
    plain, fused = work.plain(), work.fused()
    fused.load_state_dict(plain.state_dict())
    x = work.x
    small = {4: (4, x[1], 8, 8), 3: (2, 7, x[-1]), 2: (5, x[-1])}
    found = []
    for module in (fused, plain):
        torch.manual_seed(0)
        found.append(module(randn(small[len(x)])))
    torch.testing.assert_close(*found)  # each run of the benchmark compares the gradients


def test_a_network_has_a_floor_and_convolutions_alone(no_measuring):
    work = model_cases.network("se_resnet18", 1, 64)
    case = model_cases.inference_case(work, torch.float32, chosen=EAGER_ONLY)
    assert case.floor(roofline.Hardware(1e10, 1e11)) > 0
    assert case.conv_seconds(FakeClock()) > 0
    with torch.device("meta"):
        found = floors.convolutions(work.plain(), torch.empty(work.x))
    assert found.total() == 20  # not squeeze-excite's, which see one pixel
    assert sum(not conv.needs_dx for conv in found) == 1


@pytest.mark.parametrize("make", [runtimes.openvino, runtimes.onnxruntime])
def test_runtimes_see_each_rounds_input_or_are_missing_by_name(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    try:
        peer = make(model, x)
    except peers.Unavailable as reason:
        assert "not installed: pip install -r requirements/bench.txt" in str(reason)
        return
    for _ in range(2):
        with torch.no_grad():
            y = model(x)
        found = peer.results()["y"]
        assert (found - y).abs().max() <= 1e-5 * y.abs().max()
        x.normal_()


def test_compiled_peers_are_built_and_checked(no_measuring, monkeypatch):
    def compiled(function, device, mode=None, **how):
        asked.append((mode, how))
        return lambda *args, **kwargs: function(*args, **kwargs)

    asked = []
    for module in (peers, model_peers):
        monkeypatch.setattr(module, "compiled", compiled)
    chosen = peers.Choice(["eager*", "torch.compile*"])
    modes = [(None, {}), (peers.AUTOTUNE_MODE, {})]
    work = model_cases.block("BasicBlock", 16, 16, 2, 6)
    op = op_cases.OPS["bn_act+residual"]
    names = {OURS, EAGER, peers.COMPILE, peers.MAX_AUTOTUNE}
    for case, wanted in (
        (op_cases.case(op, (2, 16, 6, 6), torch.float32, chosen=chosen), names),
        (model_cases.training_case(work, torch.float32, chosen=chosen), names | {peers.EAGER_NCHW}),
    ):
        found = _report(case)
        assert set(found["competitors"]) == wanted
        assert found["missing"] == {}
        assert found["competitors"][peers.COMPILE]["saved"] > 0
        assert found["competitors"][peers.COMPILE]["launches"] is None
    assert asked == [*modes, *modes]
    found = _report(model_cases.inference_case(work, torch.float32, chosen=chosen))
    assert set(found["competitors"]) == names | {peers.EAGER_NCHW, peers.FREEZING}
    assert asked[4:] == [*modes, (None, {"options": {"freezing": True}})]


@pytest.mark.parametrize("residual", [False, True])
def test_cudnns_fused_convolution_is_given_what_eager_computes(monkeypatch, residual):
    """Without a GPU: cuDNN's two calls stood in for by what their schemas say."""

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    conv = networks.Conv((16, 6, 6), (24, 3, 3), 3, 2, 1, 1)
    name = "conv_bn_act+residual" if residual else "conv_bn_act"
    op = conv_cases._conv_bn_act(name, conv)
    case = conv_cases.conv_case(name, conv, 2, torch.float32, chosen=EAGER_ONLY)
    torch.manual_seed(0)  # as the case draws
    tensors = op.tensors((2, *conv.x), torch.float32, cases.CHANNELS_LAST)
    peer = op.peers[peers.CUDNN](tensors, None, "inference", torch.float32)
    case.competitors.append(peer)
    assert case.race(FakeClock()).refused == {}


def test_freezing_compiles_code_of_its_own():
    """torch.compile shares code between objects of one class that are compiled alike."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return F.relu(x * self.weight)

    x = torch.randn(2, 4)
    torch.compiler.reset()
    model_peers.compiled_inference(peers.COMPILE, Scale().eval(), x, None).results()
    seen = Counter(torch._dynamo.utils.counters["stats"])
    model_peers.frozen_inference(Scale().eval(), x).results()
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert again == seen["unique_graphs"] + 1


# --- the suites


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_name_each_benchmark_once(monkeypatch, device):
    monkeypatch.setattr(suites, "devices", lambda: [torch.device(device)])
    shapes = suites.ops("bn_act", suites.inner_sizes(), table=((64, 56),))
    convs = list(networks.network("resnet50").convs())
    found = [
        *shapes,
        *suites.convolutions("conv_bn_act", convs, ("inference",), smoke=convs[:1]),
        *suites.blocks([("BasicBlock", 64, 64, 56)], "training"),
        *suites.models(
            "training", [("resnet50", 2), ("resnet50", 8), ("resnet50", 1)], table=[("resnet50", 8)]
        ),
    ]
    ids = [spec.id for spec in found]
    assert len(set(ids)) == len(ids)
    assert all(id.endswith("-cuda") == (device == "cuda") for id in ids)
    assert sum(spec.table for spec in shapes) == 2  # float32 and bfloat16
    assert sum(spec.smoke for spec in found) == 3
    wanted = {"cpu": "resnet50-training-b8-bf16", "cuda": "resnet50-training-b256-bf16-cuda"}
    (judged,) = [spec for spec in found if spec.id == wanted[device]]
    assert judged.selected("table")
    assert any(fnmatch(judged.id, goal.rows) for goal in goals.GOALS)
    assert f"resnet50-training-b1-fp32{'' if device == 'cpu' else '-cuda'}" in ids


def test_every_goal_of_a_cpu_is_in_the_table():
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--suite", "table"]
        + ["--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=own_environment(),
    )  # fmt: skip
    ids = [line.partition("[")[2].rstrip("]") for line in found.stdout.splitlines() if "[" in line]
    for goal in goals.GOALS:
        on_gpu = goal.rows.endswith("-cuda")
        assert on_gpu or any(fnmatch(id, goal.rows) for id in ids), goal


def test_device_is_where_the_case_runs():
    case = op_cases.case(op_cases.OPS["bn_act"], (2, 8, 5, 5), torch.float32, chosen=EAGER_ONLY)
    assert case.device == CPU
