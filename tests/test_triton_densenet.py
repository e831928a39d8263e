"""A dense block and its steps on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_as_accurate_as_eager
from cases import arrange, channels, layouts, randn
from fusedres import triton_kernels
from fusedres.ops import dense_buffer
from harness import assert_same_bits, assert_same_format, poison_free_memory
from modules import check_module
from test_densenet import block_pair
from triton_cases import devices, executions, gpu, many_programs, to, triton_on  # noqa: F401

# A buffer [N, LD, H, W], how many of its channels a layer reads or wrote, and from where on.
CASES = {
    "odd": ((2, 17, 7, 5), "NCHW", 11, 3),
    "odd_nhwc": ((3, 13, 5, 3), "NHWC", 5, 7),
    "vectors_nhwc": ((2, 64, 6, 4), "NHWC", 32, 16),
    "all_of_it": ((2, 9, 4, 4), "NCHW", 9, 0),
    "one_channel_nhwc": ((2, 3, 4, 5), "NHWC", 1, 2),
    "one_image_nhwc": ((1, 24, 5, 5), "NHWC", 16, 8),
    "1x1": ((6, 20, 1, 1), "NCHW", 7, 10),
}


def tensors_of(shape, layout, count, dtype):
    n, _, *rest = shape
    tensors = dict(buffer=randn(shape, dtype, layout), dbuffer=randn(shape, dtype, layout))
    for name in ("x", "dh", "h"):
        tensors[name] = arrange(randn((n, count, *rest), dtype), layout)
    for name in ("means", "vars", "q", "r"):
        tensors[name] = channels(shape[1], low=-1, high=1)
    for name, low, high in (("mean", -1, 1), ("var", 0.5, 2), ("weight", -1, 1), ("bias", -1, 1)):
        tensors[name] = channels(count, low=low, high=high)
    return tensors


def steps(ops, t, count: int, start: int, plain: bool) -> dict[str, torch.Tensor]:
    """What the four steps make of one slice each, and of what they change in place.

    Args:
        plain: without statistics of the batch, weight and bias.
    """
    weight, bias = (None, None) if plain else (t["weight"], t["bias"])
    statistics, deferred = (t["means"], t["vars"]), (t["q"], t["r"])
    if plain:
        statistics = deferred = None, None
    norm = t["mean"], t["var"], weight, bias
    ops.load(t["h"], t["buffer"], *norm, 1e-5)
    finished = ops.finish(
        t["dbuffer"], t["buffer"], t["mean"], t["weight"], t["bias"], start, count
    )
    sums = ops.grad(t["dbuffer"], *deferred, t["dh"], t["buffer"], *norm, 1e-5)
    ops.store(t["buffer"], t["x"], *statistics, start)
    changed = {"y": t["h"], "buffer": t["buffer"], "means": t["means"], "vars": t["vars"]}
    gradients = {"dfinished": finished, "dx": t["dbuffer"], "dq": t["q"], "dr": t["r"]}
    return changed | gradients | dict(zip(("dw", "db"), sums, strict=True))


class Fused:
    store, load = dense_buffer.store_op, dense_buffer.load_op
    finish, grad = dense_buffer.finish_op, dense_buffer.grad_op


class Plain:
    store, load = staticmethod(dense_buffer._store), staticmethod(dense_buffer._load)
    finish, grad = staticmethod(dense_buffer._finish), staticmethod(dense_buffer._grad)


def check_steps(case, device, dtype, plain=False) -> list[str]:
    shape, layout, count, start = CASES[case]
    tensors = tensors_of(shape, layout, count, dtype)
    doubles = {n: t.double() for n, t in tensors.items()}
    copies = {n: t.clone() for n, t in tensors.items()}
    on_device = to(device, tensors)
    poison_free_memory(on_device)
    with triton_on(device), triton_kernels.counted() as launched:
        out = steps(Fused, on_device, count, start, plain)
    eager, ref = (steps(Plain, t, count, start, plain) for t in (copies, doubles))
    pixels = shape[0] * shape[2] * shape[3]
    for name, value in out.items():
        sums = pixels if name in ("dw", "db", "dq", "dr", "means", "vars") else 1
        assert_same_format(value, eager[name])
        assert_as_accurate_as_eager(
            value.cpu(), ref[name], eager[name], gradient=name[0] == "d", count=sums, name=name
        )
    untouched = "x", "dh", "mean", "var", "weight", "bias"
    assert_same_bits({n: on_device[n].cpu() for n in untouched}, {n: copies[n] for n in untouched})
    return launched


LOAD, FINISH, STORE = "dense_load_kernel", "dense_finish_kernel", "dense_store_kernel"
GRAD = "dense_grad_kernel", "dense_grad_merge_kernel"
STATISTICS = "bn_stats_merge_kernel"


@executions
@pytest.mark.parametrize("case", CASES)
def test_steps(case, device, dtype):
    assert check_steps(case, device, dtype) == [LOAD, FINISH, *GRAD, STORE, STATISTICS]


@devices
@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize("case", ["odd", "odd_nhwc"])
@pytest.mark.parametrize("plain", [False, True])
def test_chunks_of_pixels(case, plain, device):
    launched = check_steps(case, device, torch.float32, plain)
    assert launched == [LOAD, FINISH, *GRAD, STORE] + [STATISTICS] * (not plain)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@layouts
def test_densenets_own_shape(layout, dtype, monkeypatch):
    monkeypatch.setitem(CASES, "densenet", ((32, 256, 56, 56), layout, 224, 64))
    check_steps("densenet", "cuda", dtype)


@devices
@layouts
def test_a_block_in_training(layout, device):
    """Two layers load in the forward and again in the backward; the input is finished as well."""
    fused, plain = (m.to(device) for m in block_pair(6, 2, 3))
    x = randn((2, 6, 4, 3), layout=layout).to(device)
    with triton_on(device), triton_kernels.counted() as launched:
        check_module(fused, plain, x)
    assert [launched.count(name) for name in (STORE, LOAD, GRAD[0], FINISH)] == [3, 4, 2, 3]


@devices
def test_a_block_in_inference(device):
    fused, plain = (m.eval().to(device) for m in block_pair(6, 2, 3))
    x = randn((2, 6, 4, 3), layout="NHWC").to(device)
    with triton_on(device), torch.no_grad(), triton_kernels.counted() as launched:
        check_module(fused, plain, x, graded=False)
    assert launched == [STORE, *[LOAD, "conv_bn_act_fwd_kernel", STORE] * 2]


def test_slices_that_do_not_fit_are_refused_by_name():
    x, v, new = randn((2, 6, 3, 3)), torch.ones(4), randn((2, 4, 3, 3))
    before = x.clone()
    with triton_on("cpu"):
        with pytest.raises(ValueError, match="wanted some of the buffer's 6, got 0 to 7"):
            dense_buffer.load_op(randn((2, 7, 3, 3)), x, *[torch.ones(7)] * 4, 1e-5)
        with pytest.raises(ValueError, match=r"dh: wanted torch.float32 \(2, 4, 3, 3\), got"):
            dense_buffer.grad_op(x, None, None, randn((2, 4, 3, 2)), x, v, v, v, v, 1e-5)
        with pytest.raises(ValueError, match="dh: wanted the buffer's memory layout"):
            dh = arrange(new, "NHWC")
            dense_buffer.grad_op(x, None, None, dh, x, v, v, v, v, 1e-5)
        with pytest.raises(
            ValueError, match=r"q: wanted contiguous torch.float32, \[4\] or longer"
        ):
            dense_buffer.grad_op(x, v[:3], v, new, x, v, v, v, v, 1e-5)
        with pytest.raises(
            ValueError, match=r"mean: wanted contiguous torch.float32, \[6\] or long"
        ):
            dense_buffer.store_op(x, new, v, v, 2)
    assert_same_bits({"x": x}, {"x": before})
