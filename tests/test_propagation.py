"""propagation: norms of signal and gradient, and the sums over identity mappings."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fusedres
from cases import randn
from fusedres.__main__ import main
from harness import Unchanged


class PreActBlock(nn.Module):
    """``x + conv(relu(bn(x)))``, an identity mapping (He et al. 2016b, figure 1)."""

    def __init__(self, channels: int, scale: float = 1.0, inplace: bool = False):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU(inplace=inplace)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.conv(self.act(self.norm(x)))


class ProjectionBlock(PreActBlock):
    def __init__(self, inplanes: int, planes: int):
        super().__init__(inplanes)
        self.shortcut = nn.Conv2d(inplanes, planes, 1)
        self.conv = nn.Conv2d(inplanes, planes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        return self.shortcut(h) + self.conv(h)


def test_norms_and_sums_are_those_of_the_formula():
    model = nn.Sequential(*(PreActBlock(6, inplace=i == 1) for i in range(3))).double()
    x = randn((2, 6, 5, 5), torch.float64)
    found = fusedres.propagation(model, x, loss=lambda y: y.square().sum())
    # The same network written out.
    values, branches = [x.clone().requires_grad_()], []
    for block in model:
        branches.append(block.conv(block.act(block.norm(values[-1]))))
        values.append(values[-1] + branches[-1])
    grads = torch.autograd.grad(values[-1].square().sum(), [*values[:3], *branches])
    assert [b.name for b in found.blocks] == ["0", "1", "2"]
    for i, block in enumerate(found.blocks):
        wanted = dict(x=values[i], f=branches[i], dx=grads[i], df=grads[3 + i])
        for name, t in wanted.items():
            assert getattr(block, name) == pytest.approx(t.norm().item(), rel=1e-12)
        assert block.kind == "identity"
        assert block.forward_error < 1e-15 and block.backward_error < 1e-14
    (run,) = found.runs
    assert run.blocks == ("0", "1", "2") and found.ok and run.ok
    assert 0 <= run.forward_error <= run.tolerance < 1e-12
    assert 0 < run.backward_error <= run.tolerance
    assert "x_L = x_l + sum F holds to" in str(found)


def test_projections_end_a_run():
    model = nn.Sequential(PreActBlock(4), PreActBlock(4), ProjectionBlock(4, 6), PreActBlock(6))
    found = fusedres.propagation(model, randn((2, 4, 5, 5)))
    assert [b.kind for b in found.blocks] == ["identity", "identity", "projection", "identity"]
    assert [r.blocks for r in found.runs] == [("0", "1"), ("3",)]
    assert found.ok


@pytest.mark.parametrize("kind", [fusedres.DenseBlock, torchvision.models.densenet._DenseBlock])
def test_a_dense_block_concatenates(kind):
    block = kind(3, 8, bn_size=2, growth_rate=4, drop_rate=0.0).double()
    model = nn.Sequential(block, nn.ReLU(inplace=True))
    x = randn((2, 8, 5, 5), torch.float64)
    found = fusedres.propagation(model, x, loss=lambda y: y.square().sum())
    start = x.clone().requires_grad_()
    y = block(start)
    dx, dy = torch.autograd.grad(y.relu().square().sum(), (start, y))
    (only,) = found.blocks
    assert (only.name, only.kind) == ("0", "concatenation")
    for name, t in dict(x=x, f=y[:, 8:], dx=dx, df=dy[:, 8:]).items():
        assert getattr(only, name) == pytest.approx(t.norm().item(), rel=1e-12)
    assert found.runs == () and "norms only" in str(found)


def test_a_dense_block_that_no_gradient_reaches():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = PreActBlock(8), fusedres.DenseBlock(2, 8, 2, 4, 0.0)
            self.script = torch.jit.script(nn.ReLU())

        def forward(self, x):
            return self.used(x), self.unused(self.script(x))

    found = fusedres.propagation(Heads(), randn((2, 8, 5, 5)), loss=lambda r: r[0].sum())
    used, unused = found.blocks
    assert (used.kind, unused.kind) == ("identity", "concatenation")
    assert unused.f > 0 and unused.dx == 0 and unused.df is None


def test_what_comes_between_blocks_ends_a_run():
    model = nn.Sequential(PreActBlock(4), nn.ReLU(), PreActBlock(4))
    found = fusedres.propagation(model, randn((2, 4, 5, 5)))
    assert [r.blocks for r in found.runs] == [("0",), ("2",)]


def test_a_scaled_shortcut_is_no_identity():
    """Equation 6: factors on the shortcut break the sum, and the tool must see it."""
    found = fusedres.propagation(nn.Sequential(PreActBlock(4, 0.5)), randn((2, 4, 5, 5)))
    assert found.blocks[0].kind == "other" and not found.runs
    assert "no block is an identity mapping, so there is no sum to check" in str(found)


@pytest.mark.parametrize("models", [fusedres.models, torchvision.models])
def test_resnets_apply_an_activation_after_the_sum(models):
    model = models.resnet18(num_classes=5)
    before = [p.grad for p in model.parameters()]
    x, state = torch.randn(2, 3, 32, 32), torch.get_rng_state()
    with Unchanged(model, x):
        found = fusedres.propagation(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.grad for p in model.parameters()] == before
    assert [b.name for b in found.blocks] == [f"layer{i}.{j}" for i in range(1, 5) for j in (0, 1)]
    assert {b.kind for b in found.blocks} == {"post-activation"}
    assert all(b.x > 0 and b.f > 0 and b.dx > 0 and b.df > 0 for b in found.blocks)
    assert not found.runs and found.ok


def test_fused_and_plain_networks_give_the_same_figures():
    ours, theirs = fusedres.models.resnet18(), torchvision.models.resnet18()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    found = [fusedres.propagation(m.eval(), x) for m in (ours, theirs)]
    for a, b in zip(*(f.blocks for f in found), strict=True):
        for name in ("x", "f", "dx", "df"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3)


def layers(kind: type[nn.Module], norm_first: bool) -> nn.Module:
    layer = kind(8, 2, 16, 0.0, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("model,x", [
    (nn.Sequential(fusedres.Highway(8), fusedres.Highway(8)), torch.randn(4, 8)),
    (layers(fusedres.TransformerEncoderLayer, norm_first=False), torch.randn(3, 2, 8)),
], ids=["highway", "post-norm transformer"])  # fmt: skip
def test_other_architectures(model, x):
    found = fusedres.propagation(model, x)
    assert [b.kind for b in found.blocks] == ["other", "other"] and not found.runs
    assert all(b.x > 0 and b.f > 0 and b.dx > 0 for b in found.blocks)


@pytest.mark.parametrize("kind", [fusedres.TransformerEncoderLayer, nn.TransformerEncoderLayer])
def test_a_pre_norm_transformer_layer_adds_twice(kind):
    model, x = layers(kind, norm_first=True).double(), randn((3, 2, 8), torch.float64)
    found = fusedres.propagation(model, x)
    assert [b.kind for b in found.blocks] == ["identity", "identity"]
    (run,) = found.runs
    assert run.ok and run.forward_error < 1e-15 and run.backward_error < 1e-14
    f = model.layers[0](x) - x
    assert found.blocks[0].f == pytest.approx(f.norm().item(), rel=1e-12)


@pytest.mark.parametrize("scaling,kinds", [
    (dict(channels=4, init=0.3), ["identity", "identity"]),
    (dict(init=1.0, shortcut=0.5), ["projection", "projection"]),
], ids=["LayerScale", "x / L"])  # fmt: skip
def test_a_scaled_branch_is_added(scaling, kinds):
    blocks = [
        fusedres.PreActBasicBlock(4, 4, residual_scale=fusedres.ResidualScale(**scaling))
        for _ in kinds
    ]
    x, state = randn((2, 4, 5, 5)), torch.get_rng_state()
    found = fusedres.propagation(nn.Sequential(*blocks), x)
    assert [b.kind for b in found.blocks] == kinds and found.ok
    assert len(found.runs) == (kinds[0] == "identity")
    assert all(run.backward_error is not None for run in found.runs)
    plain = fusedres.unfuse(blocks[0])
    f = plain(x) - scaling.get("shortcut", 1.0) * x
    assert found.blocks[0].f == pytest.approx(f.norm().item(), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shortcut_module_that_does_nothing():
    class Block(PreActBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x) + self.conv(self.act(self.norm(x)))

    block = Block(4)
    block.shortcut = nn.Identity()
    with torch.inference_mode():
        found = fusedres.propagation(block, randn((2, 4, 5, 5)))
    assert found.blocks[0].kind == "identity" and found.runs[0].blocks == ("(model)",)
    assert found.ok and found.runs[0].backward_error is not None


def test_blocks_of_ones_own_choice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    found = fusedres.propagation(model, torch.randn(3, 4), blocks=lambda name, m: name == "1")
    assert [b.name for b in found.blocks] == ["1"]


def test_errors():
    with pytest.raises(TypeError, match="model: wanted a torch.nn.Module, got str"):
        fusedres.propagation("resnet50")
    with pytest.raises(
        ValueError, match="model: wanted residual blocks, found none in Linear; blocks="
    ):
        fusedres.propagation(nn.Linear(3, 3), torch.zeros(2, 3))


def test_plot_and_command_line(tmp_path, capsys):
    path = tmp_path / "out.svg"
    arguments = ["propagation", "resnet18", "--size", "32", "--plot", str(path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "layer4.1" in printed and "|F(x)|" in printed
    assert printed.endswith(f"written to {path}\n")
    assert "resnet18, float32: signal and gradient" in path.read_text()  # texts are comments too
    with pytest.raises(SystemExit) as error:
        main(["propagation", "resnet17"])
    assert error.value.code == 2
    assert main([*arguments[:-1], str(tmp_path / "no" / "out.svg")]) == 2


def test_the_sums_hold_in_a_pre_activation_network():
    found = fusedres.propagation(fusedres.models.preact_resnet18(), torch.randn(2, 3, 32, 32))
    assert [b.kind for b in found.blocks] == ["identity"] * 2 + ["projection", "identity"] * 3
    assert [len(run.blocks) for run in found.runs] == [2, 1, 1, 1]
    assert found.ok and all(run.backward_error is not None for run in found.runs)
