"""Memory of a call: what autograd keeps for the backward, and the most that is allocated at once.

Both are counted in the same way whoever runs: the first through PyTorch's hooks on saved tensors,
the second through PyTorch's allocator, which also hears the temporaries inside an op. oneDNN's
internal scratch memory passes by that allocator, on every side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEMA_NOTE = (
    "saved: bytes in the unique storages that autograd keeps for the backward, parameters and"
    " buffers left out; peak: most bytes allocated at a time through PyTorch's allocator above the"
    " level before the call"
)


@dataclass(frozen=True)
class Allocations:
    """Bytes above the level before a call: the most during it, and what its result keeps alive."""

    peak: int
    kept: int


def saved_for_backward(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes in the storages that autograd keeps alive for the backward of ``forward()``.

    A storage counts once and whole, however many saved tensors share it.

    Args:
        exclude: tensors that exist anyway: parameters and buffers.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(kept.values())
    del result  # the graph has lived until here: no address was given out twice
    return total


def allocations(call: Callable[[], object]) -> Allocations:
    """What PyTorch's CPU allocator hands out and takes back during ``call()``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silenced(), torch.profiler.profile(activities=activities, profile_memory=True) as prof:
        result = call()
    del result
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()  # negative where memory is given back
        peak = max(peak, level)
    return Allocations(peak, level)


@contextmanager
def _silenced() -> Iterator[None]:
    """The profiler of torch 2.13 writes two lines to the process's standard error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
