"""Which of a kernel's configurations is used: the first, or the one measured to be the fastest.

Nothing is measured unless FUSEDRES_TUNE=1 is set: then a launch of a shape that was never measured
on this GPU tries each configuration. What it found is kept in a file a GPU and versions, in
FUSEDRES_CACHE_DIR (default: fusedres/ in XDG_CACHE_HOME, ~/.cache), and is used from then on
with or without FUSEDRES_TUNE. A measurement replays the launch on its own inputs, which it only
reads, and on results that it allocates: nothing of the user's is written to.

A configuration that the GPU has not the resources for is left out, with a warning.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from .. import __version__
from . import cache_folder, tuning_asked
from .launch import INTERPRETED, is_dry, on, uncounted

Config = TypeVar("Config")  # a frozen dataclass of numbers: launch.Config, or an op's own
Result = TypeVar("Result")
Timer = Callable[[Callable[[], object]], float]

REPEATS = 5


class Unfit(RuntimeError):
    """A GPU has not the resources for a configuration, or for any."""


def cuda_timer(run: Callable[[], object]) -> float:
    """Milliseconds of ``run`` on the current CUDA device: the median of five, warmed up."""
    run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@dataclass(frozen=True)
class Choice:
    """What a measurement found: a configuration's fields, and the least time of each rival."""

    config: list
    ms: dict[str, float] = field(default_factory=dict)


class Cache:
    """Measured choices, in memory and in one JSON file: ``{key: a Choice's fields}``.

    Processes may share the file: it is replaced as a whole, with what others wrote meanwhile
    taken over. A file that cannot be read counts as empty and one that cannot be written is given
    up, each with one warning.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._choices = self._read()
        self._writable = True

    def choice(self, key: str) -> Choice | None:
        found = self._choices.get(key)
        try:
            return Choice(list(found["config"]), {by: float(t) for by, t in found["ms"].items()})
        except (TypeError, KeyError, ValueError, AttributeError):  # none, or not written by us
            return None

    def get(self, key: str, configs: Sequence[Config]) -> Config | None:
        """The choice for ``key``, if it is still one of ``configs``."""
        found = self.choice(key)
        return next((c for c in configs if found and list(astuple(c)) == found.config), None)

    def holds(self, prefix: str) -> bool:
        """Whether there is a choice whose key begins with ``prefix``."""
        return any(key.startswith(prefix) for key in self._choices)

    def put(self, key: str, config: Config, ms: dict[str, float] | None = None) -> None:
        with self._lock:
            self._choices[key] = {"config": list(astuple(config)), "ms": ms or {}}
            if self._writable:
                self._choices = self._read(warn=False) | self._choices
                self._write()

    def _read(self, warn: bool = True) -> dict[str, dict]:
        try:
            found = json.loads(self.path.read_text())
            if not isinstance(found, dict):
                raise ValueError(f"wanted an object, got {type(found).__name__}")
            return found
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            if warn:
                message = f"fusedres: the measurements in {self.path} are lost: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return {}

    def _write(self) -> None:
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w") as file:
                json.dump(self._choices, file, indent=0, sort_keys=True)
            os.replace(temporary, self.path)
        except OSError as error:
            self._writable = False
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            warnings.warn(
                f"fusedres: measurements are not kept, {self.path} cannot be written: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


_caches: dict[str, Cache] = {}  # by GPU
_lock = threading.Lock()


def cache_path(gpu: str) -> Path:
    """The file of one GPU model, and of the versions whose kernels were measured."""
    ours = f"fusedres {__version__} triton {triton.__version__}"
    versions = f"{ours} torch {torch.__version__}"  # cuDNN comes with torch
    name = re.sub(r"[^a-z0-9.]+", "-", f"{versions} {gpu}".lower()).strip("-")
    return cache_folder() / f"{name}.json"


def cache_of(gpu: str) -> Cache:
    with _lock:
        if gpu not in _caches:
            _caches[gpu] = Cache(cache_path(gpu))
        return _caches[gpu]


def measuring() -> bool:
    """Whether unknown shapes are measured: FUSEDRES_TUNE is set, and no CUDA graph is recorded."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return tuning_asked() and not capturing


