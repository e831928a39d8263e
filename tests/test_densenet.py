"""DenseLayer, DenseBlock, Transition and DenseNet against torchvision's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet as peer

import fusedres
from cases import arrange, backends, layouts, randn
from fusedres import observers
from harness import Unchanged, assert_same_bits
from modules import assert_as_accurate, check_module, compare, parameter_gradients, results, twins

# Input, layers, growth rate, format.
CASES = {
    "odd": ((2, 5, 7, 5), 3, 3, "NCHW"),
    "odd_nhwc": ((3, 7, 5, 3), 4, 5, "NHWC"),
    "one_layer": ((2, 8, 6, 6), 1, 4, "NHWC"),
    "1x1": ((6, 4, 1, 1), 3, 2, "NCHW"),
    "one_channel": ((2, 1, 4, 5), 2, 1, "NHWC"),
    "one_image_nhwc": ((1, 16, 9, 9), 3, 16, "NHWC"),
    "vectors": ((2, 32, 14, 14), 3, 32, "NCHW"),
    "vectors_nhwc": ((2, 32, 14, 14), 3, 32, "NHWC"),
}


def block_pair(channels, layers=3, growth=4, bn_size=2, drop_rate=0.0):
    options = dict(bn_size=bn_size, growth_rate=growth, drop_rate=drop_rate)
    return twins(
        fusedres.DenseBlock(layers, channels, **options),
        peer._DenseBlock(layers, channels, **options),
    )


@backends
@pytest.mark.parametrize("case", CASES)
def test_block_in_training(case, backend):
    shape, layers, growth, layout = CASES[case]
    fused, plain = block_pair(shape[1], layers, growth)
    with fusedres.backend(backend):
        check_module(fused, plain, randn(shape, layout=layout), steps=3)


@layouts
@pytest.mark.parametrize("frugal", [False, True])
def test_block_in_float64(frugal, layout):
    """To twelve digits: what no rounding explains would show here."""
    fused, plain = (m.double() for m in block_pair(17, 4, 5))
    for layer in fused.values():  # torchvision counts a batch twice where it is frugal
        layer.memory_efficient = frugal
    x = randn((3, 17, 6, 5), torch.float64, layout)
    ours, eager = (results(m, x) for m in (fused, plain))
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layouts
def test_block_in_reduced_precision(layout, dtype):
    torch.manual_seed(1)  # with seed 0 a rounding of float16 flips a ReLU, in one execution only
    fused, plain = (m.to(dtype) for m in block_pair(16, 3, 8))
    check_module(fused, plain, randn((2, 16, 6, 6), dtype, layout))


@pytest.mark.parametrize("graded", [True, False])
@layouts
def test_block_with_running_statistics(layout, graded):
    fused, plain = (m.eval() for m in block_pair(12, 3, 5))
    with torch.set_grad_enabled(graded):
        check_module(fused, plain, randn((2, 12, 6, 7), layout=layout), graded=graded)


def test_one_frozen_layer_in_a_training_block():
    fused, plain = block_pair(8)
    for m in (fused, plain):
        m.denselayer2.norm1.eval()
        m.denselayer3.norm2.eval()
    check_module(fused, plain, randn((4, 8, 6, 6), layout="NHWC"), steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@layouts
def test_autocast(layout, dtype):
    """A float32 input makes every concatenation float32; in a network it is bfloat16."""
    fused, plain = block_pair(16, 3, 8)
    x, truth = randn((2, 16, 6, 6), dtype, layout), copy.deepcopy(plain).double()
    with torch.autocast("cpu", torch.bfloat16):
        found = [results(m, x) for m in (fused, plain)]
    ref = results(truth, x.double())
    assert found[0]["y"].dtype == found[1]["y"].dtype == dtype
    y, eager = ({"y": r["y"].bfloat16()} for r in found)
    assert_as_accurate(y, {"y": ref["y"]}, eager, count=72)


def test_derivatives():
    fused, _ = block_pair(3, 2, 2)
    fused.double()
    x = randn((2, 3, 3, 3), torch.float64, "NHWC").requires_grad_()
    parameters = dict(fused.named_parameters())

    def of(x, *values):
        return torch.func.functional_call(fused, dict(zip(parameters, values, strict=True)), (x,))

    inputs = x, *(p.detach().requires_grad_() for p in parameters.values())
    torch.autograd.gradcheck(of, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(of, inputs, fast_mode=True)


@layouts
def test_opcheck(layout):
    buffer, dbuffer = (randn((2, 9, 4, 5), layout=layout) for _ in "xd")
    mean, var, weight, bias = (torch.rand(6) + 0.5 for _ in range(4))
    dh = randn((2, 6, 4, 5), layout=layout)
    check = torch.library.opcheck
    q, r = torch.rand(9), torch.rand(9)
    norm = mean, var, weight, None
    check(torch.ops.fusedres.dense_store, (buffer, dh, q, r, 3))
    check(torch.ops.fusedres.dense_store, (buffer, dh, None, None, 0))
    check(torch.ops.fusedres.dense_load, (dh.clone(), buffer, *norm, 1e-5))
    check(torch.ops.fusedres.dense_grad, (dbuffer, q, r, dh, buffer, *norm, 1e-5))
    check(torch.ops.fusedres.dense_grad, (dbuffer, None, None, dh, buffer, *norm, 1e-5))
    check(torch.ops.fusedres.dense_finish, (dbuffer, buffer, mean, weight, bias, 2, 6))


@backends
@layouts
@pytest.mark.parametrize("shape", [(0, 4, 5, 5)], ids=str)
def test_empty_batch(shape, layout, backend):
    fused, plain = (m.eval() for m in block_pair(4))
    with fusedres.backend(backend):
        y, eager = (m(randn(shape, layout=layout)) for m in (fused, plain))
    assert y.shape == eager.shape


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_counts_a_batch_once(use_reentrant):
    fused, _ = block_pair(8)
    x = randn((2, 8, 6, 6))
    found = []
    for run in (lambda m, t: m(t), lambda m, t: checkpoint(m, t, use_reentrant=use_reentrant)):
        module, leaf = copy.deepcopy(fused), x.clone().requires_grad_()
        run(module, leaf).square().sum().backward()
        found.append(
            {"dx": leaf.grad, **parameter_gradients(module), **dict(module.named_buffers())}
        )
    assert_same_bits(*found)


def test_same_bits_at_any_thread_count():
    fused, _ = block_pair(32, 2, 16)
    x = randn((4, 32, 14, 14), layout="NHWC")
    found = []
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        found.append(results(copy.deepcopy(fused), x))
    # The convolutions are oneDNN's, whose sums may depend on the number of threads.
    again = results(copy.deepcopy(fused), x)
    assert_same_bits(found[2], again)
    for other in found[1:]:
        assert_same_bits({"y": other["y"]}, {"y": found[0]["y"]})


def test_layers_and_lists_of_features():
    fused = fusedres.DenseLayer(12, 4, 2, 0.0)
    fused, plain = twins(fused, peer._DenseLayer(12, 4, 2, 0.0))
    check_module(fused, plain, randn((2, 12, 5, 5), layout="NHWC"), steps=2)
    parts = list(randn((2, 12, 5, 5)).split([5, 7], 1))
    assert torch.equal(fused.eval()(parts), fused(torch.cat(parts, 1)))


@layouts
@pytest.mark.parametrize("training", [True, False])
def test_transition(training, layout):
    pair = twins(fusedres.Transition(12, 6), peer._Transition(12, 6))
    fused, plain = (m.train(training) for m in pair)
    check_module(fused, plain, randn((2, 12, 7, 6), layout=layout), steps=2)


@pytest.mark.parametrize("what", ["dropout", "hook", "group norm", "wrapper", "frozen"])
def test_what_cannot_be_fused_runs_layer_by_layer(what):
    pair = block_pair(8, growth=4, drop_rate=0.5 if what == "dropout" else 0.0)
    calls, events = [], []
    for m in pair:
        layer = m.denselayer2
        if what == "hook":
            layer.norm2.register_forward_hook(lambda *_: calls.append(1))
        if what == "group norm":
            layer.norm1 = nn.GroupNorm(4, 12)
        if what == "wrapper":
            layer.conv1 = nn.Sequential(layer.conv1)
        if what == "frozen":
            layer.conv1.weight.requires_grad_(False)
    x = randn((4, 8, 6, 6))

    def run(module, x):
        torch.manual_seed(2)
        return results(module, x)

    with observers.observe(events.append):
        compare(run, *pair, x)
    unfused = [e for e in events if e.op == "dense_block" and e.backend == "unfused"]
    assert bool(unfused) == (what != "frozen")
    assert len(calls) == (3 if what == "hook" else 0)


def test_compile_and_trace():
    fused, plain = block_pair(6, 2)
    x = randn((2, 6, 5, 5), layout="NHWC")
    traced = torch.fx.symbolic_trace(copy.deepcopy(fused))
    check_module(traced, copy.deepcopy(plain), x)
    fused.compile(fullgraph=True, backend="aot_eager")
    check_module(fused, plain, x)


def test_torch_func():
    fused, plain = block_pair(6, 2)
    x = randn((2, 6, 5, 5))

    def loss(module):
        return lambda p: torch.func.functional_call(module, p, (x,)).square().mean()

    grads = [torch.func.grad(loss(m.eval()))(dict(m.named_parameters())) for m in (fused, plain)]
    torch.testing.assert_close(*grads)


def test_errors_change_nothing():
    fused, plain = block_pair(8)
    for x in (randn((2, 7, 5, 5)), randn((1, 8, 1, 1)), randn((2, 8, 5, 5)).long()):
        for module in (fused, plain):
            with pytest.raises((RuntimeError, ValueError)) as error:
                module(x)
            if module is fused:
                message = str(error.value)
        assert message == str(error.value)
    before = copy.deepcopy(fused)
    with Unchanged(before), pytest.raises(ValueError, match="drop_rate: wanted a probability"):
        fusedres.DenseLayer(8, 4, 4, 1.5)


def test_input_format_does_not_matter():
    fused, plain = block_pair(8)
    x = randn((7, 8, 5, 4)).transpose(0, 3).contiguous().transpose(0, 3)
    check_module(fused, plain, arrange(x, "NHWC"))
    check_module(fused, plain, x)


def test_a_batch_of_gradients():
    fused = fusedres.DenseBlock(2, 16, 2, 8, 0.0).double()
    plain = fusedres.unfuse(copy.deepcopy(fused))
    x, found = randn((2, 16, 5, 5)).double(), []
    for block in (fused, plain):
        found.append(
            torch.autograd.functional.jacobian(
                lambda x, block=block: block(x)[1, 14:19, 2, 3], x, vectorize=True
            )
        )
    torch.testing.assert_close(*found)


def test_a_tensor_of_a_subclass_stays_one():
    class Labelled(torch.Tensor):
        pass

    y = fusedres.DenseBlock(2, 16, 2, 8, 0.0)(randn((2, 16, 5, 5)).as_subclass(Labelled))
    assert type(y) is Labelled
