"""``conv_grad`` on Triton: the gradient through a convolution, and the norm and act before it.

Three launches: the convolution with the partial sums of batch norm's backward, their merge, apply.
Where the statistics are constants the first one's result is the gradient: two launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import passes, tuning
from .activations import act_backward, act_forward
from .bn_act import backward_at_once, merged
from .conv import ATEN, WITH_MOMENTS, Conv, Plan, Way, in_order, plan_of, why_not
from .implicit_gemm import conv_tile, gemm_tile, part_of, result_tile
from .launch import REDUCE_PROGRAMS, View, cdiv, launch
from .passes import Incoming, Norm
from .stream import bn_scale
from .tile import load_channels, tiles_here
from .ways import Native

# Computes: u = act'(z) * conv'(dy) with z = a * (x - mean) + bn_bias, act(z); sums of u and of
#           u * (x - mean) over a chunk of pixels; a * u for u where statistics are constants
# Reads:    dy [N, P, Q, C] once a block of channels, from the L2 after the first (a 3x3: once a
#           tap); weight, cached; x [N, H, W, K] once; the norm's parameters [K]
# Writes:   u, h [N, H, W, K] once; sum_u, sum_ux [chunks, K] fp32
# Traffic:  (N*P*Q*C + (2 or 3)*N*H*W*K + K*KH*KW*C)*sizeof(x) bytes, + 8*chunks*K
# Split:    as conv_stats_fwd; the sums are of u as it is stored, in fp32


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "groups", "tiles"])
def conv_grad_kernel(
    dy_ptr, weight_ptr, x_ptr, u_ptr, h_ptr, sum_u_ptr, sum_ux_ptr, mean_ptr, var_ptr,
    bn_weight_ptr, bn_bias_ptr, M, C, K, H, W, P, Q, groups, stride_dn, stride_dh, stride_dw,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tiles, eps, ACT: tl.constexpr,
    BATCH_STATS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PADDED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, group, k0 = part_of(tl.program_id(0), groups, K, BLOCK_N)
    first = (part.to(tl.int64) if WIDE else part) * tiles * BLOCK_M
    channels = groups * K
    sum_u = tl.zeros((BLOCK_N,), tl.float32)
    sum_ux = tl.zeros((BLOCK_N,), tl.float32)
    for t in tl.range(tiles_here(first, M, tiles, BLOCK_M), disable_licm=True):
        m0 = first + t * BLOCK_M
        if TMA:
            dh = gemm_tile(
                dy_ptr, weight_ptr, None, None, None, None, m0, k0, C, eps, "identity", True,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            dh = conv_tile(
                dy_ptr, weight_ptr, None, None, None, None, m0, group, k0, M, C, K, H, W, P, Q,
                stride_dn, stride_dh, stride_dw, stride_h, stride_w, pad_h, pad_w, dilation_h,
                dilation_w, eps, "identity", KH, KW, PADDED, True, PRECISION, BLOCK_M, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
        start, offs, inside, c0 = result_tile(m0, group, k0, groups, M, K, BLOCK_M, BLOCK_N)
        _, _, a = bn_scale(bn_weight_ptr, var_ptr, c0, channels, eps, BLOCK_N)
        mean = load_channels(mean_ptr, c0, channels, BLOCK_N, 0.0)
        shift = load_channels(bn_bias_ptr, c0, channels, BLOCK_N, 0.0)
        x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, x - mean[None, :], 0.0)
        z = centered * a[None, :] + shift[None, :]
        if h_ptr is not None:
            h = act_forward(z, ACT).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + start + offs, h, mask=inside)
        u = tl.where(inside, act_backward(z, dh, ACT), 0.0)
        if BATCH_STATS:
            rounded = u.to(u_ptr.dtype.element_ty)
            u = rounded.to(tl.float32)
        else:
            rounded = (u * a[None, :]).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + start + offs, rounded, mask=inside)
        sum_u += tl.sum(u, 0)
        sum_ux += tl.sum(u * centered, 0)
    offs_k = tl.arange(0, BLOCK_N)
    start = part.to(tl.int64) * channels + group * K + k0
    tl.store(sum_u_ptr + start + offs_k, sum_u, mask=offs_k < K - k0)
    tl.store(sum_ux_ptr + start + offs_k, sum_ux, mask=offs_k < K - k0)


class Gradient(Conv):
    """The convolution of dy that is the gradient, and the norm that follows it backwards."""

    configs = (WITH_MOMENTS,)

    def __init__(
        self, dy, weight, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act,
        stride, padding, dilation, groups, make_h,
    ):  # fmt: skip
        outside = [
            d * (taps - 1) - p
            for d, taps, p in zip(dilation, weight.shape[2:], padding, strict=True)
        ]
        geometry = stride, outside, dilation, groups
        super().__init__("conv_grad", dy, weight, geometry, transposed=True)
        self.view, self.act, self.make_h = View(self.op, x, images=False), act, make_h
        self.norm = Norm.of(self.view, bn_weight, bn_bias, mean, var, batch_stats, eps)

    def triton(self, way: Way) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        view, norm, flags = self.view, self.norm, self.flags(way)
        u, nothing = self.new_result(), self.x.new_empty(0)
        h = self.new_result() if self.make_h else None
        tiles = max(1, self.programs(flags) // REDUCE_PROGRAMS)
        parts = cdiv(self.rows, tiles * flags["BLOCK_M"]), view.c
        sums = view.new(*parts), view.new(*parts)
        launch(
            conv_grad_kernel, self.programs(flags, tiles), *self.operands(flags), view.x, u, h,
            *sums, *norm.pointers, *self.sizes(), tiles, norm.eps, device=u.device,
            warps=way.warps, stages=way.stages, ACT=self.act, BATCH_STATS=norm.batch_stats, **flags,
        )  # fmt: skip
        dweight, dbias = merged(*sums, norm)
        dx = u
        if norm.batch_stats:
            dx = torch.empty_like(u)
            given = Incoming(u, None, None, "identity")
            passes.backward_apply(view, given, norm, dx, nothing, through=(dweight, dbias))
        return dx, dweight, dbias, nothing if h is None else h


def why_not_gradient(dy: Tensor, weight: Tensor, x: Tensor, geometry: tuple) -> str | None:
    """Why the kernel does not take this gradient, or None."""
    stride, padding, dilation, _ = geometry
    if (reason := why_not(x, weight, geometry)) is not None:
        return reason
    if any(s != 1 for s in stride):
        return "the gradient of a convolution with a stride is none of dy without gaps"
    taps = weight.shape[2:]
    if any(p > d * (t - 1) for p, d, t in zip(padding, dilation, taps, strict=True)):
        return "the padding is wider than the kernel"
    nhwc = (t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x))
    return None if all(nhwc) else "the kernel reads dense channels_last tensors"


def conv_grad(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    conv = Gradient(*args)
    return tuning.run(conv.key(conv.act), conv.ways(), conv.triton, conv.x.device)


def plan(
    plain: Callable[[], tuple], native: Native | None, dy: Tensor, weight: Tensor, x: Tensor, *args
) -> Plan:
    """Who runs the op.

    Args:
        plain: runs it by PyTorch's convolution and the streaming kernels.
        native: None: the library has no CUDA kernel of this op.
    """
    if (reason := why_not_gradient(dy, weight, x, args[7:11])) is not None:
        return Plan("aten", reason)
    conv = Gradient(dy, weight, x, *args)

    def work(way: Way) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return plain() if way.by == "aten" else conv.triton(way)

    key = conv.key(conv.act, conv.norm.batch_stats, conv.make_h)
    if backward_at_once(conv.view):  # fewer launches, and x and the gradient are read once too
        why = "batch norm's backward is one launch"
        return plan_of(key, [ATEN, *conv.ways()], work, conv.x.device, why)
    return plan_of(key, in_order(conv, [ATEN]), work, conv.x.device)
