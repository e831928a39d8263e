"""Plain blocks and networks, for comparison: ``residual=False``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
import zoo
from cases import randn
from modules import PLAIN_BLOCKS, check_module, randomise

X = (8, 16, 7, 7)


@pytest.mark.parametrize("name", ["BasicBlock", "SEBottleneck"])
def test_a_plain_block_is_its_branch_alone(name):
    planes = 16 if "Basic" in name else 4
    fused = getattr(fusedres, name)(16, planes, residual=False)
    plain = PLAIN_BLOCKS[name](16, planes)
    plain.load_state_dict(randomise(fused).state_dict())

    class Branch(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            zero = torch.zeros_like(x)
            b = self.block
            b.downsample = lambda _: zero
            return b(x)

    class Same(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x)

    check_module(Same(fused), Branch(plain), randn(X, layout="NHWC"), steps=2)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnet18", "resnext50_32x4d"])
def test_a_plain_network_has_no_shortcuts(name):
    with torch.device("meta"):
        model = getattr(fusedres.models, name)(num_classes=3, residual=False)
    assert not any("downsample" in n for n in model.state_dict())


NETWORKS = {
    "basic": dict(block=fusedres.BasicBlock),
    "squeeze_excite": dict(block=fusedres.SEBasicBlock),
    "grouped": dict(block=fusedres.Bottleneck, groups=32, width_per_group=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_network_in_training(name):
    """A stage with a block of its own and one behind it, the others with their first."""
    model = fusedres.models.ResNet(
        layers=[2, 1, 1, 1], num_classes=3, residual=False, **NETWORKS[name]
    )
    x = zoo.images(2, 33)
    with torch.no_grad():
        assert zoo.unfused_reasons(model, x) == set()
    ours, plain = (zoo.train_step(m.double(), x.double()) for m in (model, fusedres.unfuse(model)))
    torch.testing.assert_close(ours, plain)
