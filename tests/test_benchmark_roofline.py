"""The roofline: held together with the ops, and with floors that were worked out by hand."""

from __future__ import annotations

import pytest
import torch

import benchmark_harness  # noqa: F401  (makes the package importable)
import fusedres
from benchmarks import networks, passes, roofline
from fusedres import observers


def _heard(model, x, train):
    """What the ops report over one call: bytes and flops by op."""
    events = []
    with observers.observe(events.append):
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
