"""Wide ResNet for small images against the paper, written out in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedres
import zoo
from modules import randomise, results


class PaperWideResNet(nn.Module):
    """WRN-n-k written from the paper: B(3, 3) blocks, dropout between the convolutions."""

    def __init__(self, depth: int, k: int, classes: int, dropout: float):
        super().__init__()
        widths, n = [16, 16 * k, 32 * k, 64 * k], (depth - 4) // 6
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.plan, self.p = [], dropout
        for stage in range(3):
            for i in range(n):
                cin = widths[stage] if i == 0 else widths[stage + 1]
                out, stride = widths[stage + 1], 2 if i == 0 and stage > 0 else 1
                self.plan.append(cin != out)
                if cin != out:
                    self.convs.append(nn.Conv2d(cin, out, 1, stride, bias=False))
                self.norms.append(nn.BatchNorm2d(cin))
                self.convs.append(nn.Conv2d(cin, out, 3, stride, 1, bias=False))
                self.norms.append(nn.BatchNorm2d(out))
                self.convs.append(nn.Conv2d(out, out, 3, 1, 1, bias=False))
        self.last, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        convs, norms = iter(self.convs), iter(self.norms)
        x = self.first(x)
        for projects in self.plan:
            projection = next(convs) if projects else None
            h = torch.relu(next(norms)(x))
            shortcut = x if projection is None else projection(h)
            h = torch.relu(next(norms)(next(convs)(h)))
            h = torch.dropout(h, self.p, self.training)
            x = shortcut + next(convs)(h)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def wide_pair(dropout: float = 0.0):
    ours = fusedres.models.WideResNet(10, 2, num_classes=4, dropout=dropout)
    paper = PaperWideResNet(10, 2, 4, dropout)
    randomise(ours)
    for a, b in zip(list_of(ours), list_of(paper), strict=True):
        b.load_state_dict(a.state_dict())
    return ours, paper


def list_of(model: nn.Module) -> list[nn.Module]:
    """Convolutions, then norms, in the order of both; the classifier."""
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.Linear
    return [m for kind in kinds for m in model.modules() if type(m) is kind]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_wide_resnet_is_the_papers(dropout):
    ours, paper = (m.double() for m in wide_pair(dropout))
    x = zoo.images(4, 16).double()
    found = []
    for m in (ours, paper):
        torch.manual_seed(3)
        state = results(m.train(), x)
        by_module = [dict(layer.named_parameters()) for layer in list_of(m)]
        found.append([state["y"], *(p.grad for ps in by_module for p in ps.values())])
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), paper.eval()(x))


@pytest.mark.parametrize("name,millions", [("wide_resnet28_10", 36.5), ("wide_resnet40_2", 2.2)])
def test_wide_resnets_have_the_papers_parameters(name, millions):
    """Zagoruyko and Komodakis 2016, table 5."""
    with torch.device("meta"):
        model = getattr(fusedres.models, name)()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
