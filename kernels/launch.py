"""How a kernel is started: the shape it sees, its tile, its device, and who counts launches.

Every launch of the package goes through ``launch``.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

# Read once, as Triton does: a kernel is interpreted or compiled from its import on.
INTERPRETED = triton.knobs.runtime.interpret

# Sums over pixels are taken over tiles of at most this many in float32 (rounding grows with it).
TILE_PIXELS = 256
# A reducing pass aims at this many programs: eight for each of an H100's 132 multiprocessors.
REDUCE_PROGRAMS = 1024
MULTIPROCESSORS = 132  # an H100's
TOO_MANY = "too many blocks in cooperative launch"  # CUDA's words


@dataclass(frozen=True)
class Config:
    """How a streaming kernel is launched.

    Args:
        tile: elements of a tile.
        inner: the most of them in a row of memory.
        warps: of a program.
    """

    tile: int
    inner: int
    warps: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what ``launch`` was called with."""

    kernel: object
    programs: int
    args: tuple
    options: dict  # Triton's own: num_warps, num_stages
    flags: dict  # constexpr arguments

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


class _State(threading.local):
    counters: tuple[list[str], ...] = ()
    dry: list[Launch] | None = None


_state = _State()


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that this thread launches inside the context, in order."""
    names: list[str] = []
    before = _state.counters
    _state.counters = (*before, names)
    try:
        yield names
    finally:
        _state.counters = before


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What this thread launches inside the context is a measurement's: nobody counts it."""
    before, _state.counters = _state.counters, ()
    try:
        yield
    finally:
        _state.counters = before


@contextlib.contextmanager
def dry_run() -> Iterator[list[Launch]]:
    """What this thread would launch, in every configuration that ships; nothing is started.

    Results are not written, so meta tensors will do as inputs.
    """
    _state.dry = []
    try:
        yield _state.dry
    finally:
        _state.dry = None


def is_dry() -> bool:
    return _state.dry is not None


def on(device: torch.device):
    """The context in which ``device`` is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def programs_at_once(device: torch.device) -> int:
    """How many programs of any size run together: the multiprocessors; an H100's in a dry run."""
    return _multiprocessors(device.index) if device.type == "cuda" else MULTIPROCESSORS


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    kernel, programs: int, *args, device: torch.device, warps: int, stages: int | None = None,
    meeting: bool = False, **flags,
) -> None:  # fmt: skip
    """Start ``programs`` programs of ``kernel`` on the current stream of ``device``.

    Args:
        args: the kernel's arguments that are not constexpr, in order; ``flags`` are the others.
        stages: of software pipelining, where the kernel's loop has it.
        meeting: the programs wait for each other: all of them run at once, or none does. The
            interpreter, which cannot do that, runs what is before the meeting, then what is behind.

    Raises:
        OutOfResources: the device has no room for all programs of a meeting, or for one of any.
    """
    # Named, because the default becomes no fused multiply-adds with Triton 3.10.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if stages is not None:
        options["num_stages"] = stages
    phases = [flags]
    if meeting:
        options["launch_cooperative_grid"] = True
        in_turn = ("before", "behind") if INTERPRETED and not is_dry() else ("all",)
        phases = [flags | {"PHASE": phase} for phase in in_turn]
    call = Launch(kernel, programs, args, options, phases[0])
    if _state.dry is not None:
        _state.dry.append(call)
        return
    try:
        with on(device):
            for constants in phases:
                kernel[(programs,)](*args, **constants, **options)
    except RuntimeError as error:
        if not (meeting and TOO_MANY in str(error)):
            raise
        limit = programs_at_once(device)
        raise OutOfResources(programs, limit, "programs that run at once") from error
    for names in _state.counters:
        names.append(call.name)


