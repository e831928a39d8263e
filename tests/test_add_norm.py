"""add_norm: residual add, dropout, drop path and the norm behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import stochastic_depth

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import backends, channels, executions, misaligned, parameter_dtype, randn, sliced
from fusedres import observers, reference
from fusedres.ops.add_norm import backward_bytes_moved, bytes_moved
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_non_finite,
    check,
    gradients,
)  # fmt: skip

# Shape, how many of the last dimensions are normalised, and what happens to the branch.
CASES = {
    "tokens": ((3, 7, 48), 1, {}),
    "odd": ((5, 3, 37), 1, dict(dropout=0.3)),
    "three_columns": ((6, 4, 3), 1, {}),
    "one_token": ((1, 1, 33), 1, dict(dropout=0.5)),
    "matrix": ((19, 64), 1, dict(drop_path=0.4)),
    "two_dimensions": ((2, 5, 3, 17), 2, dict(dropout=0.1)),
    "sequence_first": ((9, 4, 24), 1, dict(drop_path=0.5, batch_dim=1)),
    "both": ((4, 5, 40), 1, dict(dropout=0.2, drop_path=0.25)),
    "more_than_a_tile": ((1100, 16), 1, dict(dropout=0.1)),
    "long_rows": ((3, 2500), 1, {}),
    "bert": ((2, 128, 768), 1, dict(dropout=0.1)),
}


def tensors_of(shape, dims, dtype, *, norm="layer", param=None):
    param = param or parameter_dtype(dtype)
    size = shape[len(shape) - dims :]
    n = torch.Size(size).numel()
    return dict(
        x=randn(shape, dtype),
        residual=randn(shape, dtype),
        weight=None if norm == "none" else channels(n, param, low=0.5, high=1.5).view(size),
        bias=channels(n, param).view(size) if norm == "layer" else None,
    )


def fused(norm="layer", **drops):
    """Both results as one tensor, so that each has a gradient."""

    def fn(x, residual, weight, bias):
        torch.manual_seed(3)
        options = dict(training=True, **drops)
        if norm == "none":
            return fusedres.functional.dropout_add(x, residual, **options)
        if norm == "rms":
            found = fusedres.functional.add_rms_norm(x, residual, weight.shape, weight, **options)
        else:
            found = fusedres.functional.add_layer_norm(
                x, residual, weight.shape, weight, bias, **options
            )
        return torch.stack(found)

    return fn


def plain(norm="layer", dropout=0.0, drop_path=0.0, batch_dim=0):
    def fn(x, residual, weight, bias):
        torch.manual_seed(3)
        if dropout:
            x = F.dropout(x, dropout)
        if drop_path:
            x = stochastic_depth(x.transpose(0, batch_dim), drop_path, "row")
            x = x.transpose(0, batch_dim)
        total = residual + x
        if norm == "none":
            return total
        w, b = (None if p is None else p.to(reference.acc_dtype(x.dtype)) for p in (weight, bias))
        if norm == "rms":
            eps = torch.finfo(torch.float32).eps
            y = F.rms_norm(total.to(w.dtype), w.shape, w, eps).to(x.dtype)
        else:
            y = F.layer_norm(total.to(w.dtype), w.shape, w, b).to(x.dtype)
        return torch.stack([y, total])

    return fn


def check_against_eager(tensors, norm, drops):
    cols = 1 if tensors["weight"] is None else tensors["weight"].numel()
    rows = max(1, tensors["x"].numel() // cols)
    return check(
        fused(norm, **drops), plain(norm, **drops), tensors, sums=dict(weight=rows, bias=rows)
    )


@executions
@pytest.mark.parametrize("case", CASES)
def test_layer_norm(case, backend, dtype):
    shape, dims, drops = CASES[case]
    with fusedres.backend(backend):
        check_against_eager(tensors_of(shape, dims, dtype), "layer", drops)


@executions
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("case", ["both", "long_rows", "more_than_a_tile"])
def test_other_norms(case, norm, backend, dtype):
    shape, dims, drops = CASES[case]
    tensors = tensors_of(shape, dims, dtype, norm=norm)
    options = {} if norm == "none" else dict(eps=torch.finfo(torch.float32).eps)
    run = fused(norm, **drops, **options)
    rows = tensors["x"].numel() // (tensors["x"].shape[-1])
    with fusedres.backend(backend):
        check(run, plain(norm, **drops), tensors, sums=dict(weight=rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_default_eps_of_rms_norm_is_pytorchs(dtype):
    """On values so small that it is what the result is made of."""
    x = randn((6, 20), dtype) * 2.0**-10
    found, _ = fusedres.functional.add_rms_norm(x, torch.zeros_like(x), 20)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eager, ref = F.rms_norm(x, (20,)), F.rms_norm(x.double(), (20,), eps=eps)
    assert_as_accurate_as_eager(found, ref, eager)


@backends
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(param, backend):
    tensors = tensors_of((4, 6, 24), 1, torch.bfloat16, param=param)
    with fusedres.backend(backend):
        out = check_against_eager(tensors, "layer", {})
    assert out["dweight"].dtype == out["dbias"].dtype == param


@backends
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_operands_of_two_dtypes(dtypes, backend):
    x, residual = (randn((3, 5, 24), d) for d in dtypes)
    with fusedres.backend(backend):
        y, total = fusedres.functional.add_layer_norm(x, residual, 24)
    assert torch.equal(total, x + residual)
    assert y.dtype == torch.float32


@backends
@pytest.mark.parametrize("view_of", [misaligned, sliced])
def test_views_over_a_sentinel(view_of, backend):
    tensors = tensors_of((3, 6, 21), 1, torch.float32)
    views, buffers = dict(tensors), []
    for name in ("x", "residual", "weight", "bias"):
        views[name], buffer = view_of(tensors[name])
        buffers.append(buffer)
    with fusedres.backend(backend), Unchanged(*buffers):
        run, eager = fused(dropout=0.2), plain(dropout=0.2)
        check(run, eager, views, sums=dict(weight=18, bias=18))


@backends
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty_batch(shape, backend):
    tensors = tensors_of(shape, 1, torch.float32)
    with fusedres.backend(backend):
        out = gradients(fused(dropout=0.1, drop_path=0.1), tensors)
    assert out["y"].shape == (2, *shape) and out["dx"].shape == shape
    assert out["dweight"].tolist() == out["dbias"].tolist() == [0.0] * 8


@backends
@pytest.mark.parametrize("dropout,drop_path", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_everything_dropped(dropout, drop_path, backend):
    x, residual = randn((3, 4, 8)), randn((3, 4, 8))
    with fusedres.backend(backend):
        y = fusedres.functional.dropout_add(
            x, residual, dropout=dropout, drop_path=drop_path, training=True
        )
    assert torch.equal(y, residual)


def test_a_generator_of_ones_own():
    x, residual = randn((4, 5, 16)), randn((4, 5, 16))
    drops = dict(dropout=0.5, drop_path=0.5, training=True)
    ys = [
        fusedres.functional.dropout_add(
            x, residual, **drops, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])
    state = torch.get_rng_state()
    fusedres.functional.dropout_add(x, residual, **drops, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize("change,error,message", [
    (dict(input=X.long()), TypeError, "input: wanted a floating-point tensor, got torch.int64"),
    (dict(residual=None), TypeError, "residual: wanted a tensor, got NoneType"),
    (dict(residual=X[:1]), ValueError, r"residual: wanted shape \(2, 3, 8\).*got \(1, 3, 8\)"),
    (dict(normalized_shape=7), ValueError, r"input: wanted shape \[..., 7\], got \(2, 3, 8\)"),
    (dict(normalized_shape=()), ValueError, "input: wanted shape"),
    (dict(normalized_shape=torch.ones(8)), TypeError, "normalized_shape: wanted a whole number or several, got a tensor"),
    (dict(weight=torch.ones(3)), ValueError, r"weight: wanted shape \(8,\), got \(3,\)"),
    (dict(bias=torch.ones(8, device="meta")), RuntimeError, "bias: expected all tensors to be on the same device"),
    (dict(eps=-1.0), ValueError, "eps: wanted a number >= 0, got -1.0"),
    (dict(dropout=1.5), ValueError, "dropout: wanted a probability from 0 to 1, got 1.5"),
    (dict(drop_path=-0.1), ValueError, "drop_path: wanted a probability from 0 to 1, got -0.1"),
    (dict(drop_path=0.1, batch_dim=2), ValueError, "batch_dim: wanted a number from 0 to 1, got 2"),
])  # fmt: skip
def test_errors(change, error, message):
    arguments = dict(input=X, residual=X, normalized_shape=8, training=True) | change
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fusedres.functional.add_layer_norm(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_same_bits_at_any_thread_count(norm):
    tensors = tensors_of((700, 48), 1, torch.bfloat16, norm=norm)
    assert_same_at_any_thread_count(fused(norm, dropout=0.1), tensors)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, backend):
    for name in ("x", "residual"):
        tensors = tensors_of((4, 5, 19), 1, torch.float32)
        tensors[name][1, 2, 3] = value
        with fusedres.backend(backend):
            out = gradients(fused(dropout=0.2), tensors)
        assert_same_non_finite(out, gradients(plain(dropout=0.2), tensors))


def test_bytes_moved():
    x = torch.empty(16, 16)  # 1024 bytes
    keep = torch.ones(16, 16, dtype=torch.bool)
    args = x, x, None, None, keep, None, 2.0, 1e-5, "layer"
    assert bytes_moved(*args) == 4 * 1024 + 256  # RR + WW, one byte an element
    events = []
    with observers.observe(events.append):
        _, total, mean, rstd = torch.ops.fusedres.add_norm(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("add_norm", 4 * 1024 + 256)]
    assert events[0].eager_bytes == (3 + 2 + 6) * 1024
    args = total, x, x, None, mean, rstd, keep, None, 2.0, "layer"
    assert backward_bytes_moved(*args) == 5 * 1024 + 256  # RRR + WW
