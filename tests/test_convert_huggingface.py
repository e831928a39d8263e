"""fuse and unfuse on the ResNet and RegNet of transformers, built from small configurations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    RegNetModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)
from transformers.models.regnet.modeling_regnet import RegNetSELayer
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

import fusedres
import zoo
from fusedres import observers

SMALL = dict(embedding_size=16, hidden_sizes=[32, 48], depths=[2, 2])


def resnet(model=ResNetForImageClassification, **options) -> nn.Module:
    return model(ResNetConfig(**SMALL, num_labels=10, **options))


def regnet(model=RegNetForImageClassification, **options) -> nn.Module:
    return model(RegNetConfig(**SMALL, num_labels=10, groups_width=8, **options))


NETWORKS = {
    "resnet": resnet,
    "resnet, no head": lambda: resnet(ResNetModel),
    "basic layers": lambda: resnet(layer_type="basic"),
    "stride in the first convolution": lambda: resnet(downsample_in_bottleneck=True),
    "stride in the first stage": lambda: resnet(downsample_in_first_stage=True),
    "silu": lambda: resnet(hidden_act="silu"),
    "tanh": lambda: resnet(layer_type="basic", hidden_act="tanh"),
    "regnet x": lambda: regnet(layer_type="x"),
    "regnet y": lambda: regnet(layer_type="y"),
    "regnet y, no head": lambda: regnet(RegNetModel, layer_type="y"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_same_fused(name):
    model = NETWORKS[name]()
    fused = zoo.assert_same_network(model, zoo.images())
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(unfused, model)
    zoo.assert_same_state(unfused, model)


@pytest.mark.parametrize("name", ["resnet", "basic layers", "silu", "regnet x", "regnet y"])
def test_everything_is_fused(name):
    fused = fusedres.fuse(NETWORKS[name]())
    for mode in (True, False):
        assert zoo.unfused_reasons(fused.train(mode), zoo.images()) == set()


def test_a_layer_is_one_chain():

    events = []
    fused = fusedres.fuse(resnet()).eval()
    with torch.no_grad(), observers.observe(events.append):
        fused(zoo.images())
    convolutions = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert [e.op for e in events].count("conv_bn_act") == len(convolutions)


def test_hidden_states_tuple_and_loss():
    x, labels = zoo.images(), torch.tensor([1, 2])
    model = resnet().eval()
    fused = fusedres.fuse(model)
    ours, ref = (m(x, labels=labels, output_hidden_states=True) for m in (fused, model))
    torch.testing.assert_close(ours.loss, ref.loss)
    torch.testing.assert_close(ours.hidden_states, ref.hidden_states)
    torch.testing.assert_close(fused(x, return_dict=False), model(x, return_dict=False))
    with pytest.raises(ValueError, match="channel dimension"):
        fused(zoo.images(channels=4))


def test_backbone():
    model = resnet(ResNetBackbone, out_features=["stage1", "stage2"]).eval()
    x = zoo.images()
    torch.testing.assert_close(fusedres.fuse(model)(x).feature_maps, model(x).feature_maps)


def test_pretrained_folder_goes_both_ways(tmp_path):
    model = resnet().eval()
    x = zoo.images()
    for source in (model, fusedres.fuse(model)):
        source.save_pretrained(tmp_path)
        loaded = ResNetForImageClassification.from_pretrained(tmp_path).eval()
        zoo.assert_same_classes(loaded, model)
        for network in (loaded, fusedres.fuse(loaded)):
            torch.testing.assert_close(network(x).logits, model(x).logits)


def test_names_by_which_transformers_splits_a_model():
    model = resnet()
    names = {type(m).__name__ for m in fusedres.fuse(model).modules()}
    assert set(model._no_split_modules) <= names


def test_conv_layer_takes_its_argument_by_name():
    layer = ResNetConvLayer(3, 8).eval()
    x = zoo.images()
    ours = fusedres.fuse(layer)(hidden_states=x)
    torch.testing.assert_close(ours, layer(hidden_states=x))


def test_hook_inside_a_layer():
    model = resnet().eval()
    seen = []
    layer = model.resnet.encoder.stages[1].layers[0].layer
    layer.register_forward_hook(lambda module, args, result: seen.append(result.clone()))
    layer[1].register_forward_hook(lambda module, args, result: result * 2)
    x = zoo.images()
    torch.testing.assert_close(fusedres.fuse(model)(x).logits, model(x).logits)
    assert len(seen) == 2
    torch.testing.assert_close(*seen)


def test_squeeze_excite_alone():
    model = RegNetSELayer(8, 2)
    zoo.assert_same_network(model, zoo.images(2, 5, channels=8))
    model.attention[1] = nn.Tanh()
    with pytest.raises(ValueError, match="Tanh"):
        fusedres.fuse(model)
