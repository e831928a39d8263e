"""fuse and unfuse on timm's networks, with the options of its blocks."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm import layers
from timm.models import resnet, senet
from torch import nn

import fusedres
import zoo


def narrow(variant: str, depth=(1, 1, 1, 1), **options) -> nn.Module:
    """A variant of timm's ResNet with a fraction of its work."""
    options = dict(channels=(16, 32, 48, 64)) | options
    return timm.create_model(variant, num_classes=10, layers=depth, **options)


def attention(attn_layer) -> nn.Module:
    return narrow("resnet50", block_args=dict(attn_layer=attn_layer))


NETWORKS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "legacy_seresnet18": lambda: timm.create_model("legacy_seresnet18", num_classes=10),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "resnet50": lambda: narrow("resnet50", depth=(2, 1, 1, 1)),
    "seresnet50": lambda: narrow("seresnet50"),
    "average-pool shortcut": lambda: narrow("resnet50d"),
    "tiered stem": lambda: narrow("resnet26t"),
    "convolution in place of the stem's pool": lambda: narrow("resnetrs50"),
    "blur pool": lambda: narrow("resnetblur50"),
    "average-pool anti-aliasing": lambda: narrow("resnetaa50"),
    "eca": lambda: narrow("ecaresnet50t"),
    "cbam": lambda: attention("cbam"),
    "channel attention": lambda: attention(layers.cbam.ChannelAttn),
    "effective se": lambda: attention("ese"),
    "se with norm": lambda: attention(partial(layers.SEModule, norm_layer=nn.BatchNorm2d)),
    "se with max-pool": lambda: attention(partial(layers.SEModule, add_maxpool=True)),
    "se with other gate": lambda: attention(partial(layers.SEModule, gate_layer="hard_sigmoid")),
    "se without bias": lambda: attention(partial(layers.SEModule, bias=False)),
    "drop path": lambda: narrow("resnet50", depth=(2, 2, 1, 1), drop_path_rate=0.5),
    "drop path, se": lambda: narrow("seresnet50", drop_path_rate=0.5),
    "drop path, eca": lambda: narrow("ecaresnet50t", drop_path_rate=0.5),
    "drop path, mish": lambda: narrow("resnet50", drop_path_rate=0.5, act_layer=nn.Mish),
    "drop block": lambda: narrow("resnet50", drop_block_rate=0.2),
    "drop block, basic": lambda: narrow("resnet18", drop_block_rate=0.2),
    "silu": lambda: narrow("resnet50", act_layer=nn.SiLU),
    "timm's own swish": lambda: narrow("resnet18", act_layer=layers.activations.Swish),
    "mish": lambda: narrow("resnet50", act_layer=nn.Mish),
    "leaky relu, another slope": lambda: narrow(
        "resnet18", act_layer=partial(nn.LeakyReLU, negative_slope=0.2)
    ),
    "dilated": lambda: narrow("resnet50", output_stride=8),
    "group norm": lambda: narrow("resnet50_gn", channels=(32, 64, 96, 128)),
    "norm that may have an activation": lambda: narrow(
        "resnet18", norm_layer=partial(layers.BatchNormAct2d, apply_act=False)
    ),
    "frozen norm": lambda: layers.freeze_batch_norm_2d(narrow("resnet50")),
    "selective kernel": lambda: narrow("skresnet18"),
    "selective kernel bottleneck": lambda: narrow("skresnet50"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_same_fused(name):
    model = NETWORKS[name]()
    fused = zoo.assert_same_network(model, zoo.images())
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(unfused, model)
    zoo.assert_same_state(unfused, model)


@pytest.mark.parametrize("name", ["resnet18", "seresnet50", "tiered stem", "drop path, se", "silu"])
def test_everything_is_fused(name):
    fused = fusedres.fuse(NETWORKS[name]())
    for mode in (True, False):
        assert zoo.unfused_reasons(fused.train(mode), zoo.images()) == set()


@pytest.mark.parametrize("name, module", [
    ("group norm", "GroupNorm"), ("eca", "EcaModule"), ("blur pool", "BlurPool2d"),
    ("mish", "Mish"), ("drop block", "DropBlock2d"), ("se with norm", "SEModule"),
])  # fmt: skip
def test_what_stays_unfused_says_why(name, module):
    reasons = zoo.unfused_reasons(fusedres.fuse(NETWORKS[name]()), zoo.images())
    assert any(module in reason for reason in reasons)


def test_compiles_into_one_graph():
    options = dict(attn_layer=layers.SEModule, drop_path=layers.DropPath(0.5))
    fused = fusedres.fuse(resnet.Bottleneck(16, 4, **options)).eval()
    x = zoo.images(2, 8, channels=16)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))
    compiled.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize("block", [
    senet.SEBottleneck, senet.SEResNetBottleneck, senet.SEResNeXtBottleneck, senet.SEResNetBlock
])  # fmt: skip
@pytest.mark.parametrize("projects", [False, True])
def test_legacy_senet_block(block, projects):
    planes = 32 // block.expansion
    downsample = nn.Sequential(nn.Conv2d(32, 32, 1, 2), nn.BatchNorm2d(32)) if projects else None
    groups = 1 if block is senet.SEResNetBlock else 2
    options = dict(base_width=16) if block is senet.SEResNeXtBottleneck else {}
    stride = 2 if projects else 1
    model = block(32, planes, groups, 4, stride, downsample, **options)
    zoo.assert_same_network(model, zoo.images(3, 9, channels=32))


