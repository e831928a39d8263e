"""Times one call on cold caches: with the processor's clock on a CPU, with events on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]
# OpenMP's threads spin for about 3 ms after their last work; a competitor with another thread pool
# would share the cores with them.
SETTLE_SECONDS = 0.005


class Clock:
    """Times calls on ``device``.

    Before each timed call more memory than the caches hold is written, so that it starts cold.
    """

    def __init__(self, device: torch.device):
        self.device = device
        size = max(2 * last_level_cache(device), 64 * 2**20)
        self._buffer = torch.zeros(size // 4, device=device)

    def chill(self) -> None:
        self._buffer.add_(1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        else:
            time.sleep(SETTLE_SECONDS)

    def seconds(self, call: Call) -> float:
        """Seconds of one call on cold caches."""
        self.chill()
        return self.seconds_at_once(call)

    def seconds_at_once(self, call: Call) -> float:
        """Seconds of one call, without the garbage collector."""
        gc.disable()
        try:
            kept, seconds = self._time(call)
        finally:
            gc.enable()
        del kept  # freeing the result is nobody's time
        return seconds

    def _time(self, call: Call) -> tuple[object, float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            return call(), time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kept = call()
        end.record()
        end.synchronize()
        return kept, begin.elapsed_time(end) / 1e3

    def typical(self, call: Call, rounds: int = 3) -> float:
        """Median of a few calls after one that warms up."""
        call()
        return statistics.median(self.seconds(call) for _ in range(rounds))


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's largest cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units.get(text[-1:], 1))
    return max(sizes, default=32 * 2**20)


def captured(calls: dict[str, Call]) -> dict[str, Call]:
    """Every call as a CUDA graph; the graphs replay on the memory they were captured with.

    Raises:
        RuntimeError: one of them cannot be captured; its name and the reason are in the message.
    """
    return {name: _capture(name, call) for name, call in calls.items()}


def _capture(name: str, call: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # what a foreign runtime raises has no common class
        reason = str(error).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{name}: {type(error).__name__}: {reason[0]}") from error
    return graph.replay
