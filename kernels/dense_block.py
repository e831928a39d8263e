"""The steps of a dense block on Triton: ``dense_load``, ``dense_grad`` and ``dense_finish``.

Layers read a growing slice of one buffer of channels, [N, LD, ...], and their gradients are added
into another. One launch each; ``dense_grad`` has a second one, which merges its sums. That a
channel's statistics are taken once, when it is written, is ``bn_stats`` of a layer's result.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_backward, act_forward
from .bn_act import bn_act_bwd_merge_kernel
from .launch import Config, View, cdiv, launch, power_of_2, vector
from .stats import MERGE_CHANNELS, MERGE_PARTS
from .stream import APPLY_CONFIGS, bn_scale
from .tile import aligned, load_channels, locate, spread, sum_pixels, tile, tiles_here

# One: dense_grad adds in place, which a measurement cannot repeat. Not measured on a GPU yet.
GRAD_CONFIGS = (Config(4096, 64, 8),)


@triton.jit
def slice_tile(
    n, c0, i0, C, LD, HW, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Addresses of a tile in a dense tensor of the slice's C channels, and in the buffer of LD."""
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    first, buffer_offs, _ = tile(n, c0, i0, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    return start + offs, first + buffer_offs, inside


# Computes: h = relu(a * (x - mean) + bias), a = weight / sqrt(var + eps)
# Reads:    x, the first C channels of the buffer [N, LD, HW], once
# Writes:   h [N, C, HW] once
# Traffic:  2*N*C*HW*sizeof(x) bytes; eager moves 7 (concatenation, statistics, norm, ReLU)
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "LD", "HW"])
def dense_load_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, h_ptr, C, LD, HW, eps,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    z = (x - spread(mean, NHWC)) * spread(a, NHWC) + spread(bias, NHWC)
    tl.store(h_ptr + at, act_forward(z, "relu").to(h_ptr.dtype.element_ty), mask=inside)


# Computes: dx += a * u, u = dh * relu'(a * (x - mean) + bias); sums of u and u * (x - mean) over
#           chunks of pixels
# Reads:    dh [N, C, HW], x and dx, the first C channels of their buffers, once
# Writes:   dx once; sum_u, sum_ux [N, chunks, C] fp32
# Traffic:  4*N*C*HW*sizeof(x) bytes; sums below 1% of it; eager moves 11
# Split:    one program = BLOCK_C channels of a chunk; a tile of at most 256 pixels is summed as a
#           tree, then added to the program's sums in fp32


@triton.jit(do_not_specialize=["C", "LD", "HW", "tiles"])
def dense_grad_kernel(
    dx_ptr, dh_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, sum_u_ptr, sum_ux_ptr,
    C, LD, HW, tiles, eps, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(tiles_here(first, HW, tiles, BLOCK_HW)):
        i0 = first + t * BLOCK_HW
        at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        u = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, x - spread(mean, NHWC), 0.0)
        u = act_backward(centered * spread(a, NHWC) + spread(bias, NHWC), u, "relu")
        dx = tl.load(dx_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        dx += u * spread(a, NHWC)
        tl.store(dx_ptr + at_x, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        sum_u += sum_pixels(u, NHWC)
        sum_ux += sum_pixels(u * centered, NHWC)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(sum_u_ptr + part * C + offs_c, sum_u, mask=offs_c < C)
    tl.store(sum_ux_ptr + part * C + offs_c, sum_ux, mask=offs_c < C)


# Computes: dy = dx + q * (x - mean) + r for the channels that one layer wrote
# Reads:    C channels of x and dx in their buffers [N, LD, HW], once
# Writes:   dy [N, C, HW] once
# Traffic:  3*N*C*HW*sizeof(x) bytes
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "LD", "HW"])
def dense_finish_kernel(
    dx_ptr, x_ptr, mean_ptr, q_ptr, r_ptr, dy_ptr, C, LD, HW,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    q = load_channels(q_ptr, c0, C, BLOCK_C, 0.0)
    r = load_channels(r_ptr, c0, C, BLOCK_C, 0.0)
    dy = dx + ((x - spread(mean, NHWC)) * spread(q, NHWC) + spread(r, NHWC))
    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)


