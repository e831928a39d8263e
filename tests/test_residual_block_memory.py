"""A block as one autograd node: what it keeps for the backward, and until when."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from cases import randn
from fusedres import dispatch
from fusedres.ops import residual_block
from test_residual_block import X, block_of


def kept(block: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """The tensors kept for a backward, by storage, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    found = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return found


def bytes_of(tensors: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("case", ["basic", "bottleneck_stride", "se_bottleneck"])
def test_what_is_kept(case):
    """What the step ops keep; under autocast no reduced copies of the convolutions' weights."""
    block = block_of(case)
    for casts in (False, True):
        x = randn(X, torch.bfloat16 if casts else torch.float32, "NHWC").requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            node = kept(block, x)
            with dispatch.step_by_step():
                steps = kept(block, x)
        convs = [m for n, m in block.named_modules() if isinstance(m, nn.Conv2d) and "se." not in n]
        weights = sum(p.numel() for conv in convs for p in conv.parameters())
        assert bytes_of(steps) - bytes_of(node) == (2 * weights if casts else 0)
        assert len(node) < len(steps) if casts else len(node) == len(steps)


def test_raw_results_are_let_go_when_they_have_been_read(monkeypatch):
    """At the first convolution's backward nothing of the last one's is left."""
    block, x = block_of("bottleneck_stride"), randn(X).requires_grad_()
    alive, seen = [], []
    original = residual_block._Backward._link

    def link(self, i, d, h):
        if not alive:
            alive.extend(weakref.ref(t) for t in self.run.raws if t is not None)
        seen.append(sum(ref() is not None for ref in alive))
        return original(self, i, d, h)

    monkeypatch.setattr(residual_block._Backward, "_link", link)
    block(x).sum().backward()
    assert seen == [2, 1, 0]  # conv3 reads raw2, conv2 raw1; raw3 was computed again
    assert all(ref() is None for ref in alive)
