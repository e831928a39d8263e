"""Who hears of the calls of ops: ``fusedres.explain``, the benchmarks, a test.

Ops and modules that run unfused ``notify``; nothing is told where nobody in the thread observes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Event:
    """One op call (or one module left unfused), as observers hear it. Bytes are of memory."""

    op: str
    backend: str
    reason: str | None = None
    launches: int = 1
    bytes_moved: int = 0
    eager_bytes: int = 0
    flops: int = 0


class _State(threading.local):
    observers: tuple[Callable[[Event], None], ...] = ()


_state = _State()


def notify(event: Event) -> None:
    """Tell the observers of this thread; a compiled graph has none."""
    if torch.compiler.is_compiling():
        return
    for observer in _state.observers:
        observer(event)


def observed() -> bool:
    return bool(_state.observers)


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """What this thread runs inside the context is a measurement's: no observer hears of it."""
    before, _state.observers = _state.observers, ()
    try:
        yield
    finally:
        _state.observers = before


@contextlib.contextmanager
def observe(observer: Callable[[Event], None]) -> Iterator[None]:
    """Call ``observer`` with every Event of this thread inside the context, backwards included."""
    before = _state.observers
    _state.observers = (*before, observer)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward in this thread
            yield
    finally:
        _state.observers = before
