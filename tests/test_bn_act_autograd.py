"""bn_act: derivatives of every order, PyTorch's opcheck, compilers."""

from __future__ import annotations

import pytest
import torch

import fusedres
from cases import channels, layouts, randn
from fusedres import reference
from harness import check, check_derivatives
from test_bn_act import CONSTANTS, fused, plain, tensors_of


@pytest.mark.parametrize("backend,layout,act,training", [
    ("native", "NHWC", "relu", True), ("native", "NCHW", "relu", True),
    ("native", "NHWC", "gelu", True), ("native", "NCHW", "relu6", False),
    ("native", "NHWC", "silu", False), ("reference", "NHWC", "relu", True),
])  # fmt: skip
def test_derivatives(backend, layout, act, training):
    tensors = tensors_of((3, 3, 2, 2), layout, torch.float64, training=training)
    with fusedres.backend(backend):
        check_derivatives(fused(act), tensors, CONSTANTS)


@pytest.mark.parametrize("backend,layout,act", [
    ("native", "NHWC", "relu"), ("native", "NCHW", "silu"), ("reference", "NHWC", "relu"),
])  # fmt: skip
def test_opcheck(backend, layout, act):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32)
    leaves = [t[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]
    mask = act == "relu"
    with fusedres.backend(backend):
        args = *leaves, None, None, True, 1e-5, act, mask
        torch.library.opcheck(torch.ops.fusedres.bn_act, args)
        stats = channels(5), channels(5, low=0.5)
        args = t["x"], None, None, None, *stats, False, 1e-5, act, False
        torch.library.opcheck(torch.ops.fusedres.bn_act, args)
        torch.library.opcheck(torch.ops.fusedres.bn_stats, (t["x"].detach(),))


@layouts
def test_opcheck_of_the_backward(layout):
    x, dy = randn((2, 5, 3, 3), layout=layout), randn((2, 5, 3, 3), layout=layout)
    mean, var = reference.bn_stats(x)
    no_mask = torch.empty(0, dtype=torch.uint8)
    args = dy, x, channels(5), channels(5), x.clone(), mean, var, no_mask, True, 1e-5, "silu", True
    torch.library.opcheck(torch.ops.fusedres.bn_act_backward, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("layout", ["NHWC"])
def test_compile(layout, compiler):
    tensors = tensors_of((2, 6, 5, 5), layout, torch.float32)
    compiled = torch.compile(fused(), fullgraph=True, backend=compiler)
    check(compiled, plain(), tensors, sums=dict(weight=50, bias=50))
