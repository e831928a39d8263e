"""The squeeze-excite MLP on [N, C]: small matrix products that read the weights once a block of
images, with the activation on the way in or out and the biases' gradients as row sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_backward, act_forward
from .launch import View, cdiv, launch


@dataclass(frozen=True)
class Blocks:
    """How a matrix product is launched: its output block, its step along K, warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# The first is the default. None was measured on a GPU yet.
CONFIGS = (Blocks(16, 32, 64, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3))

# Computes: out = A @ B + bias, with act on A ("a") or B ("b"), or act' on the result ("out"):
#           out = (A @ B) * act'(z); row_sum = sum_k A
# Reads:    A [M, K], B [K, N] of any dtype and strides, once a block of N or M; bias [N]; z [M, N]
# Writes:   out [M, N] fp32, row_sum [M] fp32
# Traffic:  4*(M*K*ceil(N/BLOCK_N) + K*N*ceil(M/BLOCK_M) + M*N) bytes, from the L2 after the first
# Split:    one program = one block of out; fp32 products as three TF32 ones on the tensor cores
#           (error of fp32's order), or one where PyTorch allows TF32


@triton.jit
def se_mlp_kernel(
    a_ptr, b_ptr, bias_ptr, z_ptr, out_ptr, row_sum_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, ACT: tl.constexpr, ACT_ON: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid_n = tl.program_id(0) % blocks_n
    pid_m = tl.program_id(0) // blocks_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None].to(tl.int64) * stride_bk + offs_n[None, :] * stride_bn
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = offs_k < K - k0
        a = tl.load(a_ptrs, mask=mask_m & in_k[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=in_k[:, None] & mask_n, other=0.0).to(tl.float32)
        if ACT_ON == "a":
            a = act_forward(a, ACT)
        if ACT_ON == "b":
            b = act_forward(b, ACT)
        if row_sum_ptr is not None:
            row_sum += tl.sum(a, 1)
        out = tl.dot(a, b, out, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    inside = mask_m & mask_n
    offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if ACT_ON == "out":
        out = act_backward(tl.load(z_ptr + offs, mask=inside, other=0.0), out, ACT)
    tl.store(out_ptr + offs, out, mask=inside)
    if row_sum_ptr is not None:
        tl.store(row_sum_ptr + offs_m, row_sum, mask=(offs_m < M) & (pid_n == 0))


def _product(
    view: View, a: Tensor, b: Tensor, *, bias: Tensor | None = None, act: str = "identity",
    act_on: str = "none", z: Tensor | None = None, row_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The kernel's matrix product of ``a [M, K]`` and ``b [K, N]``, of any strides."""
    (m, k), n = a.shape, b.shape[1]
    out = view.new(m, n)
    allowed = a.is_cuda and torch.backends.cuda.matmul.allow_tf32

    def work(config: Blocks) -> Tensor:
        launch(
            se_mlp_kernel, cdiv(m, config.m) * cdiv(n, config.n), a, b, bias, z, out, row_sum,
            m, n, k, *a.stride(), *b.stride(), device=out.device, warps=config.warps,
            stages=config.stages, ACT=act, ACT_ON=act_on,
            PRECISION="tf32" if allowed else "tf32x3",
            BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
        )  # fmt: skip
        return out

    key = "|".join(map(str, ("se_mlp", b.dtype, f"{m}x{n}x{k}", act, act_on)))
    return tuning.run(key, CONFIGS, work, out.device)


@dataclass(frozen=True)
class Weights:
    """The MLP's parameters, checked: w1 [R, C], b1 [R], w2 [C, R], b2 [C]; any dtype, strides."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: str

    @staticmethod
    def of(view: View, w1, b1, w2, b2, act: str) -> Weights:
        r, c = w1.shape[0], view.c
        wanted = {"w1": (w1, (r, c)), "b1": (b1, (r,)), "w2": (w2, (c, r)), "b2": (b2, (c,))}
        for name, (t, shape) in wanted.items():
            if t is not None and t.shape != shape:
                raise ValueError(f"{view.op}: {name}: wanted shape {shape}, got {tuple(t.shape)}")
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        return Weights(w1, b1, w2, b2, act)

    def forward(self, view: View, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """hidden = w1 pooled + b1 [N, R] and logits = w2 act(hidden) + b2 [N, C]."""
        hidden = _product(view, pooled, self.w1.t(), bias=self.b1)
        on_a = dict(act=self.act, act_on="a")
        return hidden, _product(view, hidden, self.w2.t(), bias=self.b2, **on_a)

    def backward(
        self, view: View, dlogits: Tensor, pooled: Tensor, hidden: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """dpooled [N, C], and (dw1, db1, dw2, db2) in fp32."""
        on = dict(act=self.act)
        dhidden = _product(view, dlogits, self.w2, act_on="out", z=hidden, **on)
        dpooled = _product(view, dhidden, self.w1)
        db1, db2 = view.new(self.w1.shape[0]), view.new(view.c)
        dw2 = _product(view, dlogits.t(), hidden, act_on="b", row_sum=db2, **on)
        dw1 = _product(view, dhidden.t(), pooled, row_sum=db1)
        return dpooled, (dw1, db1, dw2, db2)

    def no_gradients(self, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients over no images."""
        r, c = self.w1.shape
        shapes = (r, c), (r,), (c, r), (c,)
        return tuple(view.new(*shape).zero_() for shape in shapes)