class Slice(View):
    """Some channels of a buffer [N, LD, ...]: ``c`` of its ``ld``, from ``start`` on."""

    def __init__(self, op: str, buffer: Tensor, start: int, channels: int):
        super().__init__(op, buffer, images=False)
        if buffer.dim() != 4:
            raise ValueError(f"{op}: buffer: wanted 4 dimensions, got {buffer.dim()}")
        self.start, self.ld, self.c = start, self.c, channels
        if not 0 <= start <= start + channels <= self.ld:
            raise ValueError(
                f"{op}: channels: wanted some of the buffer's {self.ld}, got {start} to"
                f" {start + channels}"
            )

    def flags(self, config: Config) -> dict[str, int | bool]:
        flags = super().flags(config)
        if self.nhwc:
            flags["ALIGN"] = math.gcd(self.c, self.ld, 16)
            flags["WIDE"] = self.ld * flags["BLOCK_HW"] >= 2**31
        return flags

    def of(self, buffer: Tensor) -> Tensor:
        """The slice, whose first element's address a kernel is given."""
        return buffer.narrow(1, self.start, self.c)

    def dense(self) -> Tensor:
        """A new tensor of the slice's shape."""
        return torch.empty_like(self.of(self.x))

    def like(self, name: str, t: Tensor) -> None:
        """Check a tensor of the slice's shape: it must lie in memory as the buffer does."""
        wanted = (self.images, self.c, *self.x.shape[2:])
        layout = torch.channels_last if self.nhwc else torch.contiguous_format
        if t.shape != wanted or t.dtype != self.x.dtype:
            raise ValueError(
                f"{self.op}: {name}: wanted {self.x.dtype} {wanted}, got {t.dtype} {tuple(t.shape)}"
            )
        if t.numel() and not t.is_contiguous(memory_format=layout):
            raise ValueError(
                f"{self.op}: {name}: wanted the buffer's memory layout (strides"
                f" {self.x.stride()}), got strides {t.stride()}"
            )

    def parameters(self, **named: Tensor | None) -> list[Tensor | None]:
        return [vector(self.op, name, t, self.c) for name, t in named.items()]


def dense_load(
    buffer: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    channels: int, eps: float,
) -> Tensor:  # fmt: skip
    view = Slice("dense_load", buffer, 0, channels)
    norm = view.parameters(mean=mean, var=var, weight=weight, bias=bias)
    h = view.dense()
    if not h.numel():
        return h

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            dense_load_kernel, view.programs(flags, flags["BLOCK_HW"]), buffer, *norm, h, view.c,
            view.ld, view.hw, eps, device=h.device, warps=config.warps, **flags,
        )  # fmt: skip

    tuning.run(view.key("dense_load", view.ld), APPLY_CONFIGS, work, h.device)
    return h


def dense_grad(
    dbuffer: Tensor, dh: Tensor, buffer: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view = Slice("dense_grad", buffer, 0, dh.shape[1])
    view.operand("dbuffer", dbuffer)
    view.like("dh", dh)
    norm = view.parameters(mean=mean, var=var, weight=weight, bias=bias)
    dweight, dbias = view.new(view.c), view.new(view.c)
    if not dh.numel():
        return dweight.zero_(), dbias.zero_()

    def work(config: Config) -> tuple[Tensor, Tensor]:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        parts = view.n * cdiv(view.hw, chunk)
        sums = view.new(parts, view.c), view.new(parts, view.c)
        launch(
            dense_grad_kernel, view.programs(flags, chunk), dbuffer, dh, buffer, *norm, *sums,
            view.c, view.ld, view.hw, chunk // flags["BLOCK_HW"], eps, device=dh.device,
            warps=config.warps, **flags,
        )  # fmt: skip
        return sums

    sums = tuning.run(view.key("dense_grad", view.ld), GRAD_CONFIGS, work, dh.device)
    block_c = min(MERGE_CHANNELS, power_of_2(view.c))
    launch(
        bn_act_bwd_merge_kernel, cdiv(view.c, block_c), *sums, norm[1], dweight, dbias,
        sums[0].shape[0], view.c, eps, device=dh.device, warps=4, BLOCK_P=MERGE_PARTS,
        BLOCK_C=block_c,
    )  # fmt: skip
    return dweight, dbias


def dense_finish(
    dbuffer: Tensor, buffer: Tensor, mean: Tensor, q: Tensor, r: Tensor, start: int, channels: int
) -> Tensor:
    view = Slice("dense_finish", buffer, start, channels)
    view.operand("dbuffer", dbuffer)
    numbers = view.parameters(mean=mean, q=q, r=r)
    dy = view.dense()
    if not dy.numel():
        return dy

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            dense_finish_kernel, view.programs(flags, flags["BLOCK_HW"]), view.of(dbuffer),
            view.of(buffer), *numbers, dy, view.c, view.ld, view.hw, device=dy.device,
            warps=config.warps, **flags,
        )  # fmt: skip

    tuning.run(view.key("dense_finish", view.ld), APPLY_CONFIGS, work, dy.device)
    return dy
