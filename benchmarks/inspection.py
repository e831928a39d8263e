"""What one call does besides taking time: memory, launches, traffic. Untimed.

All are counted in the same way whoever runs: what autograd keeps through PyTorch's hooks on saved
tensors, the peak through PyTorch's allocator, which also hears the temporaries inside an op. On a
CPU launches are the operators that read or write an activation, and bytes their operands, on a GPU
launches are the kernels that the profiler sees. oneDNN's internal scratch memory passes by that
allocator, on every side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from fusedres.demo.traffic import Traffic, traffic_of

NOTE = (
    "saved: bytes in the unique storages that autograd keeps for the backward, parameters and"
    " buffers left out; peak: most bytes allocated at a time through PyTorch's allocator above the"
    " level before the call; launches, bytes_moved: operators on activations and their operands"
)


@dataclass(frozen=True)
class Inspection:
    """Bytes and counts of one call; None is not measured."""

    peak: int | None = None
    saved: int | None = None
    launches: int | None = None
    bytes_moved: int | None = None


def inspect(
    call: Callable[[], object],
    batch: int,
    device: torch.device,
    *,
    exclude: Iterable[Tensor] = (),
    saves: bool = False,
    compiled: bool = False,
) -> Inspection:
    """Run ``call`` once and look.

    Args:
        batch: by it an activation is told from a weight.
        exclude: tensors that exist anyway: parameters and buffers.
        saves: whether the call runs a forward whose graph is wanted.
        compiled: its operators cannot be heard on a CPU.
    """
    heard: list[Traffic] = []
    listened = call if compiled else lambda: heard.append(traffic_of(call, batch))
    with _saved_tensors(exclude) as kept:
        peak = (_cuda_peak if device.type == "cuda" else _cpu_peak)(listened)
    traffic = heard[0] if heard else None
    launches = traffic and traffic.kernels
    if device.type == "cuda":
        launches = _cuda_kernels(call)
    saved = sum(kept.values()) if saves else None
    return Inspection(peak, saved, launches, traffic and (traffic.bytes or None))


@contextmanager
def _saved_tensors(exclude: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps; one counts whole, however many tensors share it.

    Until the backward begins every kept storage lives: no address is given out twice.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _cpu_peak(call: Callable[[], object]) -> int:
    """What PyTorch's CPU allocator hands out and takes back during ``call()``."""
    with _silenced(), torch.profiler.profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as prof:  # fmt: skip
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()  # negative where memory is given back
        peak = max(peak, level)
    return peak


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cuda_kernels(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    kinds = (e.name() for e in prof.profiler.kineto_results.events())
    return sum(not name.startswith(("Memcpy", "Memset", "cuda")) for name in kinds)


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
