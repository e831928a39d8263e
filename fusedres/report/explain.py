"""``explain``: runs a model once and says which parts ran fused, and why others did not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .recorder import Recorder, Row
from .table import render, size

_GRAD_NOTE = (
    "the model is in eval mode with gradients on, so its convolutions keep what a backward needs;"
    " under torch.no_grad() each is one conv_bn_act call"
)
_NAN_NOTE = (
    "conv_bn_act on onednn: where its activation is ReLU, a NaN becomes 0; PyTorch's ReLU keeps it"
)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What one forward (and backward) of a model ran, in that order. ``str()`` is a table.

    ``notes`` say where a backend's results differ from PyTorch's by more than rounding, and what
    keeps the model from its fastest form.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    @property
    def bytes_moved(self) -> int:
        """Bytes of memory that the model moves."""
        return sum(row.bytes_moved for row in self.rows)

    @property
    def eager_bytes(self) -> int:
        """Bytes of memory that the same model moves in eager PyTorch."""
        return sum(row.eager_bytes for row in self.rows)

    @property
    def fused(self) -> float:
        """The share of eager's memory traffic that belongs to fused ops: 0 to 1."""
        return sum(row.eager_bytes for row in self.rows if row.fused) / (self.eager_bytes or 1)

    def __str__(self) -> str:
        columns = "module", "op", "backend", "launches", "moved", "eager moves", "reason"
        rows = [
            (
                r.module or "(model)", r.op, r.backend, str(r.launches), size(r.bytes_moved),
                size(r.eager_bytes), r.reason or "",
            )
            for r in self.rows
        ]  # fmt: skip
        totals = str(self.launches), size(self.bytes_moved), size(self.eager_bytes)
        share = f"{self.fused:.0%} of eager's traffic is in fused ops"
        rows.append(("total", f"{len(self.rows)} rows", "", *totals, share))
        table = render(columns, rows, numeric=columns[3:6])
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        return f"Explanation({len(self.rows)} rows, {self.fused:.0%} fused)"


def explain(model: nn.Module, *inputs, backward: bool = False) -> Explanation:
    """Run ``model(*inputs)`` once and list every op call and every part that was left unfused.

    The model runs as it would for the caller: in its mode (train or eval), with or without
    gradients and autocast as they are. Parameters, buffers, gradients, inputs and the state of the
    random number generators are left as they were.

    Args:
        model: any module in Python; a DataParallel is looked through.
        inputs: its positional arguments.
        backward: whether to run the backward too, of a gradient of ones. It adds rows of the ops of
            this library alone: what PyTorch runs there, as most gradients of convolutions, is not
            seen. What is computed again there is counted for eager too.

    Returns:
        Explanation. The traffic of an op is that of the formula its benchmark divides by; on the
        reference backend it is eager's. A module of PyTorch that runs by itself counts its
        inputs, outputs and parameters once, for us and for eager. Arithmetic written out in the
        ``forward`` of a foreign module (a ``+`` between two layers) is not seen.

    Raises:
        TypeError: ``model`` is not a module, or is a ScriptModule, whose code is compiled.
        ValueError: a backward of a result that needs none.
        Whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model: wanted a torch.nn.Module in Python, got a ScriptModule; "
            "explain the model before torch.jit.script or torch.jit.trace"
        )
    inputs = tree_map_only(Tensor, _copy, inputs)
    recorder = Recorder(model)
    model = model.module if isinstance(model, nn.DataParallel) else model
    # The model runs on copies of its buffers: nothing has to be undone, not even their versions.
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with _same_random_state(model, inputs), recorder.listening():
        result = torch.func.functional_call(model, buffers, inputs)
        if backward:
            _run_backward(model, inputs, result)
    return Explanation(tuple(recorder.rows), tuple(_notes(model, recorder.rows)))


def _run_backward(model: nn.Module, inputs: tuple, result: object) -> None:
    """For its ops alone: no gradient is kept."""
    of, by = (
        [t for t in ts if isinstance(t, Tensor) and t.requires_grad]
        for ts in (tree_leaves(result), [*model.parameters(), *tree_leaves(inputs)])
    )
    if not of:
        raise ValueError("backward: wanted a result that requires grad, got none")
    torch.autograd.grad(of, by, [torch.ones_like(t) for t in of], allow_unused=True)


def _notes(model: nn.Module, rows: list[Row]) -> Iterator[str]:
    if any(row.op == "conv_bn_act" and row.backend == "onednn" for row in rows):
        yield _NAN_NOTE
    if not model.training and any(row.op == "conv_stats" for row in rows):
        yield _GRAD_NOTE


def _copy(x: Tensor) -> Tensor:
    y = x.detach().clone()
    if y.stride() != x.stride():  # a part of another tensor: to be explained as such
        memory, at = x.untyped_storage().clone(), x.storage_offset()
        y = x.new_empty(0).set_(memory, at, x.shape, x.stride())
    return y.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def _same_random_state(model: nn.Module, inputs: tuple) -> Iterator[None]:
    tensors = [*model.parameters(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield
