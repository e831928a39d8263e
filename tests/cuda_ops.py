"""The CUDA kernels with the ops' own arguments and results, run on the host simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import cuda_host
import fusedres
from cases import DTYPES
from fusedres import reference, triton_kernels
from fusedres.layout import mask_shape
from fusedres.ops.convolution import conv_shape
from fusedres.ops.squeeze_excite import fake_mlp, fake_mlp_grads

ACTS = ("identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")


def new_mask(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(mask_shape(x) if wanted else (0,), dtype=torch.uint8)


def given(mask: Tensor) -> Tensor | None:
    return mask if mask.numel() else None


def acc(x: Tensor, t: Tensor | None) -> Tensor | None:
    """A parameter as the contract wants it: contiguous, in the accumulator's dtype."""
    return None if t is None else t.to(reference.acc_dtype(x.dtype)).contiguous()


def residual_mix(branch, shortcut, gate, row_scale, alpha, beta, act, save_mask):
    y, mask = torch.empty_like(branch), new_mask(branch, save_mask)
    if branch.numel():
        cuda_host.call(
            "residual_mix", "forward", branch, alpha=alpha, beta=beta, act=ACTS.index(act),
            branch=branch, shortcut=shortcut, gate=gate, row_scale=acc(branch, row_scale), y=y,
            mask_out=given(mask),
        )  # fmt: skip
    return y, mask


def residual_mix_backward(dy, branch, shortcut, gate, row_scale, mask, alpha, beta, act):
    dbranch, dshortcut = torch.empty_like(dy), torch.empty_like(dy)
    dgate = dy.new_empty(0) if gate is None else torch.empty_like(dy)
    if dy.numel():
        cuda_host.call(
            "residual_mix", "backward", dy, alpha=alpha, beta=beta, act=ACTS.index(act),
            branch=branch, shortcut=shortcut, gate=gate, row_scale=acc(dy, row_scale), dy=dy,
            mask=given(mask), dbranch=dbranch, dshortcut=dshortcut, dgate=given(dgate),
        )  # fmt: skip
    return dbranch, dshortcut, dgate


def new_stats(x):
    shape, dtype = (x.shape[1],), reference.acc_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def cases_of(options: Iterable[str]) -> pytest.MarkDecorator:
    """Every case in every dtype; the largest, of ResNet's stages, in two."""
    large = torch.float32, torch.bfloat16
    pairs = [(c, d) for c in options for d in DTYPES if not c.startswith("stage") or d in large]
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=str)


VARIANTS = ("by_size", "streaming", "whole")  # "whole": the op's one-launch form
TILES = ("by_size", "128x128", "128x64", "64x64")  # variants of the convolutions
SM90_TILES = ("sm90_64", "sm90_128", "sm90_256")  # and of sm_90a, by their columns
_variant = 0


def bn_stats(x):
    mean, var = new_stats(x)
    if not x.numel():
        return mean.zero_(), var.zero_()
    cuda_host.call("bn_act", "forward", x, variant=_variant, x=x, mean=mean, var=var)
    return mean, var


def bn_act(x, weight, bias, residual, mean, var, batch_stats, eps, act, save_mask):
    y, mask = torch.empty_like(x), new_mask(x, save_mask)
    saved = new_stats(x)
    if x.numel():
        cuda_host.call(
            "bn_act", "forward", x, variant=_variant, eps=eps, act=ACTS.index(act), x=x, residual=residual,
            weight=acc(x, weight), bias=acc(x, bias), given_mean=acc(x, mean),
            given_var=acc(x, var), y=y, mean=saved[0], var=saved[1], mask_out=given(mask),
        )  # fmt: skip
    else:
        for out, value in zip(saved, (mean, var), strict=True):
            out.copy_(torch.zeros(()) if value is None else value)
    return y, *saved, mask


