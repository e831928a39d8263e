"""fuse and unfuse on torchvision's networks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchvision import models, ops
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.quantization.resnet import QuantizableBasicBlock, QuantizableResNet

import fusedres
import zoo
from accuracy import assert_as_accurate_as_eager

# name: (constructor, modules that fuse exchanges)
NETWORKS = {
    "resnet18": (lambda: models.resnet18(num_classes=10), 12),
    "resnet50": (lambda: models.resnet50(num_classes=10), 21),
    "resnext": (lambda: small(resnet.Bottleneck, groups=32, width_per_group=4), 9),
    "wide_resnet": (lambda: small(resnet.Bottleneck, width_per_group=128), 9),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(num_classes=10), 101),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), 55),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), 82),
    "dilated": (
        lambda: small(resnet.Bottleneck, replace_stride_with_dilation=[False, True, True]),
        9,
    ),
    "group_norm": (lambda: small(norm_layer=lambda c: nn.GroupNorm(4, c)), 5),
    "instance_norm": (lambda: small(norm_layer=nn.InstanceNorm2d), 5),
    "frozen_norm": (lambda: small(norm_layer=ops.FrozenBatchNorm2d), 8),
}


def small(block=resnet.BasicBlock, layers=(1, 1, 1, 1), **kwargs) -> nn.Module:
    return resnet.ResNet(block, list(layers), num_classes=10, **kwargs)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_same_fused(name):
    build, exchanged = NETWORKS[name]
    model = build()
    fused = zoo.assert_same_network(model, zoo.images())
    assert len(zoo.swapped(model)) == exchanged
    zoo.assert_same_classes(fusedres.unfuse(fused), model)
    zoo.assert_same_state(fusedres.unfuse(fused), model)


def test_everything_in_a_resnet_is_fused():
    fused = fusedres.fuse(models.resnet50(num_classes=10))
    for mode in (True, False):
        assert zoo.unfused_reasons(fused.train(mode), zoo.images()) == set()


def test_regnet_runs_one_chain_per_run_of_convolutions():
    names = zoo.swapped(models.regnet_y_400mf(num_classes=10))
    assert {"stem", "trunk_output.block1.block1-0", "trunk_output.block1.block1-0.f.se"} <= {*names}


def test_stem_and_identity_of_the_blocks():
    model = small()
    fused = fusedres.fuse(model)
    assert isinstance(fused, resnet.ResNet)
    assert isinstance(fused.layer1[0], resnet.BasicBlock)
    assert type(fused).__name__ == "ResNet" and "FusedBasicBlock" in repr(fused)
    assert fusedres.unfuse(fused).__dict__.keys() == model.__dict__.keys()


def test_zero_init_residual_survives():
    model = small(zero_init_residual=True)
    fused = fusedres.fuse(model)
    assert all(block[0].bn2.weight.abs().max() == 0 for block in (fused.layer1, fused.layer4))
    zoo.assert_same_network(model, zoo.images())


def test_zero_init_finds_fused_blocks():
    fused = fusedres.fuse(small())
    found = [m for m in fused.modules() if isinstance(m, resnet.BasicBlock)]
    assert len(found) == 4


class OwnForward(resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


class OwnWidth(resnet.BasicBlock):
    """A subclass that changes something else than the forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "mine"


class OwnScale(ops.SqueezeExcitation):
    def _scale(self, input):
        return super()._scale(input) + 1


def test_subclass_with_its_own_forward_is_left_alone():
    model = small(OwnForward)
    assert zoo.swapped(model) == ["", *(f"layer{i}.0.downsample" for i in (2, 3, 4))]
    zoo.assert_same_network(model, zoo.images())


def test_subclass_without_a_forward_is_fused():
    fused = fusedres.fuse(small(OwnWidth))
    assert isinstance(fused.layer1[0], OwnWidth) and fused.layer1[0].note == "mine"
    assert "layer1.0" in zoo.swapped(small(OwnWidth))


def test_squeeze_excite_with_its_own_scale_is_left_alone():
    with pytest.raises(ValueError, match="OwnScale"):
        fusedres.fuse(OwnScale(8, 4))