def power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class View:
    """A dense tensor ``[N, C, ...]`` in the form that kernels see: n images of c by hw.

    Args:
        op: the op's name, for messages.
        x: contiguous or channels_last.
        images: whether images are told apart; if not, channels_last is one image of N*HW pixels.

    Raises:
        ValueError: x is not dense, or has fewer than two dimensions.
    """

    def __init__(self, op: str, x: Tensor, *, images: bool):
        if x.dim() < 2:
            raise ValueError(f"{op}: x: wanted 2 or more dimensions, got {x.dim()}")
        self.op, self.x = op, x
        self.images, self.pixels = x.shape[0], math.prod(x.shape[2:])
        self.n, self.c, self.hw = self.images, x.shape[1], self.pixels
        contiguous = x.is_contiguous()
        self.nhwc = self.hw == 1 or (not contiguous and _channels_last(x))
        if not contiguous and not self.nhwc and x.numel():
            raise ValueError(
                f"{op}: x: wanted a contiguous or channels_last tensor, got shape"
                f" {tuple(x.shape)} with strides {x.stride()}"
            )
        if self.nhwc and not images:
            self.n, self.hw = 1, self.images * self.pixels

    @property
    def count(self) -> int:
        """Values of one channel."""
        return self.images * self.pixels

    def operand(self, name: str, t: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Check an optional tensor of x's shape: it must lie in memory as x does."""
        if t is None:
            return
        x, dtype = self.x, dtype or self.x.dtype
        if t.shape != x.shape:
            raise ValueError(
                f"{self.op}: {name}: wanted x's shape {tuple(x.shape)}, got {tuple(t.shape)}"
            )
        if t.dtype != dtype or t.device != x.device:
            raise TypeError(
                f"{self.op}: {name}: wanted {dtype} on {x.device}, got {t.dtype} on {t.device}"
            )
        as_x = _channels_last(t) if self.nhwc and self.pixels != 1 else t.is_contiguous()
        if not as_x and x.numel():
            raise ValueError(
                f"{self.op}: {name}: wanted x's memory layout (strides {x.stride()}), got"
                f" strides {t.stride()}"
            )

    def mask(self, name: str, t: Tensor) -> Tensor | None:
        """Check a bit mask; None where it is empty."""
        if not t.numel():
            return None
        wanted = self.mask_shape()
        if t.dtype != torch.uint8 or t.shape != wanted or not t.is_contiguous():
            raise ValueError(
                f"{self.op}: {name}: wanted contiguous torch.uint8 {wanted}, got {t.dtype}"
                f" {tuple(t.shape)}"
            )
        return t

    def mask_shape(self) -> tuple[int, int]:
        """``[rows, ceil(cols / 8)]`` of the bit mask of x (layout.mask_shape)."""
        rows, cols = self.images * self.c, self.pixels
        if self.nhwc:
            rows, cols = self.count, self.c
        return rows, cdiv(cols, 8)

    def new_mask(self, wanted: bool) -> Tensor:
        return self.x.new_empty(self.mask_shape() if wanted else (0,), dtype=torch.uint8)

    def new(self, *shape: int) -> Tensor:
        """Uninitialised fp32 on x's device."""
        return self.x.new_empty(shape, dtype=torch.float32)

    def flags(self, config: Config) -> dict[str, int | bool]:
        """The constexpr arguments that every kernel on tiles has."""
        inner, outer = (self.c, self.hw) if self.nhwc else (self.hw, self.c)
        # A mask byte is eight columns, so a tile has at least eight.
        columns = max(8, min(config.inner, power_of_2(inner)))
        rows = max(1, min(config.tile // columns, power_of_2(outer), TILE_PIXELS))
        block_c, block_hw = (columns, rows) if self.nhwc else (rows, columns)
        return {
            "NHWC": self.nhwc,
            "ALIGN": math.gcd(inner, 16),
            "WIDE": inner * rows >= 2**31,
            "BLOCK_C": block_c,
            "BLOCK_HW": block_hw,
        }

    def key(self, kernel: str, *more: object) -> str:
        """What a measured choice depends on, besides the GPU."""
        layout = "NHWC" if self.nhwc else "NCHW"
        sizes = f"{self.n}x{self.c}x{self.hw}"
        return "|".join(map(str, (kernel, self.x.dtype, layout, sizes, *more)))

    def programs(self, flags: dict, chunk: int) -> int:
        return self.n * cdiv(self.c, flags["BLOCK_C"]) * cdiv(self.hw, chunk)

    def chunk(self, flags: dict) -> int:
        """Pixels that one program of a reducing pass walks, a tile at a time."""
        tiles = self.programs(flags, flags["BLOCK_HW"])
        most = cdiv(self.hw, flags["BLOCK_HW"])
        return flags["BLOCK_HW"] * max(1, min(most, tiles // REDUCE_PROGRAMS))


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def vector(op: str, name: str, t: Tensor | None, c: int) -> Tensor | None:
    """Check an optional per-channel parameter [C] of any floating dtype; made dense."""
    if t is None:
        return None
    if t.shape != (c,):
        raise ValueError(f"{op}: {name}: wanted shape ({c},), got {tuple(t.shape)}")
    return t.contiguous()
