"""The CUDA kernels with the ops' own arguments and results, run on the host simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

import cuda_host
import fusedres
from fusedres import reference, triton_kernels
from fusedres.layout import mask_shape

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


LAUNCHERS = {f.__name__: f for f in (residual_mix, residual_mix_backward)}


@contextlib.contextmanager
def cuda_on_host(**machine) -> Iterator[list[str]]:
    """Ops run their CUDA kernels on the simulator, in the place of Triton's; yields the launches."""
    replaced = mock.patch.multiple(
        triton_kernels,
        has=LAUNCHERS.__contains__,
        launcher=LAUNCHERS.__getitem__,
        can_run=lambda op, x, by_name: None,
    )
    cuda_host.launched.clear()
    with replaced, cuda_host.machine(**machine), fusedres.backend("triton"):
        yield cuda_host.launched