def gpu_of(device: torch.device) -> str | None:
    """The name of the GPU that measurements belong to; None where nothing can be measured."""
    if device.type != "cuda" or INTERPRETED:
        return None
    return _gpu_name(device.index)


@cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def best(
    key: str, configs: Sequence[Config], work: Callable[[Config], object], gpu: str, timer: Timer
) -> Config:  # fmt: skip
    """The configuration to use for ``key`` on ``gpu``.

    Args:
        key: what the choice depends on: kernel, dtype, layout, sizes.
        configs: those that ship; the first is the default.
        work: does everything with one configuration, into results of its own.

    Raises:
        Unfit: none of them runs here.
    """
    known = cache_of(gpu)
    found = known.get(key, configs)
    if found is not None:
        return found
    if not measuring():
        return configs[0]
    with uncounted():
        times = [_time(key, config, work, timer) for config in configs]
    least = min(times)
    if least == math.inf:
        return next((c for c in configs if (key, c) not in _unfit), None) or _none_fits(key)
    ms: dict[str, float] = {}
    for config, time in zip(configs, times, strict=True):
        if time < math.inf:
            ms[rival(config)] = min(time, ms.get(rival(config), math.inf))
    fastest = configs[times.index(least)]
    known.put(key, fastest, ms)
    return fastest


def rival(config: Config) -> str:
    """Who carries a configuration out: a kernel of ours unless it says otherwise."""
    return getattr(config, "by", "triton")


def _time(key: str, config: Config, work: Callable[[Config], object], timer: Timer) -> float:
    try:
        return timer(lambda: work(config))
    except torch.OutOfMemoryError:  # of this moment: another way may need less
        return math.inf
    except (OutOfResources, Unfit) as error:
        _leave_out(key, config, error)
        return math.inf


def _none_fits(key: str) -> NoReturn:
    raise Unfit(f"{_kernel(key)}: no configuration fits this GPU")


_unfit: set[tuple] = set()  # (key, configuration)


def _leave_out(key: str, config: Config, error: Exception) -> None:
    _unfit.add((key, config))
    message = f"fusedres: {_kernel(key)}: {config} is left out: {error}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _kernel(key: str) -> str:
    return key.partition("|")[0]


def choose(
    key: str, configs: Sequence[Config], work: Callable[[Config], object], device: torch.device
) -> Config:  # fmt: skip
    """The configuration to use: measured, or the first one that is not known to be unfit."""
    fit = [config for config in configs if (key, config) not in _unfit]
    if not fit:
        _none_fits(key)
    gpu = gpu_of(device)
    if gpu is None or len(fit) == 1:
        return fit[0]
    with on(device):
        return best(key, fit, work, gpu, cuda_timer)


def measured(key: str, device: torch.device) -> dict[str, float]:
    """Milliseconds by rival, where ``key`` was measured."""
    gpu = gpu_of(device)
    found = None if gpu is None else cache_of(gpu).choice(key)
    return {} if found is None else found.ms


def told(ms: dict[str, float]) -> str | None:
    """What ``explain`` says of a measurement, the fastest first; None where there is none."""
    ordered = sorted(ms.items(), key=lambda one: one[1])
    return "measured: " + ", ".join(f"{by} {t:.3f} ms" for by, t in ordered) if ms else None


def run(
    key: str, configs: Sequence[Config], work: Callable[[Config], Result], device: torch.device
) -> Result:  # fmt: skip
    """``work`` with the best configuration that fits; with the default where none was measured.

    Raises:
        Unfit: none fits.
    """
    if is_dry():
        return [work(config) for config in configs][0]
    while True:
        config = choose(key, configs, work, device)
        try:
            return work(config)
        except (OutOfResources, Unfit) as error:
            _leave_out(key, config, error)