def test_drop_path_draws_timms_random_numbers():
    model = narrow("resnet18", depth=(2, 2, 2, 2), drop_path_rate=0.9).train()
    fused = fusedres.fuse(model)
    x = zoo.images(8)
    torch.testing.assert_close(zoo.output(fused, x), zoo.output(model, x))
    kept = model.layer4[1].drop_path
    kept.scale_by_keep = False
    fused.layer4[1].drop_path.scale_by_keep = False
    torch.testing.assert_close(zoo.output(fused, x), zoo.output(model, x))


def test_gradient_checkpointing():
    model = narrow("resnet50").double()
    fused = fusedres.fuse(model)
    for network in (model, fused):
        network.set_grad_checkpointing()
    x = zoo.images().double()
    ours, ref = (zoo.train_step(network, x) for network in (fused, model))
    del ours["running statistics"], ref["running statistics"]  # PyTorch counts the batch twice
    torch.testing.assert_close(ours, ref)


def test_checkpointing_counts_running_statistics_once():
    model = fusedres.fuse(narrow("resnet50").double())
    checkpointed = fusedres.fuse(model)
    checkpointed.set_grad_checkpointing()
    x = zoo.images().double()
    ours, ref = (zoo.train_step(network, x) for network in (checkpointed, model))
    torch.testing.assert_close(ours, ref)


def test_features_only_and_intermediates():
    x = zoo.images(2)
    model = narrow("resnet50", features_only=True).eval()
    torch.testing.assert_close(fusedres.fuse(model)(x), model(x))
    model = narrow("seresnet50").eval()
    ours, ref = (m.forward_intermediates(x) for m in (fusedres.fuse(model), model))
    torch.testing.assert_close(ours, ref)


def test_head_can_be_changed_after_fusing():
    model = fusedres.fuse(narrow("resnet18"))
    model.reset_classifier(3)
    assert model(zoo.images(2)).shape == (2, 3)
    assert fusedres.unfuse(model)(zoo.images(2)).shape == (2, 3)


def test_zero_init_last():
    fused = fusedres.fuse(narrow("resnet50"))
    nn.init.ones_(fused.layer1[0].bn3.weight)
    fused.init_weights(zero_init_last=True)
    assert fused.layer1[0].bn3.weight.abs().max() == 0


def test_conv_norm_act_with_anti_aliasing():
    model = nn.Sequential(
        layers.ConvNormAct(3, 8, 3, act_layer=nn.SiLU),
        layers.ConvNormAct(8, 8, 3, stride=2, aa_layer=layers.BlurPool2d),
        layers.ConvNormAct(8, 4, 1, apply_act=False),
    )
    zoo.assert_same_network(model, zoo.images(2, 9))


def test_batch_norm_act_semantics():
    x = zoo.images(3, 5, channels=8)
    for options in (dict(momentum=None), dict(track_running_stats=False), dict(affine=False)):
        zoo.assert_same_network(layers.BatchNormAct2d(8, act_layer=nn.SiLU, **options), x)
    dropped = layers.BatchNormAct2d(8, drop_layer=partial(nn.Dropout2d, 0.5))
    zoo.assert_same_network(dropped, x)


def test_block_of_another_release_is_left_alone(monkeypatch):
    def forward(self, x):
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) * 0.5 + x)

    monkeypatch.setattr(resnet.BasicBlock, "forward", forward)
    model = narrow("resnet18")
    assert all("downsample" in name or not name for name in zoo.swapped(model))
