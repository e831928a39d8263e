"""lstm_cell: the op, and ResidualLSTMCell against nn.LSTMCell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedres
from cases import backends, executions, randn
from fusedres import reference
from fusedres.ops.lstm_cell import backward_bytes_moved, bytes_moved
from harness import (
    assert_same_at_any_thread_count,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
    same_bits,
)  # fmt: skip
from modules import compare

CASES = {
    "odd": ((5, 37), True),
    "one_unit": ((4, 1), False),
    "vectors": ((8, 64), True),
    "no_forget_gate": ((3, 33), False),
    "one_row": ((1, 512), True),
}


def tensors_of(shape, forget, dtype):
    n, h = shape
    return dict(gates=randn((n, (4 if forget else 3) * h), dtype) * 2, c=randn(shape, dtype))


def fused(forget=True):
    def fn(gates, c):
        return torch.stack(fusedres.functional.lstm_cell(gates, c, forget_gate=forget))

    return fn


def plain(forget=True):
    def fn(gates, c):
        return torch.stack(reference.lstm_cell(gates, c, forget))

    return fn


@executions
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, backend, dtype):
    shape, forget = CASES[case]
    with fusedres.backend(backend):
        check(fused(forget), plain(forget), tensors_of(shape, forget, dtype))


@pytest.mark.parametrize("result", [0, 1])
def test_gradient_of_one_result(result):
    tensors = tensors_of((5, 20), True, torch.float32)
    check(lambda **t: fused()(**t)[result], lambda **t: plain()(**t)[result], tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_into_saturation(dtype):
    """Arguments where exp overflows or vanishes, and where tanh is its argument."""
    values = torch.tensor([0.0, 1e-30, 1e-6, 0.3, 20.0, 88.0, 89.0, 104.0, 745.0, 1e5], dtype=dtype)
    values = torch.cat([values, -values])
    h, c = reference.lstm_cell(values.repeat(1, 4), values[None] * 0, True)
    out = fusedres.functional.lstm_cell(values.repeat(1, 4), values[None] * 0)
    for found, wanted in zip(out, (h, c), strict=True):
        error = (found - wanted).abs() / wanted.abs().clamp_min(torch.finfo(dtype).tiny)
        assert error.max() <= 8 * torch.finfo(dtype).eps


@backends
@pytest.mark.parametrize("forget", [True, False])
def test_derivatives(forget, backend):
    with fusedres.backend(backend):
        check_derivatives(fused(forget), tensors_of((3, 4), forget, torch.float64))


def test_opcheck_and_compile():
    t = tensors_of((4, 6), True, torch.float32)
    args = t["gates"].clone().requires_grad_(), t["c"].clone().requires_grad_(), True
    torch.library.opcheck(torch.ops.fusedres.lstm_cell, args)
    args = t["gates"], t["c"], randn((4, 6)), None, True
    torch.library.opcheck(torch.ops.fusedres.lstm_cell_backward, args)
    check(torch.compile(fused(), fullgraph=True, backend="aot_eager"), plain(), t)


def test_same_bits_at_any_thread_count():
    assert_same_at_any_thread_count(fused(), tensors_of((64, 300), True, torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value):
    tensors = tensors_of((4, 19), True, torch.float32)
    tensors["gates"][1, 2] = tensors["c"][2, 3] = value
    assert_same_non_finite(gradients(fused(), tensors), gradients(plain(), tensors))


def test_bytes_moved():
    gates, c = torch.empty(16, 64), torch.empty(16, 16)  # c: 1024 bytes
    assert bytes_moved(gates, c, True) == 7 * 1024  # RRRR (gates) R + WW
    assert backward_bytes_moved(gates, c, c, None, True) == 11 * 1024


# --- the module


class Sequence(nn.Module):
    """A cell over the steps of a sequence [L, N, I]: every h, and the last c."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, xs: Tensor) -> Tensor:
        state, hs = None, []
        for x in xs:
            state = self.cell(x, state)
            hs.append(state[0])
        return torch.stack([*hs, state[1]])


