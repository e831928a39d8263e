"""fuse and unfuse on timm's pre-activation networks with batch norm."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
from timm.models import resnetv2
from torch import nn

import fusedres
import zoo
from fusedres import observers


def narrow(variant: str, depth=(2, 1, 1, 1), **options) -> nn.Module:
    """A variant of timm's ResNetV2 with a fraction of its work."""
    options = dict(channels=(16, 32, 48, 64), layers=depth, num_classes=10) | options
    return timm.create_model(variant, **options)


def block(kind=resnetv2.PreActBottleneck, norm=BatchNormAct2d, conv=create_conv2d, **options):
    return kind(16, 16, conv_layer=conv, norm_layer=norm, **options)


NETWORKS = {
    "bottlenecks": lambda: narrow("resnetv2_50"),
    "basic blocks, silu": lambda: narrow("resnetv2_18", depth=(2, 1, 1, 1), act_layer=nn.SiLU),
    "average-pool shortcut, drop path": lambda: narrow("resnetv2_50d", drop_path_rate=0.5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_same_fused(name):
    torch.manual_seed(3)
    model = NETWORKS[name]()
    fused = zoo.assert_same_network(model, zoo.images())
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(unfused, model)
    zoo.assert_same_state(unfused, model)


def test_everything_is_fused_and_sums_bring_their_statistics():
    """Of the norms behind the stem and the five additions only the first takes a pass for them."""
    fused, events = fusedres.fuse(NETWORKS["bottlenecks"]()), []
    for mode in (True, False):
        assert zoo.unfused_reasons(fused.train(mode), zoo.images()) == set()
    with observers.observe(events.append):
        fused.train()(zoo.images())
    inner = 5 * 2  # norms inside of the blocks, whose statistics are the convolutions'
    assert [e.op for e in events].count("bn_stats") == 1 + inner
    assert [e.op for e in events].count("residual_add") == 5


@pytest.mark.parametrize("make,reason", [
    (lambda: block(norm=partial(BatchNormAct2d, act_layer=nn.Mish)), "no batch norm and activation"),
    (lambda: block(norm=partial(BatchNormAct2d, drop_layer=nn.Dropout2d)), "no batch norm and act"),
    (lambda: with_hook(block()), "BatchNormAct2d has hooks"),
    (lambda: with_act(block()), "the norms have different activations"),
    (lambda: with_drop(block()), "Dropout is not timm's DropPath"),
    (lambda: block(conv=resnetv2.StdConv2d), "StdConv2d has a forward of its own"),
])  # fmt: skip
def test_what_stays_unfused_says_why(make, reason):
    torch.manual_seed(3)
    model, x = make(), zoo.images(2, 8, channels=16)
    reasons = zoo.unfused_reasons(fusedres.fuse(model), x)
    assert any(reason in found for found in reasons)
    if reason.endswith("DropPath"):
        return  # eager's dropout draws again in each execution of the comparison
    zoo.assert_same_network(model, x)


def with_hook(module):
    module.norm2.register_forward_hook(lambda *_: None)
    return module


def with_act(module):
    module.norm2.act = nn.SiLU()
    return module


def with_drop(module):
    module.drop_path = nn.Dropout(0.5)
    return module


def test_group_norm_is_left_alone():
    model = nn.Sequential(block(norm=partial(GroupNormAct, num_groups=4)), nn.Conv2d(16, 4, 1))
    with pytest.raises(ValueError, match="model: wanted residual blocks"):
        fusedres.fuse(model)


def test_checkpointing_repeats_the_blocks_and_counts_a_batch_once():
    model = narrow("resnetv2_18", depth=(2, 1, 1, 1)).double()
    wanted = zoo.train_step(copy.deepcopy(model), zoo.images().double())
    model.set_grad_checkpointing()
    found = zoo.train_step(fusedres.fuse(model), zoo.images().double())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("train", [True, False])
def test_explain_and_verify(train):
    fused = fusedres.fuse(nn.Sequential(block(), block(resnetv2.PreActBasic)))
    x = zoo.images(4, 8, channels=16)
    rows = fusedres.explain(fused.train(train), x).rows
    assert not [r for r in rows if r.backend == "unfused"]
    result = fusedres.verify(fused, x, train=train)
    assert result.ok, str(result)