def bn_act_backward(
    dy, x, weight, bias, residual, mean, var, mask, batch_stats, eps, act, need_dresidual
):
    dx, (dweight, dbias) = torch.empty_like(x), new_stats(x)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    if x.numel():
        cuda_host.call(
            "bn_act", "backward", x, variant=_variant, batch_stats=batch_stats, eps=eps, act=ACTS.index(act), x=x,
            residual=residual, weight=acc(x, weight), bias=acc(x, bias), given_mean=mean,
            given_var=var, dy=dy, mask=given(mask), dx=dx, dresidual=given(dresidual),
            dweight=dweight, dbias=dbias,
        )  # fmt: skip
    else:
        dweight.zero_(), dbias.zero_()
    return dx, dweight, dbias, dresidual


GATES = ("sigmoid", "hard_sigmoid")


def squeeze_excite(x, w1, b1, w2, b2, residual, act, gate, post_act, save_mask):
    y, mask = torch.empty_like(x), new_mask(x, save_mask)
    squeezed, hidden, logits = (v.contiguous() for v in fake_mlp(x, w1))
    cuda_host.call(
        "squeeze_excite", "forward", x, variant=_variant, r=w1.shape[0], act=ACTS.index(act), gate=GATES.index(gate),
        post_act=ACTS.index(post_act), x=x, residual=residual, w1=acc(x, w1), b1=acc(x, b1),
        w2=acc(x, w2), b2=acc(x, b2), squeezed=squeezed, hidden=hidden, logits=logits, y=y,
        mask_out=given(mask),
    )  # fmt: skip
    return y, squeezed, hidden, logits, mask


def squeeze_excite_backward(
    dy, x, w1, w2, residual, squeezed, hidden, logits, mask, act, gate, post_act, need_dresidual
):
    dx, (dw1, db1, dw2, db2) = torch.empty_like(x), fake_mlp_grads(x, w1)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    cuda_host.call(
        "squeeze_excite", "backward", x, variant=_variant, r=w1.shape[0], act=ACTS.index(act),
        gate=GATES.index(gate), post_act=ACTS.index(post_act), x=x, residual=residual,
        w1=acc(x, w1), w2=acc(x, w2), squeezed=squeezed, hidden=hidden, logits=logits, dy=dy,
        mask=given(mask), dx=dx, dresidual=given(dresidual), dw1=dw1, db1=db1, dw2=dw2, db2=db2,
    )  # fmt: skip
    return dx, dw1, db1, dw2, db2, dresidual


def bn_se_act(
    x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps, se_act, gate, act,
    save_mask,
):  # fmt: skip
    y, mask, saved = torch.empty_like(x), new_mask(x, save_mask), new_stats(x)
    squeezed, hidden, logits = fake_mlp(x, w1)
    cuda_host.call(
        "bn_se_act", "forward", x, r=w1.shape[0], eps=eps, se_act=ACTS.index(se_act),
        gate=GATES.index(gate), act=ACTS.index(act), x=x, residual=residual, weight=acc(x, weight),
        bias=acc(x, bias), w1=acc(x, w1), b1=acc(x, b1), w2=acc(x, w2), b2=acc(x, b2),
        given_mean=acc(x, mean), given_var=acc(x, var), mean=saved[0], var=saved[1],
        squeezed=squeezed, hidden=hidden, logits=logits, y=y, mask_out=given(mask),
    )  # fmt: skip
    return y, *saved, squeezed, hidden, logits, mask


