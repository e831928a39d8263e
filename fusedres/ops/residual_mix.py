"""``residual_mix``: ``act(alpha * s[n] * branch + beta * shortcut)``, and its highway form.

Scaled residuals, stochastic depth (``s`` is zero or 1/(1-p) for each image) and the highway
network's gate are one pass: two or three reads and one write.
"""

from __future__ import annotations

import torch

from .. import reference
from ..layout import in_layout, mask_shape, memory_format, pack_mask, unpack_mask
from .define import Traffic, by_reference, define, empty_mask, numel_bytes, vjp

SCHEMA = (
    "residual_mix(Tensor branch, Tensor shortcut, Tensor? gate, Tensor? row_scale,"
    " float alpha, float beta, str act, bool save_mask) -> (Tensor y, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "residual_mix_backward(Tensor dy, Tensor? branch, Tensor? shortcut, Tensor? gate,"
    " Tensor? row_scale, Tensor mask, float alpha, float beta, str act)"
    " -> (Tensor dbranch, Tensor dshortcut, Tensor dgate)"
)


def _reference(branch, shortcut, gate, row_scale, alpha, beta, act, save_mask):
    y, z = reference.residual_mix(branch, shortcut, gate, row_scale, alpha, beta, act)
    mask = empty_mask(branch)
    if save_mask:
        mask = pack_mask(reference.activation_mask(z, act), like=branch)
    return y, mask


def _fake(branch, shortcut, gate, row_scale, alpha, beta, act, save_mask):
    shape = mask_shape(branch) if save_mask else (0,)
    return torch.empty_like(branch), branch.new_empty(shape, dtype=torch.uint8)


def _fake_backward(dy, branch, shortcut, gate, row_scale, mask, alpha, beta, act):
    dgate = dy.new_empty(0) if gate is None else torch.empty_like(dy)
    return torch.empty_like(dy), torch.empty_like(dy), dgate


def _setup_context(ctx, inputs, output):
    branch, shortcut, gate, row_scale, ctx.alpha, ctx.beta, ctx.act, save_mask = inputs
    _, mask = output
    ctx.layout = memory_format(branch)  # the mask is in this order
    # Without a gate the derivative is linear in dy: the operands are needed only to find z again.
    keep = gate is not None or (ctx.act != "identity" and not save_mask)
    operands = (branch, shortcut) if keep else (None, None)
    ctx.save_for_backward(*operands, gate, row_scale, mask)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    branch, shortcut, gate, row_scale, mask = ctx.saved_tensors
    dy, branch, shortcut, gate = in_layout(ctx.layout, dy, branch, shortcut, gate)
    needed = ctx.needs_input_grad[:3]
    if by_reference("residual_mix", dy):
        inputs = branch, shortcut, gate
        grads = _differentiable_backward(ctx, dy, inputs, row_scale, mask, needed)
    else:
        grads = backward_op(
            dy, branch, shortcut, gate, row_scale, mask, ctx.alpha, ctx.beta, ctx.act
        )
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, None, None, None, None, None


def _differentiable_backward(ctx, dy, inputs, row_scale, mask, needed):
    bits = unpack_mask(mask, dy) if mask.numel() else None
    branch, shortcut, gate = inputs
    if branch is None:
        branch, shortcut = torch.zeros_like(dy), torch.zeros_like(dy)

    def fn(branch, shortcut, gate):
        act = ctx.act if bits is None else "identity"
        y, _ = reference.residual_mix(branch, shortcut, gate, row_scale, ctx.alpha, ctx.beta, act)
        return y if bits is None else reference.masked_activation(y, ctx.act, bits)

    return vjp(fn, (branch, shortcut, gate), needed, dy)


def bytes_moved(branch, shortcut, gate, row_scale, alpha, beta, act, save_mask) -> int:
    """Reads branch, shortcut and gate, writes y."""
    mask = branch.numel() // 8 if save_mask else 0
    return (3 + (gate is not None)) * numel_bytes(branch) + mask


def eager_bytes(branch, shortcut, gate, row_scale, alpha, beta, act, save_mask) -> int:
    """Eager: each scale RW, gates RW + RRW + RRW, add RRW, activation RW."""
    scales = (row_scale is not None) + (alpha != 1) + (beta != 1)
    passes = 2 * scales + 8 * (gate is not None) + 3 + 2 * (act != "identity")
    return passes * numel_bytes(branch)


def backward_bytes_moved(dy, branch, shortcut, gate, row_scale, mask, alpha, beta, act) -> int:
    """Reads dy and what was kept, writes a gradient for each operand."""
    reads = 1 + sum(t is not None for t in (branch, shortcut, gate))
    return (reads + 2 + (gate is not None)) * numel_bytes(dy) + mask.numel()


def backward_eager_bytes(dy, branch, shortcut, gate, row_scale, mask, alpha, beta, act) -> int:
    """Eager: activation RRW, each scale RW, the gate's products 4 RRW and one accumulation RRW."""
    scales = (row_scale is not None) + (alpha != 1) + (beta != 1)
    passes = 3 * (act != "identity") + 2 * scales + 15 * (gate is not None)
    return passes * numel_bytes(dy)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes, flops=lambda branch, *_: 4 * branch.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved, backward_eager_bytes, flops=lambda dy, *_: 3 * dy.numel()
    ),
)
