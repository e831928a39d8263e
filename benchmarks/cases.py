"""A case: competitors on the same inputs, what they must compute, and what it costs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import machine
from .floors import Traffic
from .measure import Competitor, Race, Ratio, Truth, summarise


@dataclass(frozen=True)
class Memory:
    """Bytes of one call: the most above the level before, and what is kept for the backward."""

    peak: int
    saved: int | None = None


@dataclass
class Case:
    """Work to time.

    Args:
        competitors: ours first.
        missing: peers that cannot run here, with the reason.
        traffic: our traffic besides convolutions, where the ops report it.
        streaming: whether that is all the traffic there is, so that GB/s mean something.
        conv_seconds: measures the convolutions alone.
        memory: measures ours and eager's memory.
    """

    title: str
    competitors: list[Competitor]
    missing: dict[str, str]
    truth: Truth
    traffic: Traffic | None = None
    streaming: bool = False
    conv_seconds: Callable[[], float] | None = None
    memory: Callable[[], dict[str, Memory]] | None = None
    notes: list[str] = field(default_factory=list)

    def race(self, flush: Callable[[], object]) -> Race:
        return Race(self.competitors, self.truth, flush)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normally distributed values; the caller seeds."""
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def ratio_dict(found: Ratio) -> dict:
    return {"ratio": found.value, "halves": found.halves, "tie": found.tie}


def report(case: Case, race: Race, *, floor: bool, memory: bool) -> dict:
    """The outcome of a race in JSON's types; times in seconds, memory in bytes."""
    times = {name: asdict(summarise(s)) for name, s in race.seconds.items()}
    notes = {c.name: c.note for c in case.competitors if c.note}
    peers = {
        name: times[name] | ratio_dict(race.ratio(name)) for name in times if name != race.ours
    }
    for name, note in notes.items():
        if name in peers:
            peers[name]["note"] = note
    found = {
        "title": case.title,
        "ours": times[race.ours],
        "peers": peers,
        "missing": case.missing,
        "refused": race.refused,
        "notes": [*case.notes],
    }
    if case.traffic is not None:
        found |= _traffic_figures(case, found["ours"]["median"])
    if floor and case.conv_seconds is not None:
        found |= _floor_figures(case, found["ours"]["median"])
    if memory and case.memory is not None:
        found["memory"] = {name: asdict(m) for name, m in case.memory().items()}
    return found


def _traffic_figures(case: Case, seconds: float) -> dict:
    found = {
        "bytes_moved": case.traffic.bytes_moved,
        "eager_bytes": case.traffic.eager_bytes,
        "launches": case.traffic.launches,
    }
    if case.streaming:
        rate = case.traffic.bytes_moved / seconds
        bandwidth = machine.rates().copy_bandwidth
        found |= {"gigabytes_per_second": rate / 1e9, "percent_of_copy": 100 * rate / bandwidth}
    return found


def _floor_figures(case: Case, seconds: float) -> dict:
    """Convolutions at their measured time plus the other passes at copy speed."""
    convolutions = case.conv_seconds()
    passes = case.traffic.bytes_moved / machine.rates().copy_bandwidth if case.traffic else None
    floor = convolutions + (passes or 0.0)
    return {
        "floor": {
            "convolutions": convolutions,
            "passes": passes,
            "seconds": floor,
            "percent": 100 * floor / seconds,
        }
    }
