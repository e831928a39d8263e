"""``conv_bn_act`` on Triton: inference, one launch; or cuDNN's fusion on a folded weight.

The kernel applies batch norm to its sums in fp32, so its weight is the convolution's own: there is
nothing to fold, to keep or to go stale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_forward
from .conv import ATEN, CUDNN, Conv, Plan, Way, in_order, plan_of, why_not
from .implicit_gemm import conv_tile, gemm_tile, part_of, result_tile
from .launch import cdiv, launch, vector
from .stream import bn_scale
from .tile import load_channels
from .ways import Native, native_ways, variant

FOLD_BLOCK = 2048


# Computes: y = act(a * conv(x) + shift + residual), shift = a * (bias - mean) + bn_bias
# Reads:    x [N, H, W, C] once a block of channels, from the L2 after the first (a 3x3: once a
#           tap); weight, cached; residual [N, P, Q, K] once; the channels' parameters [K]
# Writes:   y [N, P, Q, K] once
# Traffic:  (N*H*W*C + (1 or 2)*N*P*Q*K + K*KH*KW*C)*sizeof(x) bytes
# Split:    one program = one tile of BLOCK_M pixels and BLOCK_N channels of a group; products of
#           x's dtype on the tensor cores, fp32 sums, one rounding at the store


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "groups"])
def conv_bn_act_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, var_ptr, bn_weight_ptr,
    bn_bias_ptr, M, C, K, H, W, P, Q, groups, stride_xn, stride_xh, stride_xw, stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, eps, ACT: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, group, k0 = part_of(tl.program_id(0), groups, K, BLOCK_N)
    m0 = (part.to(tl.int64) if WIDE else part) * BLOCK_M
    if TMA:
        z = gemm_tile(
            x_ptr, weight_ptr, None, None, None, None, m0, k0, C, eps, "identity", False,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        z = conv_tile(
            x_ptr, weight_ptr, None, None, None, None, m0, group, k0, M, C, K, H, W, P, Q,
            stride_xn, stride_xh, stride_xw, stride_h, stride_w, pad_h, pad_w, dilation_h,
            dilation_w, eps, "identity", KH, KW, PADDED, False, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
    start, offs, inside, c0 = result_tile(m0, group, k0, groups, M, K, BLOCK_M, BLOCK_N)
    channels = groups * K
    _, _, a = bn_scale(bn_weight_ptr, var_ptr, c0, channels, eps, BLOCK_N)
    shift = load_channels(bias_ptr, c0, channels, BLOCK_N, 0.0)
    shift = (shift - load_channels(mean_ptr, c0, channels, BLOCK_N, 0.0)) * a
    shift += load_channels(bn_bias_ptr, c0, channels, BLOCK_N, 0.0)
    z = z * a[None, :] + shift[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + offs, act_forward(z, ACT).to(y_ptr.dtype.element_ty), mask=inside)


# Computes: folded = a * weight, shift = a * (bias - mean) + bn_bias: the convolution that equals
#           conv, then batch norm
# Reads:    weight [K, KH*KW*C] once; the channels' parameters [K]
# Writes:   folded [K, KH*KW*C] once; shift [K]
# Traffic:  2*K*KH*KW*C*sizeof(weight) bytes
# Split:    one program = FOLD_BLOCK weights of one output channel; fp32, one rounding at the store


@triton.jit
def conv_bn_act_fold_kernel(
    weight_ptr, bias_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, folded_ptr, shift_ptr,
    K, size, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    k = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start = k.to(tl.int64) * size
    _, _, a = bn_scale(bn_weight_ptr, var_ptr, k, K, eps, 1)
    weight = tl.load(weight_ptr + start + offs, mask=offs < size, other=0.0).to(tl.float32)
    folded = (weight * a).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + start + offs, folded, mask=offs < size)
    center = load_channels(mean_ptr, k, K, 1, 0.0) - load_channels(bias_ptr, k, K, 1, 0.0)
    shift = load_channels(bn_bias_ptr, k, K, 1, 0.0) - center * a
    offs_1 = k + tl.arange(0, 1)
    tl.store(shift_ptr + offs_1, shift.to(shift_ptr.dtype.element_ty))


class Inference(Conv):
    """The convolution with what follows it: checked operands, and the ways to run it."""

    def __init__(
        self, x, weight, bias, residual, bn_weight, bn_bias, mean, var, eps,
        stride, padding, dilation, groups, act,
    ):  # fmt: skip
        geometry = stride, padding, dilation, groups
        super().__init__("conv_bn_act", x, weight, geometry)
        named = dict(bias=bias, mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)
        self.params = {n: vector(self.op, n, t, self.channels) for n, t in named.items()}
        self.residual, self.eps, self.act = self._like_result(residual), eps, act

    def _like_result(self, residual: Tensor | None) -> Tensor | None:
        if residual is None:
            return None
        if residual.shape != self.out_shape or residual.dtype != self.x.dtype:
            raise ValueError(
                f"{self.op}: residual: wanted shape {self.out_shape} of {self.x.dtype}, got"
                f" {tuple(residual.shape)} of {residual.dtype}"
            )
        return residual.contiguous(memory_format=torch.channels_last)

    def triton(self, way: Way) -> Tensor:
        y, flags, p = self.new_result(), self.flags(way), self.params
        launch(
            conv_bn_act_fwd_kernel, self.programs(flags), *self.operands(flags), p["bias"],
            self.residual, y, p["mean"], p["var"], p["bn_weight"], p["bn_bias"], *self.sizes(),
            self.eps, device=y.device, warps=way.warps, stages=way.stages, ACT=self.act, **flags,
        )  # fmt: skip
        return y

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that equals conv, then batch norm."""
        folded, size, p = torch.empty_like(self.weight), self.weight[0].numel(), self.params
        shift = self.x.new_empty(self.channels)
        launch(
            conv_bn_act_fold_kernel, self.channels * cdiv(size, FOLD_BLOCK), self.weight,
            p["bias"], p["mean"], p["var"], p["bn_weight"], p["bn_bias"], folded, shift,
            self.channels, size, self.eps, device=shift.device, warps=4, BLOCK=FOLD_BLOCK,
        )  # fmt: skip
        return folded, shift

    def cudnn(self) -> Tensor:
        """cuDNN's relu(conv + shift + residual), on weights folded now: they cannot be stale."""
        weight, shift = self.folded()
        geometry = self.stride, self.padding, self.dilation, self.groups
        try:
            if self.residual is None:
                return torch.ops.aten.cudnn_convolution_relu(self.x, weight, shift, *geometry)
            return torch.ops.aten.cudnn_convolution_add_relu(
                self.x, weight, self.residual, 1.0, shift, *geometry
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise tuning.Unfit(f"cuDNN: {str(error).splitlines()[0]}") from error

    def rivals(self) -> list[Way]:
        fuses = self.act == "relu" and self.x.is_cuda and torch.backends.cudnn.is_available()
        return [CUDNN, ATEN] if fuses and torch.backends.cudnn.enabled else [ATEN]


def conv_bn_act(*args) -> Tensor:
    conv = Inference(*args)
    return tuning.run(conv.key(conv.act), conv.ways(), conv.triton, conv.x.device)


def plan(
    plain: Callable[[], Tensor], native: Native | None, x: Tensor, weight: Tensor, *args
) -> Plan:
    """Who runs the op.

    Args:
        plain: runs it by PyTorch's convolution and the streaming kernels.
        native: runs the library's CUDA kernel, if there is one.
    """
    if (reason := why_not(x, weight, args[7:11])) is not None:
        return Plan("aten", reason)
    conv = Inference(x, weight, *args)

    def work(way: Way) -> Tensor:
        if way.by == "aten":
            return plain()
        if way.by == "native":
            return native(variant(way))
        return conv.cudnn() if way.by == "cudnn" else conv.triton(way)

    own = native_ways(native, x, weight, conv.groups)
    key = conv.key(conv.act, conv.residual is not None, *["native"] * bool(own))
    return plan_of(key, in_order(conv, [*own, *conv.rivals()]), work, conv.x.device)
