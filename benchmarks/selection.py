"""Which cases a run takes: a few minutes' worth by default, everything with FULL=1."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")


def full() -> bool:
    return os.environ.get("FULL", "0") not in ("", "0")


def select(small: Sequence[Case], more: Sequence[Case] = ()) -> list[Case]:
    """``small`` always; ``more`` too with FULL=1."""
    return [*small, *more] if full() else list(small)


def label(spec: tuple) -> str:
    """A case's parameters as one word: ("BasicBlock", (8, 64)) is BasicBlock-8x64."""
    return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in spec)
