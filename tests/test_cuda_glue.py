"""From tensors to launches: csrc/cuda/*.cu as ops, their kernels on the host simulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

import test_bn_act as bn
import test_bn_se_act as bn_se
import test_residual_mix as mix
import test_squeeze_excite as se
from cases import SHAPES, randn
from cuda_glue import glue_on_host, ops, simulated
from harness import Unchanged
from test_native import BAD

OPS = {"bn_act": bn, "squeeze_excite": se, "bn_se_act": bn_se, "residual_mix": mix}
CASES = ("odd", "odd_nhwc", "1x1")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPS)
def test_an_op_is_as_accurate_as_eager(name, case, dtype):
    module, options = OPS[name], OPS[name].OPTIONS[case]
    known = {k: v for k, v in options.items() if module is not bn or k != "act"}
    tensors = module.tensors_of(*SHAPES[case], dtype, **known)
    with glue_on_host():
        module.check_against_reference(tensors, options["act"] if module is bn else options)


@pytest.mark.parametrize("name,args,message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_its_own_checks(name, args, message):
    """The messages of the CPU's implementation, word for word."""
    args = tuple(args)
    with Unchanged(*(a for a in args if isinstance(a, torch.Tensor))):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            getattr(ops(), name)(*args)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_parameters_of_any_dtype_and_strides(layout):
    """They are read in the accumulator's dtype: what a copy made beforehand gives, to the bit."""
    x = randn((2, 5, 4, 3), torch.bfloat16, layout)
    weight = torch.randn(10, dtype=torch.bfloat16)[::2]
    others = torch.randn(5, dtype=torch.float64), None, None, None, True, 1e-5, "relu", False
    found = ops().bn_act(x, weight, *others)
    wanted = ops().bn_act(x, weight.float().contiguous(), others[0].float(), *others[1:])
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 0, 4, 4), (2, 5, 0, 4)], ids=str)
def test_an_empty_tensor_is_returned_at_once(shape):
    x, c = torch.empty(shape), shape[1]
    w1, w2, b = torch.randn(2, c), torch.randn(c, 2), torch.randn(c)
    y, mean, var, mask = ops().bn_act(x, b, b, x, None, None, True, 1e-5, "relu", True)
    assert y.shape == x.shape and not mean.any() and not var.any() and not mask.numel()
    _, mean, var, _ = ops().bn_act(x, b, b, x, b, b + 1, False, 1e-5, "relu", False)
    assert torch.equal(mean, b) and torch.equal(var, b + 1)
    back = ops().bn_act_backward(x, x, b, b, None, mean, var, mask, True, 1e-5, "relu", True)
    assert back[0].shape == x.shape and not any(t.any() for t in back[1:3])
    y, *saved = ops().squeeze_excite(x, w1, None, w2, b, x, "relu", "sigmoid", "relu", False)
    assert y.shape == x.shape and not any(t.any() for t in saved)
    back = ops().squeeze_excite_backward(
        x, x, w1, w2, None, *saved, "relu", "sigmoid", "relu", False
    )
    assert [t.shape for t in back[1:5]] == [(2, c), (2,), (c, 2), (c,)]
    assert not any(t.any() for t in back[1:5])
    y, mask = ops().residual_mix(x, x, None, None, 1.0, 1.0, "relu", True)
    assert y.shape == x.shape


def test_every_launch_is_counted():
    """fusedres.explain asks how many kernels a thread has launched; the simulator lists them."""
    simulator = simulated()
    simulator.sim_take_launched.restype = ctypes.c_char_p
    x, b = randn((2, 16, 8, 8), torch.float32, "NHWC"), torch.randn(16)
    w1, w2 = torch.randn(4, 16), torch.randn(16, 4)
    gated = x, w1, None, w2, None, None, "relu", "sigmoid", "relu", False
    calls = {
        "residual_mix": (x, x, None, None, 1.0, 1.0, "relu", True),
        "bn_act": (x, b, b, x, b, b.abs(), False, 1e-5, "relu", True),
        "squeeze_excite": tuple(t.double() if isinstance(t, torch.Tensor) else t for t in gated),
    }
    found = {}
    for name, args in calls.items():
        simulator.sim_take_launched()
        before = ops().cuda_launches()
        getattr(ops(), name)(*args)
        found[name] = ops().cuda_launches() - before
        assert found[name] == len(simulator.sim_take_launched().splitlines())
    # float64 takes the streaming passes: statistics, image sums, two layers, apply
    assert found == {"residual_mix": 1, "bn_act": 2, "squeeze_excite": 5}
    with pytest.raises(RuntimeError):
        ops().bn_stats(torch.empty(2, 3, dtype=torch.int32))
    assert ops().cuda_launches() == before + found["squeeze_excite"]
