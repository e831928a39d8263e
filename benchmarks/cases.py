"""A case: competitors on the same inputs, what they must compute, and what it costs at least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import machine
from .clock import Clock
from .inspection import Inspection
from .machine import Rates
from .measure import Competitor, Race, Times, Truth
from .roofline import Hardware

CPU = torch.device("cpu")
CHANNELS_LAST, NCHW = "channels_last", "NCHW"
FORMATS = {CHANNELS_LAST: torch.channels_last, NCHW: torch.contiguous_format}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Case:
    """Work to time.

    Args:
        title: what a reader sees.
        facts: what a chart groups by: network, mode, batch, dtype.
        competitors: ours first.
        missing: peers that cannot run here, with the reason.
        floor: seconds at the machine's rates at best, where known; floor_of: by which count.
        conv_seconds: measures the convolutions alone.
        refresh: draws new inputs for a round, the same for every competitor.
        graphable: a call is the same kernels every time, so a CUDA graph can hold it.
    """

    title: str
    device: torch.device
    dtype: torch.dtype
    competitors: list[Competitor]
    missing: dict[str, str]
    truth: Truth
    facts: dict[str, str | int] = field(default_factory=dict)
    floor: Callable[[Hardware], float | None] = lambda hardware: None
    floor_of: str = ""
    conv_seconds: Callable[[Clock], float] | None = None
    refresh: Callable[[int], object] = lambda round_: None
    graphable: bool = True
    notes: list[str] = field(default_factory=list)

    def race(self, clock: Clock) -> Race:
        graphs = self.graphable and self.device.type == "cuda"
        return Race(self.competitors, self.truth, clock, self.refresh, graphs)

    def inspect(self) -> dict[str, Inspection]:
        """Every competitor that can be looked into, once."""
        found = {}
        for competitor in self.competitors:
            if competitor.inspect is not None:
                competitor.prepare()
                found[competitor.name] = competitor.inspect()
        return found


def activation(shape: tuple[int, ...], dtype: torch.dtype, layout: str = CHANNELS_LAST) -> Tensor:
    """Normally distributed values, of images in ``layout``; the caller seeds."""
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=FORMATS[layout]) if x.dim() == 4 else x


def redraw(tensors: Iterable[Tensor], seed: int) -> None:
    """New normally distributed values in place, in every competitor's operands at once."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for t in tensors:
            t.normal_()


def report(
    case: Case,
    race: Race,
    inspected: dict[str, Inspection],
    *,
    convolutions: Clock | None = None,
) -> dict:
    """The outcome of a race in JSON's types: seconds, bytes, counts.

    Args:
        convolutions: times the convolutions alone; None leaves them out.
    """
    rates = machine.rates(case.device)
    seconds = case.floor(Hardware(rates.copy_bandwidth, rates.flops(case.dtype)))
    floor = None if seconds is None else {"seconds": seconds, "of": case.floor_of}
    notes = {c.name: c.note for c in case.competitors if c.note}
    competitors = {}
    for name, times in race.times().items():
        entry = _figures(times, inspected.get(name, Inspection()), floor, rates)
        if name != race.ours:
            found = race.ratio(name)
            halves = found.halves and list(found.halves)
            entry |= {"ratio": found.value, "halves": halves, "tie": found.tie}
        competitors[name] = entry | {"note": notes.get(name)}
    alone = None
    if convolutions is not None and case.conv_seconds is not None:
        alone = case.conv_seconds(convolutions)
    return {
        "title": case.title,
        "device": case.device.type,
        "facts": case.facts,
        "competitors": competitors,
        "missing": case.missing,
        "refused": race.refused,
        "graphs": race.graphs,
        "floor": floor,
        "convolutions_alone": alone,
        "notes": [*case.notes],
    }


def _figures(times: Times, seen: Inspection, floor: dict | None, rates: Rates) -> dict:
    entry = asdict(times) | asdict(seen)
    rate = None if seen.bytes_moved is None else seen.bytes_moved / times.median
    entry["gigabytes_per_second"] = rate and rate / 1e9
    entry["percent_of_copy"] = rate and 100 * rate / rates.copy_bandwidth
    entry["percent_of_floor"] = floor and 100 * floor["seconds"] / times.median
    return entry
