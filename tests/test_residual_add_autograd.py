"""residual_add under autograd, torch.library's checks and torch.compile."""

from __future__ import annotations

import pytest
import torch

import fusedres
from cases import backends, channels, layouts, randn
from fusedres import reference
from harness import check, check_derivatives
from test_residual_add import CONSTANTS, EPS, SIDE_EPS, fused, tensors_of


@pytest.mark.parametrize("backend,layout,options", [
    ("native", "NHWC", dict(act="relu")), ("native", "NCHW", dict(act="relu6", rows=1)),
    ("native", "NHWC", dict(act="gelu", a="running", b="batch", rows="C")),
    ("native", "NCHW", dict(act="identity", a="scaled", b="scaled")),
    ("native", "NHWC", dict(act="identity", a=None, b=None, rows=1)),
    ("reference", "NHWC", dict(act="relu", rows="C")),
])  # fmt: skip
def test_derivatives(backend, layout, options):
    tensors = tensors_of((3, 3, 2, 2), layout, torch.float64, **options)
    with fusedres.backend(backend):
        check_derivatives(fused(**options), tensors, CONSTANTS)


@backends
def test_second_derivatives_where_no_operand_is_kept(backend):
    x, shortcut, scale = (torch.randn(3, 2, 2, 2).double() for _ in range(3))

    def public(x, shortcut):
        return fusedres.functional.residual_add(x, shortcut, scale=scale[:, 0, 0, 0], act="relu")

    with fusedres.backend(backend):
        check_derivatives(public, dict(x=x, shortcut=shortcut))


@backends
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_second_derivatives_of_operands_made_from_one_another(act, backend):
    def gated(x, w):
        scale = torch.sigmoid(x.mean((2, 3)) @ w)
        return fusedres.functional.residual_add(x * 2, x, scale=scale, act=act)

    def normed(x, w):
        branch = (x.flatten(2).transpose(1, 2) @ w).transpose(1, 2).unflatten(2, x.shape[2:])
        return fusedres.functional.batch_norm_act(
            branch, None, None, training=True, residual=x, act=act
        )

    tensors = dict(x=torch.randn(3, 4, 2, 2).double(), w=torch.randn(4, 4).double())
    with fusedres.backend(backend):
        check_derivatives(gated, tensors)
        check_derivatives(normed, tensors)


@pytest.mark.parametrize("backend,layout,act", [
    ("native", "NHWC", "relu"), ("native", "NCHW", "silu"), ("reference", "NHWC", "relu"),
])  # fmt: skip
def test_opcheck(backend, layout, act):
    t = tensors_of((3, 5, 3, 3), layout, torch.float32, a="running", b="running", rows=1)
    graded = "x", "weight", "bias", "shortcut", "shortcut_weight", "shortcut_bias", "scale"
    t |= {n: t[n].requires_grad_() for n in graded}
    tensors = [t[n] for n in ("x", "weight", "bias", "mean", "var")]
    tensors += [t[f"shortcut{n}"] for n in ("", "_weight", "_bias", "_mean", "_var")]
    with fusedres.backend(backend):
        for batch, mask, stats in ((True, act == "relu", True), (False, False, False)):
            args = *tensors, t["scale"], batch, batch, EPS, SIDE_EPS, act, mask, stats
            torch.library.opcheck(torch.ops.fusedres.residual_add, args)


@layouts
def test_opcheck_of_the_backward(layout):
    t = tensors_of((3, 5, 3, 3), layout, torch.float32, a="running", b="running", rows="C")
    tensors = [t[n] for n in ("x", "weight", "bias", "mean", "var")]
    tensors += [t[f"shortcut{n}"] for n in ("", "_weight", "_bias", "_mean", "_var")]
    no_mask = torch.empty(0, dtype=torch.uint8)
    dy = randn((3, 5, 3, 3), layout=layout)
    for sums in (True, False):
        args = (
            dy,
            *tensors,
            t["scale"],
            no_mask,
            sums,
            sums,
            EPS,
            SIDE_EPS,
            "silu",
            sums,
            sums,
            True,
        )
        torch.library.opcheck(torch.ops.fusedres.residual_add_backward, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    tensors = dict(
        x=randn((3, 6, 5, 5), layout="NHWC"), shortcut=randn((3, 6, 5, 5), layout="NHWC"),
        weight=channels(6), scale=torch.tensor([0.0, 1.5, 1.5]),
    )  # fmt: skip

    def public(x, shortcut, weight, scale):
        return fusedres.functional.residual_add(x, shortcut, weight=weight, scale=scale, act="relu")

    def eager(x, shortcut, weight, scale):
        maps = (weight, None, None, None, False, 0.0), (None,) * 4 + (False, 0.0)
        return reference.residual_add(x, maps[0], shortcut, maps[1], scale[:, None], "relu")[0]

    compiled = torch.compile(public, fullgraph=True, backend=compiler)
    check(compiled, eager, tensors, sums=dict(weight=75, scale=150))
