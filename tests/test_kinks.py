"""Derivatives on either side of a kink: what rounding can do to a gradient, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.report.kinks import Kinks

IN_PLACE = {
    "function": lambda z: F.relu(z),
    "module": lambda z: nn.ReLU()(z),
    "method": lambda z: z.relu(),
    "module in place": lambda z: nn.ReLU(inplace=True)(z * 1),
    "in place, by position": lambda z: F.relu(z * 1, True),
    "method in place": lambda z: (z * 1).relu_(),
}


def sides(fn, z: Tensor, other: Tensor) -> list[list[float]]:
    """fn's derivative at z, and on either side of it, when ``other`` was recorded."""
    kinks = Kinks()
    with kinks.recording():
        fn(other.clone())
    z = z.clone().requires_grad_()
    with kinks.moving():
        y = fn(z)
    assert torch.equal(y, fn(z.detach()))
    found = []
    for sign in (0, 1, -1):
        with kinks.side(sign):
            found.append(torch.autograd.grad(y.sum(), z, retain_graph=True)[0].tolist())
    return found


@pytest.mark.parametrize("fn", IN_PLACE.values(), ids=IN_PLACE)
def test_only_units_within_rounding_change_sides(fn):
    z = torch.tensor([-1.0, -1e-8, 0.0, 1e-8, 1.0], dtype=torch.float64)
    assert sides(fn, z, z + 2e-8) == [[0, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    exact = [0, 0, 0, 1, 1]
    assert sides(fn, z, z) == [exact, exact, exact]


def test_in_place_functions_still_write_their_input():
    kinks = Kinks()
    with kinks.recording(), torch.no_grad():
        for fn in (nn.ReLU(inplace=True), torch.relu_, lambda z: F.relu6(z, True)):
            z = torch.tensor([-1.0, 1.0])
            assert fn(z) is z and z.tolist() == [0, 1]


def test_other_kinks():
    z = torch.tensor([-1e-8, 3.0, 6 + 1e-8, 7.0], dtype=torch.float64)
    assert sides(nn.ReLU6(), z, z + 2e-8) == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    pixels = torch.tensor([[[[1.0, 1 + 1e-9], [0.0, 0.5]]]], dtype=torch.float64)
    _, one, other = sides(nn.MaxPool2d(2), pixels, pixels + 1e-6)
    picked = [[[[1, 0], [0, 0]]]], [[[[0, 1], [0, 0]]]]
    assert sorted((one, other)) == sorted(picked)
