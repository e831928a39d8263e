"""fuse on torchvision's DenseNet; unfuse on this library's dense, gated and transformer modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import densenet as peer

import fusedres
import zoo
from cases import randn
from fusedres import observers


def test_torchvisions_densenet():
    torch.manual_seed(1)
    model = peer.DenseNet(8, (2, 3), 16, num_classes=5)
    fused = zoo.assert_same_network(model, zoo.images())
    assert zoo.unfused_reasons(fused.train(), zoo.images()) == set()
    zoo.assert_same_classes(fusedres.unfuse(fused), model)
    assert zoo.swapped(model) == [
        "features", "features.denseblock1", "features.transition1", "features.denseblock2",
    ]  # fmt: skip


def test_a_dense_layer_with_a_forward_of_its_own_keeps_it():
    class Doubled(peer._DenseLayer):
        def forward(self, input):
            return 2 * super().forward(input)

    model = peer._DenseBlock(2, 8, 2, 4, 0.0)
    model.denselayer2.__class__ = Doubled
    x = randn((2, 8, 5, 5))
    wanted = copy.deepcopy(model)(x)
    fused = fusedres.fuse(model)
    events = []
    with observers.observe(events.append):
        torch.testing.assert_close(fused(x), wanted)
    assert events[0].reason == "Doubled has a forward of its own"


OURS = {
    "densenet": (lambda: fusedres.models.DenseNet(8, (2, 2), 8, num_classes=3), (2, 3, 64, 64)),
    "encoder": (lambda: fusedres.TransformerEncoderLayer(8, 2, 16, 0.0, drop_path=0.5), (5, 3, 8)),
    "highway": (lambda: fusedres.Highway(6, act="silu"), (4, 6)),
    "highway_conv": (lambda: fusedres.HighwayConv2d(6, coupled=False), (2, 6, 5, 5)),
    "residual_mlp": (lambda: fusedres.ResidualMLP(6, 3, cross_coupled=True), (4, 6)),
    "dense_mlp": (lambda: fusedres.DenselyConnectedMLP(6, 4, 3, 3), (4, 6)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_unfused_modules_run_without_ops(name, training):
    make, shape = OURS[name]
    model = make().double().train(training)
    plain = fusedres.unfuse(model)
    x, events, ys = randn(shape, torch.float64), [], []
    for module in (model, plain, fusedres.fuse(plain)):
        events.clear()
        torch.manual_seed(3)
        with observers.observe(events.append):
            ys.append(module(x))
        assert bool([e for e in events if e.backend != "unfused"]) == (module is not plain)
    torch.testing.assert_close(ys[0], ys[1])
    torch.testing.assert_close(ys[0], ys[2])
    zoo.assert_same_state(model, plain)


@pytest.mark.parametrize("kind", [fusedres.AddLayerNorm, fusedres.AddRMSNorm])
def test_unfused_norms(kind):
    model = kind(8, dropout=0.25, drop_path=0.5).double()
    x, residual, results = randn((3, 4, 8), torch.float64), randn((3, 4, 8), torch.float64), []
    for module in (model, fusedres.unfuse(model)):
        torch.manual_seed(3)
        results.append(module(x, residual))
    torch.testing.assert_close(*results)


def test_unfused_cells():
    for forget_gate in (True, False):
        model = fusedres.ResidualLSTMCell(5, 6, forget_gate=forget_gate).double()
        x, state = randn((3, 5), torch.float64), None
        found = []
        for module in (model, fusedres.unfuse(model)):
            state = module(x, module(x))
            found.append(state)
        torch.testing.assert_close(*found)
        assert not isinstance(model, nn.LSTMCell)