def bn_se_act_backward(
    dy, x, weight, bias, w1, w2, residual, mean, var, squeezed, hidden, logits, mask, batch_stats,
    eps, se_act, gate, act, need_dresidual,
):  # fmt: skip
    dx, (dweight, dbias) = torch.empty_like(x), new_stats(x)
    dw1, db1, dw2, db2 = fake_mlp_grads(x, w1)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    cuda_host.call(
        "bn_se_act", "backward", x, batch_stats=batch_stats, r=w1.shape[0], eps=eps,
        se_act=ACTS.index(se_act), gate=GATES.index(gate), act=ACTS.index(act), x=x,
        residual=residual, weight=acc(x, weight), bias=acc(x, bias), w1=acc(x, w1), w2=acc(x, w2),
        given_mean=mean, given_var=var, squeezed=squeezed, hidden=hidden, logits=logits, dy=dy,
        mask=given(mask), dx=dx, dresidual=given(dresidual), dweight=dweight, dbias=dbias, dw1=dw1,
        db1=db1, dw2=dw2, db2=db2,
    )  # fmt: skip
    return dx, dweight, dbias, dw1, db1, dw2, db2, dresidual


def conv_call(op, x, weight, geometry, /, **members):
    """Launch a convolution's kernels: its operands in NHWC, its result from the geometry."""
    stride, padding, dilation, groups = geometry
    y = torch.empty(
        conv_shape(x.shape, weight, geometry), dtype=x.dtype, memory_format=torch.channels_last
    )
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    (k, p, q), (c, h, w) = y.shape[1:], x.shape[1:]
    pairs = dict(stride=stride, pad=padding, dilation=dilation)
    sizes = {f"{name}_{d}": pair[i] for name, pair in pairs.items() for i, d in enumerate("hw")}
    cuda_host.call(
        op, "forward", x, variant=_variant, c=c, h=h, w=w, p=p, q=q, k=k, groups=groups,
        kh=weight.shape[2], kw=weight.shape[3], x=x, weight=weight, y=y, **sizes, **members,
    )  # fmt: skip
    return y


def conv_bn_act(
    x, weight, bias, residual, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation,
    groups, act,
):  # fmt: skip
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    params = dict(bias=bias, bn_weight=bn_weight, bn_bias=bn_bias, mean=mean, var=var)
    return conv_call(
        "conv_bn_act", x, weight, (stride, padding, dilation, groups), eps=eps,
        act=ACTS.index(act), residual=residual, **{n: acc(x, t) for n, t in params.items()},
    )  # fmt: skip


def conv_stats(
    x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, weight, bias, stride, padding,
    dilation, groups, stats,
):  # fmt: skip
    params = dict(bias=bias, bn_weight=bn_weight, bn_bias=bn_bias, mean=mean, var=var)
    found = [torch.empty(weight.shape[0] if stats else 0) for _ in range(2)]
    y = conv_call(
        "conv_stats", x, weight, (stride, padding, dilation, groups), eps=eps,
        act=ACTS.index(act), y_mean=given(found[0]), y_var=given(found[1]),
        **{n: acc(x, t) for n, t in params.items()},
    )  # fmt: skip
    return y, *found


_OPS = (
    residual_mix, residual_mix_backward, bn_stats, bn_act, bn_act_backward, squeeze_excite,
    squeeze_excite_backward, bn_se_act, bn_se_act_backward, conv_bn_act, conv_stats,
)  # fmt: skip
LAUNCHERS = {f.__name__: f for f in _OPS}


@contextlib.contextmanager
def cuda_on_host(*, variant: str = "by_size", **machine) -> Iterator[list[str]]:
    """Ops run their CUDA kernels on the simulator, in the place of Triton's; yields the kernels.

    ``variant`` is that of ops with several; ``machine`` as for ``cuda_host.machine``.
    """
    global _variant
    tiles = *TILES, *SM90_TILES
    _variant = (tiles if variant in tiles else VARIANTS).index(variant)
    replaced = mock.patch.multiple(
        triton_kernels,
        has=LAUNCHERS.__contains__,
        launcher=LAUNCHERS.__getitem__,
        can_run=lambda op, x, by_name: None,
    )
    cuda_host.launched.clear()
    cuda_host.clusters.clear()
    with replaced, cuda_host.machine(**machine), fusedres.backend("triton"):
        yield cuda_host.launched