def results(module: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    xs = xs.detach().requires_grad_()
    module.zero_grad()
    y = module(xs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "dx": xs.grad} | {
        f"d{n}": p.grad for n, p in module.named_parameters()
    }


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_against_lstm_cell(bias, dtype, backend):
    plain_cell = nn.LSTMCell(11, 13, bias=bias, dtype=dtype)
    cell = fusedres.ResidualLSTMCell(11, 13, bias=bias, dtype=dtype)
    assert list(cell.state_dict()) == list(plain_cell.state_dict())
    cell.load_state_dict(plain_cell.state_dict())
    with fusedres.backend(backend):
        compare(results, Sequence(cell), Sequence(plain_cell), randn((6, 4, 11), dtype))


def test_initialisation_is_lstm_cells():
    cells = []
    for kind in (fusedres.ResidualLSTMCell, nn.LSTMCell):
        torch.manual_seed(4)
        cells.append(kind(5, 7).state_dict())
    assert all(same_bits(cells[0][n], cells[1][n]) for n in cells[1])


class ResidualCell(nn.Module):
    """The original cell (Hochreiter and Schmidhuber 1997) on PyTorch's modules."""

    def __init__(self, cell: fusedres.ResidualLSTMCell):
        super().__init__()
        for name, p in cell.named_parameters():
            setattr(self, name, nn.Parameter(p.detach().clone()))

    def forward(self, x, state):
        if state is None:
            state = (x.new_zeros(len(x), self.weight_hh.shape[1]),) * 2
        h, c = state
        linear = nn.functional.linear
        gates = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        i, g, o = gates.chunk(3, 1)
        c = c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_forget_gate(dtype):
    cell = fusedres.ResidualLSTMCell(9, 6, forget_gate=False, dtype=dtype)
    compare(results, Sequence(cell), Sequence(ResidualCell(cell)), randn((5, 3, 9), dtype))


def test_the_state_is_an_identity_mapping():
    """With the input gate closed the state goes through all steps unchanged, and its gradient."""
    cell = fusedres.ResidualLSTMCell(4, 3, forget_gate=False)
    with torch.no_grad():
        cell.weight_ih[:3] = cell.weight_hh[:3] = 0
        cell.bias_ih[:3] = -300
    c = randn((2, 3)).requires_grad_()
    h, state = torch.zeros(2, 3), c
    for x in randn((7, 2, 4)):
        h, state = cell(x, (h, state))
    assert torch.equal(state, c)
    assert torch.equal(torch.autograd.grad(state.sum(), c)[0], torch.ones(2, 3))


def test_unbatched_and_autocast():
    plain_cell, cell = nn.LSTMCell(5, 7), fusedres.ResidualLSTMCell(5, 7)
    cell.load_state_dict(plain_cell.state_dict())
    x = randn((5,))
    for found, wanted in zip(cell(x), plain_cell(x), strict=True):
        torch.testing.assert_close(found, wanted)
    state = torch.zeros(2, 7), torch.zeros(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = cell(randn((2, 5)), state)
    assert h.dtype == c.dtype == torch.float32


@pytest.mark.parametrize("forget_gate", [True, False])
def test_a_symbolic_trace_sees_pytorchs_functions(forget_gate):
    cell = fusedres.ResidualLSTMCell(5, 7, forget_gate=forget_gate)
    traced = torch.fx.symbolic_trace(nn.Sequential(cell))
    assert not any("fusedres" in str(node.target) for node in traced.graph.nodes)
    for x in (randn((3, 5)), randn((5,))):
        torch.testing.assert_close(traced(x), cell(x))


def test_types_are_named():
    with pytest.raises(TypeError, match="input_size: wanted a whole number, got '8'"):
        fusedres.ResidualLSTMCell("8", 4)
    with pytest.raises(TypeError, match="input: wanted dtype torch.float32 .the weight's., got"):
        fusedres.ResidualLSTMCell(5, 4)(torch.zeros(2, 5).double())


@pytest.mark.parametrize("call,message", [
    (lambda cell: cell(torch.zeros(2, 4)), r"input: wanted shape \[N, 5\] or \[5\], got \(2, 4\)"),
    (lambda cell: cell(torch.zeros(2, 1, 5)), "input: wanted shape"),
    (lambda cell: cell(torch.zeros(2, 5), (torch.zeros(2, 7), torch.zeros(3, 7))), r"hx\[1\]: wanted shape \(2, 7\), got \(3, 7\)"),
    (lambda cell: fusedres.ResidualLSTMCell(0, 3), "input_size: wanted a number >= 1, got 0"),
    (lambda cell: fusedres.functional.lstm_cell(torch.zeros(2, 9), torch.zeros(2, 3)), r"gates: wanted shape \(2, 12\), got \(2, 9\)"),
    (lambda cell: fusedres.functional.lstm_cell(torch.zeros(2, 9), torch.zeros(3)), "c: wanted 2 dimensions"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(fusedres.ResidualLSTMCell(5, 7))


def test_explain_and_verify():
    model = Sequence(fusedres.ResidualLSTMCell(6, 8))
    xs = randn((3, 4, 6))
    rows = fusedres.explain(model, xs).rows
    assert [r.backend for r in rows if r.op == "lstm_cell"] == ["native"] * 3
    assert fusedres.verify(model, xs, train=True).ok
