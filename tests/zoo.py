"""Running other libraries' networks, and the check that a fused one is still the same network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fusedres
from accuracy import assert_as_accurate_as_eager
from fusedres import observers


def images(n: int = 2, size: int = 64, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The network's result as one tensor; random layers draw the same numbers each time."""
    torch.manual_seed(1)
    y = model(x)
    for field in ("logits", "pooler_output"):  # transformers
        y = getattr(y, field, y)
    return y


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Result and running statistics of a step in training mode; in float64 also gradients."""
    x = x.clone().requires_grad_(x.dtype == torch.float64)
    y = output(model.train(), x)
    state = {"output": y.detach()}
    if x.dtype == torch.float64:
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        (y * weight).sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        state |= named | {"input": x.grad}
    buffers = [b.flatten() for b in model.buffers() if b.is_floating_point()]
    state["running statistics"] = torch.cat([*buffers, y.new_zeros(0)]).detach()
    return state


def assert_same_network(model: nn.Module, x: Tensor) -> nn.Module:
    """Fuse ``model`` and compare training steps and inference with it; returns the fused one.

    Gradients are compared in float64: in float32 a rounding can flip a ReLU deep in a network, and
    then no two executions agree, PyTorch's own included.
    """
    plain, fused = copy.deepcopy(model), fusedres.fuse(model)
    plain64, fused64 = copy.deepcopy(plain).double(), copy.deepcopy(fused).double()
    assert_same_state(plain, fused)
    ref, ours = train_step(plain64, x.double()), train_step(fused64, x.double())
    torch.testing.assert_close(ours, ref)
    for mode in ("training", "inference"):
        with torch.no_grad():
            if mode == "training":
                eager, ours = train_step(plain, x), train_step(fused, x)
            else:
                ref, eager, ours = (
                    {"output": output(m.eval(), t)}
                    for m, t in ((plain64, x.double()), (plain, x), (fused, x))
                )
        for name, result in ours.items():
            assert_as_accurate_as_eager(result, ref[name], eager[name], name=f"{mode}: {name}")
    counters = [[b for b in m.buffers() if not b.is_floating_point()] for m in (fused, plain)]
    torch.testing.assert_close(*counters)
    return fused


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """The same state-dict keys in the same order, loading strictly both ways."""
    assert list(a.state_dict()) == list(b.state_dict())
    for one, other in ((a, b), (b, a)):
        loaded = copy.deepcopy(one)
        loaded.load_state_dict(other.state_dict(), strict=True)
        torch.testing.assert_close(loaded.state_dict(), other.state_dict(), rtol=0, atol=0)


def assert_same_classes(a: nn.Module, b: nn.Module) -> None:
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


def swapped(model: nn.Module) -> list[str]:
    """Names of the modules that ``fuse`` exchanged."""
    fused = fusedres.fuse(model)
    pairs = zip(model.named_modules(), fused.modules(), strict=True)
    return [name for (name, before), after in pairs if type(before) is not type(after)]


def unfused_reasons(model: nn.Module, x: Tensor) -> set[str]:
    """Why parts of a forward ran as plain modules."""

    events = []
    with observers.observe(events.append):
        output(model, x)
    return {e.reason for e in events if e.backend == "unfused"}
