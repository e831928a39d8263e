"""residual_mix in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import test_residual_mix as mix
from cases import DTYPES, SHAPES, layouts, misaligned
from cuda_host import ORDERS
from cuda_ops import cases_of, cuda_on_host
from fusedres import reference
from fusedres.layout import pack_mask
from harness import Unchanged, assert_same_bits, assert_same_non_finite, gradients

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
FORWARD, BACKWARD = "residual_mix_fwd_kernel", "residual_mix_bwd_kernel"


@cases_of(mix.OPTIONS)
def test_values_and_gradients(case, dtype):
    options = mix.OPTIONS[case]
    tensors = mix.tensors_of(*SHAPES[case], dtype, **options)
    with cuda_on_host() as launched:
        mix.check_against_reference(tensors, options)
    assert launched == [FORWARD, BACKWARD]


@dtypes
@layouts
@pytest.mark.parametrize("gate", [False, True])
def test_misaligned_views_over_a_sentinel(gate, layout, dtype):
    """The accesses are as wide as the addresses allow: none is wider (UBSan), all are right."""
    tensors = mix.tensors_of((3, 16, 2, 4), layout, dtype, gate=gate)
    views, buffers = dict(tensors), []
    for name in ("branch", "shortcut") + ("gate",) * gate:
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(), Unchanged(*buffers):
        mix.check_against_reference(views)


@layouts
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_the_mask_is_the_references(act, layout):
    t = mix.tensors_of((2, 13, 5, 3), layout, torch.float32, rows=True)
    args = t["branch"], t["shortcut"], None, t["row_scale"], 1.0, 0.5, act
    with cuda_on_host():
        _, mask = torch.ops.fusedres.residual_mix(*args, True)
    _, z = reference.residual_mix(*args)
    assert min(z.abs().min(), (z - 6).abs().min()) > 1e-5  # else rounding decides
    assert torch.equal(mask, pack_mask(reference.activation_mask(z, act), like=t["branch"]))


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, layout):
    tensors = mix.tensors_of((2, 19, 3, 3), layout, torch.float32)
    tensors["branch"][1, 2, 1, 0] = value
    with cuda_on_host():
        out = gradients(mix.fused(), tensors, constants=mix.CONSTANTS)
    assert_same_non_finite(out, gradients(mix.plain(), tensors, constants=mix.CONSTANTS))


def test_same_bits_in_every_order():
    tensors = mix.tensors_of((3, 24, 7, 5), "NHWC", torch.bfloat16, gate=True, rows=True)
    found = []
    for order in ORDERS:
        with cuda_on_host(order=order):
            found.append(gradients(mix.fused(), tensors, constants=mix.CONSTANTS))
    for other in found[1:]:
        assert_same_bits(other, found[0])