@pytest.mark.parametrize(
    "act, gate, fused",
    [
        (nn.ReLU, nn.Sigmoid, True),
        (nn.SiLU, nn.Hardsigmoid, True),
        (nn.Tanh, nn.Sigmoid, False),
        (nn.ReLU, nn.Softsign, False),
    ],
)
def test_squeeze_excite_wherever_it_stands(act, gate, fused):
    model = nn.ModuleDict({"se": ops.SqueezeExcitation(8, 4, act, gate)})["se"]
    if not fused:
        with pytest.raises(ValueError, match="SqueezeExcitation"):
            fusedres.fuse(model)
        return
    zoo.assert_same_network(model, zoo.images(2, 5, channels=8))
    one = zoo.images(1, 5, channels=8)[0]  # no batch dimension: torchvision's own code
    torch.testing.assert_close(fusedres.fuse(model)(one), model(one), rtol=0, atol=0)


def test_quantizable_network_is_left_alone():
    model = QuantizableResNet(QuantizableBasicBlock, [1, 1, 1, 1], num_classes=10)
    assert all("downsample" in name for name in zoo.swapped(model))


def test_hooks_inside_and_on_a_block():
    model = small()
    seen = []
    for name in ("layer1.0", "layer1.0.bn1", "layer2.0.relu", "layer2.0.downsample", "conv1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, result, name=name: seen.append((name, result.clone()))
        )
    x = zoo.images(2)
    model.eval()(x)
    expected, seen[:] = sorted(seen, key=lambda s: s[0]), []
    fusedres.fuse(model, inplace=True)(x)
    got = sorted(seen, key=lambda s: s[0])
    assert [name for name, _ in got] == [name for name, _ in expected]
    torch.testing.assert_close([t for _, t in got], [t for _, t in expected])


def test_hook_can_change_a_result():
    model = small().eval()
    model.layer1[0].bn1.register_forward_hook(lambda module, args, result: result + 1)
    zoo.assert_same_network(model, zoo.images())


def test_removed_branch_runs_as_in_torchvision():
    model = small()
    model.layer1[0].bn1 = nn.Identity()
    model.layer2[0].relu = nn.Tanh()
    model.layer3[0].conv2 = nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect")
    zoo.assert_same_network(model, zoo.images())


def test_feature_extraction():
    model = small().eval()
    x = zoo.images(2)
    for network in (model, fusedres.unfuse(fusedres.fuse(model)), fusedres.fuse(model)):
        extractor = create_feature_extractor(network, {"layer2.0.relu": "a", "layer4": "b"})
        torch.testing.assert_close(
            extractor(x), create_feature_extractor(model, {"layer2.0.relu": "a", "layer4": "b"})(x)
        )


def test_detection_backbone():
    model = small().eval()
    fused = fusedres.fuse(model)
    x = zoo.images(2)
    getters = [IntermediateLayerGetter(m, {"layer2": "c3", "layer4": "c5"}) for m in (model, fused)]
    torch.testing.assert_close(getters[0](x), getters[1](x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", ["residual", "regnet", "squeeze-excite"])
def test_autocast(block, train):
    # The input stays float32: the blocks differ in the dtype that the shortcut's addition gives.
    model = {
        "residual": lambda: resnet.BasicBlock(8, 8),
        "regnet": lambda: models.regnet.ResBottleneckBlock(
            8, 8, 1, nn.BatchNorm2d, nn.ReLU, 4, se_ratio=0.25
        ),
        "squeeze-excite": lambda: ops.SqueezeExcitation(8, 4),
    }[block]()
    x = zoo.images(2, 7, channels=8)
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        ours = fusedres.fuse(model).train(train)(x)
        eager = model.train(train)(x)
    assert_as_accurate_as_eager(ours, exact.train(train)(x.double()), eager, name=block)


def test_checkpoint_file_goes_both_ways():
    trained, fresh = small(), fusedres.fuse(small())
    for source, target in ((trained, fresh), (fusedres.fuse(trained), small())):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        torch.testing.assert_close(target.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_training_goes_on_with_the_same_optimizer():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fused = fusedres.fuse(model, inplace=True)
    assert fused is model
    before = copy.deepcopy(model.conv1.weight.detach())
    fused.train()(zoo.images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.conv1.weight)
    assert int(model.bn1.num_batches_tracked) == 1
