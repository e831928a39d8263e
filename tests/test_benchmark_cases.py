"""What the benchmarks measure: each case against its own check, and the roofline against the ops."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from benchmark_harness import CPU, RATES, FakeClock, no_measuring
from benchmarks import (
    cases,
    conv_cases,
    floors,
    model_cases,
    model_peers,
    networks,
    op_cases,
    passes,
    peers,
    plain,
    roofline,
    runtimes,
)
from benchmarks.peers import EAGER, OURS
from fusedres import dispatch

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


# --- the roofline


def _heard(model, x, train):
    """What the ops report over one call: bytes and flops by op."""
    events = []
    with dispatch.observe(events.append):
        y = model(x)
        if train:
            y.sum().backward()
    found = {}
    for e in events:
        moved, flops = found.get(e.op, (0, 0))
        found[e.op] = moved + e.bytes_moved, flops + e.flops
    return found


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnet50"])
def test_the_roofline_of_this_version_is_what_its_ops_report(name, train):
    size, batch = 32, 2
    model = getattr(fusedres.models, name)().to(memory_format=torch.channels_last).train(train)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(train):
        heard = _heard(model, x, train)
    counted = {}
    structure = roofline.OURS[train]
    net = networks.network(name, size)
    for k in roofline.kernels(net, structure, train, batch, torch.float32):
        if k.op in heard:
            moved, flops = counted.get(k.op, (0, 0))
            counted[k.op] = moved + k.bytes, flops + k.flops
    assert counted == heard


# ResNet-50 and -18 in bfloat16, batch 256, on an H100: worked out by hand, layer by layer, with
# strided 1x1 convolutions reading only the pixels they use; the ops here count the whole operand.
@pytest.mark.parametrize(
    "name, train, milliseconds",
    [
        ("resnet50", False, {"eager": 14.39, "pointwise": 8.44, "epilogue": 5.40, "block": 2.93}),
        ("resnet18", False, {"eager": 3.49, "pointwise": 2.12, "epilogue": 1.53, "block": 1.17}),
        (
            "resnet50",
            True,
            {"eager": 42.8, "pointwise": 31.7, "prologue": 21.9, "barrier": 17.3, "ideal": 8.27},
        ),
        ("se_resnet50", True, {"eager": 55.1, "pointwise": 31.7, "prologue": 21.9, "ideal": 8.29}),
    ],
)
def test_floors_of_known_networks(name, train, milliseconds):
    for structure, wanted in milliseconds.items():
        net = networks.network(name)
        found = roofline.floor(net, structure, train, 256, torch.bfloat16, roofline.H100)
        assert 0.995 * wanted <= 1e3 * found.seconds <= 1.035 * wanted, structure


def test_fewer_passes_have_a_lower_floor():
    for name in roofline.NETWORKS:
        for train, names in ((False, roofline.INFERENCE), (True, roofline.TRAINING)):
            net = networks.network(name)
            floors = {
                s: roofline.floor(net, s, train, 8, torch.float32, roofline.Hardware(1e10, 1e11))
                for s in names
            }
            order = [s for s in names if s != "steps"]  # which trades passes for memory
            moved = [floors[s].bytes for s in order]
            assert moved == sorted(moved, reverse=True)
            assert len({f.math for f in floors.values()}) >= 1
    assert passes.TRAINING.keys() == set(roofline.TRAINING)
    assert passes.INFERENCE.keys() == set(roofline.INFERENCE)


def test_roofline_prints_and_refuses(capsys):
    assert roofline.main(["resnet18", "--batch", "8", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18" in printed
    assert "prologue" in printed
    for wrong, message in (
        (["resnet51"], "unknown network 'resnet51'"),
        (["--batch", "0"], "--batch: wanted a number > 0, got 0"),
    ):
        with pytest.raises(SystemExit):
            roofline.main(wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="structure: wanted one of eager, .* got 'fast'"):
        roofline.kernels(networks.network("resnet18"), "fast", False, 1, torch.float32)


def test_device_is_where_the_case_runs():
    case = op_cases.case(op_cases.OPS["bn_act"], (2, 8, 5, 5), torch.float32, chosen=EAGER_ONLY)
    assert case.device == CPU
