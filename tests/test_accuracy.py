"""The accuracy rule that verify and the tests of every op share."""

from __future__ import annotations

import pytest
import torch

import accuracy
from fusedres.report.accuracy import errors

EPS = torch.finfo(torch.float32).eps


def test_rule():
    ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -4.0 + 2**-10])
    out = torch.tensor([1.0 + 2**-9, -4.0])
    found = errors(out, ref, eager)
    norm = 17**0.5
    assert (found.max_error, found.max_eager) == (2**-9, 2**-10)
    assert found.max_bound == pytest.approx(2 * 2**-10 + 4 * EPS * 4, rel=1e-12)
    assert found.l2_error == pytest.approx(2**-9 / norm)
    assert found.l2_bound == pytest.approx(2 * 2**-10 / norm + 4 * EPS, rel=1e-12)
    assert found.ok and 0.9 < found.ratio < 1
    assert not errors(out, ref, ref.float()).ok
    assert not errors(ref.float() * (1 + 3 * 2**-10), ref, eager).ok
    sums = errors(out, ref, eager, gradient=True, count=100)
    assert sums.max_bound == pytest.approx(3 * 2**-10 + 4 * EPS * 10 * 4, rel=1e-12)
    assert errors(out, ref, [ref.float(), eager]) == found
    scaled = errors(out, ref, eager, scale=8.0)
    assert scaled.max_bound == pytest.approx(2 * 2**-10 + 4 * EPS * 8, rel=1e-12)
    assert scaled.l2_bound == pytest.approx((2 * 2**-10 + 4 * EPS * 8 * 2**0.5) / norm, rel=1e-12)


def test_rule_takes_the_l2_norm_as_well():
    ref = torch.zeros(1000, dtype=torch.float64)
    eager, out = ref.float(), ref.float()
    eager[0], out[:] = 1.0, 1.0
    found = errors(out, ref, eager)
    assert found.max_error <= found.max_bound and not found.ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rule_for_values_that_are_not_finite(value):
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    bad = torch.tensor([1.0, value])
    assert not errors(bad, ref, ref.float()).ok
    assert errors(bad, ref, bad).ok  # eager overflows there as well
    assert errors(bad, bad.double(), bad).ok
    assert not errors(ref.float(), bad.double(), bad).ok


def test_rule_for_integers_and_empty_tensors():
    one = torch.tensor(1)
    assert errors(one, one.double(), one).ok
    assert not errors(one + 1, one.double(), one).ok
    empty = torch.empty(0, 3)
    assert errors(empty, empty.double(), empty).ok
    with pytest.raises(ValueError, match=r"out: wanted ref's shape \(0, 3\), got \(2,\)"):
        errors(torch.ones(2), empty.double(), empty)


def test_one_rule_for_the_tests_and_for_verify():
    assert accuracy.errors is errors
