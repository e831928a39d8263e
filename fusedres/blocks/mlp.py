"""Skip-connected perceptrons: residual, and with every layer connected to all before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, dispatch, observers, reference
from .. import functional as F
from ..ops.define import numel_bytes
from ..ops.dense_mlp import dense_mlp
from .products import adds_in_place, linear, project
from .recognise import is_linear, symbolic
from .unit import autocasts, in_autocast


class ResidualMLP(nn.Module):
    """``x_{l+1} = act(W_l x_l + b_l + x_l)`` in each of ``depth`` layers (He et al. 2016, eq. 1).

    Cross-coupled, a layer adds the input of the layer before it as well,
    ``act(W_l x_l + b_l + x_l + x_{l-1})`` with ``x_{-1} = 0``.

    State dict: ``layers.0.weight``, ``layers.0.bias``, ... of nn.Linear.

    Args:
        features: width of the input, of each layer and of the result.
        depth: number of layers.
        act: activation of each sum.
        cross_coupled: whether a layer has two shortcuts.
        bias: of the layers.

    Raises:
        ValueError: features or depth < 1; an unknown act.
        TypeError: one that is no whole number; in the forward another dtype than the weights'.
    """

    def __init__(
        self, features: int, depth: int, *, act: str = "relu", cross_coupled: bool = False,
        bias: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _check(act, features=features, depth=depth)
        self.act, self.cross_coupled = act, cross_coupled
        self.layers = nn.ModuleList(
            nn.Linear(features, features, bias, device=device, dtype=dtype) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> the same shape."""
        if symbolic(x):
            return plain_residual(self, x)
        _check_input(x, self.layers[0], self.layers[0].in_features)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        before = None
        for layer in self.layers:
            own = is_linear(layer)
            branch = linear(x, layer.weight, layer.bias) if own else layer(x)
            shortcut = x if before is None else x + before
            before = x if self.cross_coupled else None
            if own and self.act == "relu" and _aten_adds(branch, shortcut):
                moved, reason = 5 * numel_bytes(branch), "in place, on a CPU"
                observers.notify(observers.Event("residual_add", "aten", reason, 2, moved, moved))
                x = branch.add_(shortcut).relu_()
                continue
            dtype = torch.promote_types(branch.dtype, shortcut.dtype)
            x = F.residual_add(branch.to(dtype), shortcut.to(dtype), act=self.act)
        return x.view(shape)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, cross_coupled={self.cross_coupled}"


class DenselyConnectedMLP(nn.Module):
    """``h_l = act(W_l [x, h_1, ..., h_{l-1}] + b_l)``, ``y = W [x, h_1, ..., h_depth] + b``.

    Every layer has skip connections to all layers behind it (Lang and Witbrock 1988). The features
    are written in place into one buffer, so that nothing is concatenated and the memory kept for
    the backward is linear in the depth.

    State dict: ``layers.0.weight``, ..., ``output.weight``, ``output.bias`` of nn.Linear.

    Args:
        in_features, hidden_features, out_features: widths of the input, each layer, the result.
        depth: number of hidden layers.
        act: activation of the hidden layers.
        bias: of all layers.

    Raises:
        ValueError: a width or depth < 1; an unknown act.
        TypeError: one that is no whole number; in the forward another dtype than the weights'.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int, depth: int, *,
        act: str = "relu", bias: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _check(
            act, in_features=in_features, hidden_features=hidden_features,
            out_features=out_features, depth=depth,
        )  # fmt: skip
        self.act, self.in_features = act, in_features
        to = dict(device=device, dtype=dtype)
        widths = [in_features + i * hidden_features for i in range(depth + 1)]
        self.layers = nn.ModuleList(nn.Linear(w, hidden_features, bias, **to) for w in widths[:-1])
        self.output = nn.Linear(widths[-1], out_features, bias, **to)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if symbolic(x):
            return plain_dense(self, x)
        _check_input(x, self.layers[0], self.in_features)
        if not all(map(is_linear, self.layers)):
            return plain_dense(self, x)
        rows = x.reshape(-1, x.shape[-1])
        operands = [rows]
        for layer in self.layers:
            operands += [layer.weight, layer.bias]
        if autocasts(rows, self.layers[0].weight):
            operands = [in_autocast(t) for t in operands]
        y = project(self.output, dense_mlp(*operands, act=self.act))
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


def plain_residual(mlp: ResidualMLP, x: Tensor) -> Tensor:
    """The network on PyTorch's own functions, for traces and ``unfuse``."""
    before = 0
    for layer in mlp.layers:
        z = layer(x) + x + before
        before = x if mlp.cross_coupled else 0
        x = reference.ACTIVATIONS[mlp.act](z)
    return x


def plain_dense(mlp: DenselyConnectedMLP, x: Tensor) -> Tensor:
    """The network on PyTorch's own functions, for traces, for ``unfuse`` and for other layers."""
    for layer in mlp.layers:
        x = torch.cat([x, reference.ACTIVATIONS[mlp.act](layer(x))], -1)
    return mlp.output(x)


def _aten_adds(branch: Tensor, shortcut: Tensor) -> bool:
    """Whether PyTorch adds and activates in place: on a CPU that beats a pass of ours.

    Two passes in the cache against a new tensor, and no Python in the backward.
    """
    by_choice = branch.device.type == "cpu" and dispatch.forced_backend() is None
    return by_choice and adds_in_place(branch, shortcut)


def _check(act: str, **sizes: int) -> None:
    checks.activation("act", act)
    for name, size in sizes.items():
        checks.size(name, size)


def _check_input(x: Tensor, layer: nn.Module, features: int) -> None:
    weight = layer.weight if type(layer) is nn.Linear else x  # another layer may take more
    checks.layer_input("x", x, weight)
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"x: wanted shape [..., {features}], got {tuple(x.shape)}")
