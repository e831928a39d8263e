"""Transformer residuals: the addition, dropout, drop path and the norm behind it in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, observers
from .. import functional as F
from .products import project
from .recognise import hooked, symbolic


class AddLayerNorm(nn.LayerNorm):
    """``s = residual + drop_path(dropout(x)); (layer_norm(s), s)``: an nn.LayerNorm, same keys.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as for nn.LayerNorm.
        dropout, drop_path: probabilities of dropping an element, and a sample, in training.
        batch_dim: the dimension that counts samples (drop path only).

    Raises:
        ValueError: a probability outside 0 to 1; a negative batch_dim.
    """

    def __init__(
        self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, *, dropout: float = 0.0, drop_path: float = 0.0, batch_dim: int = 0,
        device=None, dtype=None,
    ):  # fmt: skip
        _check_drops(dropout, drop_path, batch_dim)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout, self.drop_path, self.batch_dim = dropout, drop_path, batch_dim

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``residual``: [..., *normalized_shape]; returns the norm and the sum."""
        return F.add_layer_norm(
            x, residual, self.normalized_shape, self.weight, self.bias, self.eps, **_drops(self)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_drops_repr(self)}"


class AddRMSNorm(nn.RMSNorm):
    """``s = residual + drop_path(dropout(x)); (rms_norm(s), s)``: an nn.RMSNorm, same keys.

    Args:
        normalized_shape, eps, elementwise_affine: as for nn.RMSNorm.
        dropout, drop_path, batch_dim: as for AddLayerNorm.

    Raises:
        ValueError: a probability outside 0 to 1; a negative batch_dim.
    """

    def __init__(
        self, normalized_shape, eps: float | None = None, elementwise_affine: bool = True, *,
        dropout: float = 0.0, drop_path: float = 0.0, batch_dim: int = 0, device=None, dtype=None,
    ):  # fmt: skip
        _check_drops(dropout, drop_path, batch_dim)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout, self.drop_path, self.batch_dim = dropout, drop_path, batch_dim

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``residual``: [..., *normalized_shape]; returns the norm and the sum."""
        return F.add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.eps, **_drops(self)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_drops_repr(self)}"


def _check_drops(dropout: float, drop_path: float, batch_dim: int) -> None:
    checks.probability("dropout", dropout)
    checks.probability("drop_path", drop_path)
    checks.size("batch_dim", batch_dim, 0)


def _drops(module) -> dict:
    drops = dict(dropout=module.dropout, drop_path=module.drop_path)
    return drops | dict(training=module.training, batch_dim=module.batch_dim)


def _drops_repr(module) -> str:
    return f"dropout={module.dropout}, drop_path={module.drop_path}"


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer with each residual addition, its dropout and its norm one pass.

    The same arguments, state dict, results and random numbers, pre-norm (``norm_first=True``) and
    post-norm. It runs as PyTorch's own in inference where that has its fused forward, on nested
    tensors, and where a norm or a dropout has been exchanged or has hooks.

    Args:
        drop_path: probability of dropping the branch of a sample in training (stochastic depth).
        Others: as for nn.TransformerEncoderLayer.

    Raises:
        ValueError: a probability outside 0 to 1.
    """

    def __init__(self, *args, drop_path: float = 0.0, **kwargs):
        checks.probability("drop_path", drop_path)
        super().__init__(*args, **kwargs)
        self.drop_path = drop_path

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``src``: [N, L, d_model] with ``batch_first``, else [L, N, d_model], or [L, d_model]."""
        if self.training and self.drop_path and not symbolic(src):
            if src.dim() != 3:
                raise ValueError(f"src: wanted 3 dimensions with drop_path, got {src.dim()}")
        plain = super().forward
        return encoder_layer(
            self, plain, src, src_mask, src_key_padding_mask, is_causal, drop_path=self.drop_path
        )

    # The plain forward, PyTorch's own, adds what these return.

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False) -> Tensor:
        return self._drop(super()._sa_block(x, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self._drop(super()._ff_block(x))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        return drop_path_rows(branch, self.drop_path, 0 if self.self_attn.batch_first else 1)


def drop_path_rows(x: Tensor, p: float, batch_dim: int) -> Tensor:
    """Drop path in plain PyTorch: the random numbers of ``dropout_add``, in a pass of its own."""
    samples = [n if d == batch_dim else 1 for d, n in enumerate(x.shape)]
    survivors = x.new_empty(samples).bernoulli_(1 - p)
    return x * (survivors if p == 1 else survivors / (1 - p))


def encoder_layer(
    layer: nn.TransformerEncoderLayer,
    plain: Callable[..., Tensor],
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    drop_path: float = 0.0,
) -> Tensor:
    """The forward of PyTorch's layer with each addition, its dropout and its norm in one pass.

    Args:
        plain: the layer's own forward, for what cannot run so.
    """
    reason = _unfused(layer, src)
    if reason is not None:
        observers.notify(observers.Event("add_norm", "unfused", reason))
        return plain(src, src_mask, src_key_padding_mask, is_causal)
    padding = nn.functional._canonical_mask(
        src_key_padding_mask, "src_key_padding_mask", nn.functional._none_or_dtype(src_mask),
        "src_mask", src.dtype,
    )  # fmt: skip
    mask = nn.functional._canonical_mask(
        src_mask, "src_mask", None, "", src.dtype, check_other=False
    )
    batch_dim = 0 if layer.self_attn.batch_first else 1

    def drops(dropout: nn.Dropout) -> dict:
        drops = dict(dropout=dropout.p, drop_path=drop_path)
        return drops | dict(training=dropout.training, batch_dim=batch_dim)

    def add_norm(branch: Tensor, x: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm):
        return F.add_layer_norm(
            branch, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, **drops(dropout)
        )

    if layer.norm_first:
        branch = _attend(layer, layer.norm1(src), mask, padding, is_causal)
        y, x = add_norm(branch, src, layer.dropout1, layer.norm2)
        return F.dropout_add(_feed_forward(layer, y), x, **drops(layer.dropout2))
    branch = _attend(layer, src, mask, padding, is_causal)
    x = add_norm(branch, src, layer.dropout1, layer.norm1)[0]
    return add_norm(_feed_forward(layer, x), x, layer.dropout2, layer.norm2)[0]


def _unfused(layer: nn.TransformerEncoderLayer, src: Tensor) -> str | None:
    if symbolic(src):
        return "tracing"
    for name in ("_sa_block", "_ff_block"):
        known = getattr(nn.TransformerEncoderLayer, name), getattr(TransformerEncoderLayer, name)
        if name in vars(layer) or getattr(type(layer), name) not in known:
            return f"{type(layer).__name__} has a {name} of its own"
    if src.is_nested:
        return "the input is a nested tensor"
    if not layer.training and not torch.is_grad_enabled() and layer.self_attn.batch_first:
        if torch.backends.mha.get_fastpath_enabled():
            return "PyTorch's own inference path"
    for module, kind in (
        (layer.norm1, nn.LayerNorm), (layer.norm2, nn.LayerNorm),
        (layer.dropout1, nn.Dropout), (layer.dropout2, nn.Dropout),
    ):  # fmt: skip
        if type(module) is not kind:
            return f"{type(module).__name__} is not a plain {kind.__name__}"
        if (reason := hooked(module)) is not None:
            return reason
    return None


def _attend(layer, x: Tensor, mask, padding, is_causal: bool) -> Tensor:
    return layer.self_attn(
        x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


def _feed_forward(layer, x: Tensor) -> Tensor:
    return project(layer.linear2, layer.dropout(layer.activation(project(layer.linear1, x))))
