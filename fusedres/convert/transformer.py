"""``nn.TransformerEncoderLayer``: each residual addition, its dropout and its norm one pass."""

from __future__ import annotations

from torch import Tensor, nn

from ..blocks import transformer
from .recipe import Recipe


def encoder_layer(self: nn.TransformerEncoderLayer, *args, **kwargs) -> Tensor:
    return transformer.encoder_layer(self, self.original_forward, *args, **kwargs)


RECIPES = (
    Recipe(
        "torch.nn.modules.transformer.TransformerEncoderLayer",
        reads="F _canonical_mask _none_or_dtype dtype torch backends mha get_fastpath_enabled dim "
        "training self_attn batch_first in_proj_bias _qkv_same_embed_dim activation_relu_or_gelu "
        "norm1 eps norm2 is_nested num_heads is_autocast_enabled any modules in_proj_weight "
        "out_proj weight bias linear1 linear2 utils backend_registration _privateuse1_backend_name "
        "overrides has_torch_function all is_grad_enabled merge_masks "
        "_transformer_encoder_layer_fwd embed_dim norm_first _sa_block _ff_block",
        forward=encoder_layer,
        also=("_sa_block", "_ff_block"),
        arguments=True,
    ),
)
