"""DenseNets: what they keep for the backward, and torchvision's state, start and numbers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models import densenet as peer

import fusedres
from cases import layouts, randn
from harness import assert_same_bits
from modules import check_module, twins
from test_densenet import block_pair
from test_memory import saved

N, H = 4, 8
MAP = 4 * N * H * H  # bytes a channel


@layouts
@pytest.mark.parametrize("frugal", [False, True])
def test_memory_is_linear_in_depth(frugal, layout):
    """The block's result and a layer's bottlenecks: the input is inside of the result."""
    sizes = []
    for layers in (3, 6, 12):
        fused, plain = block_pair(16, layers, 8)
        for layer in fused.values():
            layer.memory_efficient = frugal
        x = randn((N, 16, H, H), layout=layout).requires_grad_()
        large, small = saved(fused, x)
        assert large == sorted([(16 + 8 * layers) * MAP] + [16 * MAP] * layers * (2 - frugal))
        vectors = sum(b.numel() for b in fused.buffers() if b.is_floating_point())
        assert small <= 4 * 2 * vectors
        sizes.append(sum(large) / sum(saved(plain, x)[0]))
    assert sizes[0] > sizes[1] > sizes[2]


def test_densenet_keeps_less_than_half_of_torchvisions():
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    kept = {}
    for frugal in (False, True):
        for make in (fusedres.models.densenet121, peer.densenet121):
            kept[make, frugal] = sum(saved(make(memory_efficient=frugal), x)[0])
    ours, theirs, ours_frugal, theirs_frugal = kept.values()
    assert ours_frugal < ours < theirs_frugal < 0.5 * theirs


# --- the models


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_models_have_torchvisions_state(name):
    with torch.device("meta"):
        ours, theirs = (getattr(m, name)() for m in (fusedres.models, torchvision.models))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])


def test_initialisation_is_torchvisions():
    states = []
    for models in (fusedres.models, torchvision.models):
        torch.manual_seed(1)
        states.append(models.densenet121(num_classes=7).state_dict())
    assert_same_bits(*states)


def test_a_whole_network():
    kwargs = dict(growth_rate=8, block_config=(2, 3, 2, 2), num_init_features=16, num_classes=5)
    fused, plain = twins(fusedres.models.DenseNet(**kwargs), peer.DenseNet(**kwargs))
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    rows = fusedres.explain(fused, x).rows
    assert not [r for r in rows if r.backend == "unfused"]
    check_module(fused.eval(), plain.eval(), x, graded=False)
    for train in (True, False):
        result = fusedres.verify(fused, x, train=train)
        assert result.ok, str(result)
