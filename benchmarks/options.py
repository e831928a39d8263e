"""The options of a run. Imports nothing else, so that their help is there at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SELECTIONS = ("smoke", "table", "full")
RESULTS = Path("build/benchmarks.json")


def declare(add: Callable[..., object]) -> None:
    """Add them to a parser, argparse's or pytest's, by its method for one option."""
    full = os.environ.get("FULL", "0") not in ("", "0")
    add("--suite", choices=SELECTIONS, default="full" if full else "smoke",
        help="which benchmarks: smoke (minutes), table (what goals are set for), full; FULL=1"
        " makes full the default")  # fmt: skip
    add("--peers", help="patterns of peers to compare with, by commas, as 'eager*,OpenVINO'")
    add("--seconds", type=_seconds, help="of timing each competitor of a benchmark")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch (all cores)")
    add("--results", type=Path, default=RESULTS, help=f"file to write ({RESULTS})")
    add("--resume", action="store_true",
        help="keep what --results holds from the same commit and settings")  # fmt: skip


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError
    return value
