"""``conv_stats`` on Triton: training, two launches: the convolution with the partial moments of its
result, and their merge. The batch norm and activation before it are applied as x is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .conv import ATEN, WITH_MOMENTS, Conv, Plan, Way, in_order, plan_of, why_not
from .implicit_gemm import conv_tile, gemm_tile, part_of, result_tile
from .launch import REDUCE_PROGRAMS, cdiv, launch, vector
from .stats import Moments, add_tile, batch_statistics
from .tile import load_channels, tiles_here
from .ways import Native, native_ways, variant

# Computes: y = conv(act(a * (x - mean) + bn_bias)) + bias; mean and M2 of a chunk of y's pixels
# Reads:    x [N, H, W, C] once a block of channels, from the L2 after the first (a 3x3: once a
#           tap); weight, cached; the norm's parameters [C]
# Writes:   y [N, P, Q, K] once; part_mean, part_m2 [chunks, K] fp32
# Traffic:  (N*H*W*C + N*P*Q*K + K*KH*KW*C)*sizeof(x) bytes, + 8*chunks*K (3% of y in chunks of one
#           tile, less in longer ones)
# Split:    one program = BLOCK_N channels of a chunk of rows, BLOCK_M at a time; fp32 sums, rounded
#           to y's dtype; the moments of the rounded values as in bn_stats


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "groups", "tiles"])
def conv_stats_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, part_mean_ptr, part_m2_ptr, mean_ptr, var_ptr,
    bn_weight_ptr, bn_bias_ptr, M, C, K, H, W, P, Q, groups, stride_xn, stride_xh, stride_xw,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tiles, eps, ACT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, group, k0 = part_of(tl.program_id(0), groups, K, BLOCK_N)
    first = (part.to(tl.int64) if WIDE else part) * tiles * BLOCK_M
    channels = groups * K
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    # Hoisting addresses out of the tiles costs registers that the moments need (spills on sm_120).
    for t in tl.range(tiles_here(first, M, tiles, BLOCK_M), disable_licm=True):
        m0 = first + t * BLOCK_M
        if TMA:
            y = gemm_tile(
                x_ptr, weight_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m0, k0, C, eps,
                ACT, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            y = conv_tile(
                x_ptr, weight_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m0, group, k0,
                M, C, K, H, W, P, Q, stride_xn, stride_xh, stride_xw, stride_h, stride_w, pad_h,
                pad_w, dilation_h, dilation_w, eps, ACT, KH, KW, PADDED, False, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        start, offs, inside, c0 = result_tile(m0, group, k0, groups, M, K, BLOCK_M, BLOCK_N)
        in_rows = (tl.arange(0, BLOCK_M) < M - m0)[:, None]
        if bias_ptr is not None:
            y += load_channels(bias_ptr, c0, channels, BLOCK_N, 0.0)[None, :]
        # Rows beyond M are zeros already, unless a bias or, in descriptors' zeros, a norm is added.
        if (bias_ptr is not None) or (TMA and mean_ptr is not None):
            y = tl.where(in_rows, y, 0.0)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + offs, y, mask=inside)
        if part_mean_ptr is not None:
            count = tl.minimum(M - m0, BLOCK_M).to(tl.float32)
            mean, m2 = add_tile(
                mean, m2, y.to(tl.float32), in_rows, 1.0 * t * BLOCK_M, count, True
            )  # fmt: skip
    if part_mean_ptr is not None:
        offs_k = tl.arange(0, BLOCK_N)
        start = part.to(tl.int64) * channels + group * K + k0
        tl.store(part_mean_ptr + start + offs_k, mean, mask=offs_k < K - k0)
        tl.store(part_m2_ptr + start + offs_k, m2, mask=offs_k < K - k0)


class Training(Conv):
    """The convolution with the norm before it: checked operands, and the ways to run it."""

    configs = (WITH_MOMENTS,)

    def __init__(
        self, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, weight, bias,
        stride, padding, dilation, groups, stats,
    ):  # fmt: skip
        super().__init__("conv_stats", x, weight, (stride, padding, dilation, groups))
        named = dict(mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)
        if mean is None:  # whatever else is given, no norm goes before
            named = dict.fromkeys(named)
        self.norm = [vector(self.op, n, t, x.shape[1]) for n, t in named.items()]
        self.bias = vector(self.op, "bias", bias, self.channels)
        self.act, self.eps, self.stats = act, eps, stats

    def triton(self, way: Way) -> tuple[Tensor, Tensor, Tensor]:
        y, flags = self.new_result(), self.flags(way)
        tiles = max(1, self.programs(flags) // REDUCE_PROGRAMS) if self.stats else 1
        chunk = tiles * flags["BLOCK_M"]
        parts = (cdiv(self.rows, chunk), self.channels) if self.stats else (0,)
        sums = [self.x.new_empty(parts, dtype=torch.float32) for _ in range(2)]
        launch(
            conv_stats_fwd_kernel, self.programs(flags, tiles), *self.operands(flags), self.bias,
            y, *(sums if self.stats else (None, None)), *self.norm, *self.sizes(), tiles, self.eps,
            device=y.device, warps=way.warps, stages=way.stages, ACT=self.act, **flags,
        )  # fmt: skip
        return y, *(batch_statistics(Moments(*sums, chunk, self.rows)) if self.stats else sums)


def conv_stats(*args) -> tuple[Tensor, Tensor, Tensor]:
    conv = Training(*args)
    return tuning.run(conv.key(conv.act), conv.ways(), conv.triton, conv.x.device)


def plan(plain: Callable[[], tuple], native: Native | None, x: Tensor, *args) -> Plan:
    """Who runs the op.

    Args:
        plain: runs it by PyTorch's convolution and the streaming kernels.
        native: runs the library's CUDA kernel, if there is one.
    """
    if (reason := why_not(x, args[7], args[9:13])) is not None:
        return Plan("aten", reason)
    conv = Training(x, *args)

    def work(way: Way) -> tuple[Tensor, Tensor, Tensor]:
        if way.by == "native":
            return native(variant(way))
        return plain() if way.by == "aten" else conv.triton(way)

    norm_act = conv.act if conv.norm[0] is not None else None
    own = native_ways(native, x, args[7], conv.groups, norm_act)
    key = conv.key(conv.act, conv.norm[0] is not None, conv.stats, *["native"] * bool(own))
    return plan_of(key, in_order(conv, [*own, ATEN]), work, conv.x.device)
