"""What a block keeps for the backward: raw convolution results, its input and one-bit masks."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fusedres
from cases import randn
from modules import PLAIN_BLOCKS, PlainSEBottleneck, block_pair


def saved(module: nn.Module, x: Tensor) -> tuple[list[int], int]:
    """Bytes of the distinct activations kept by a forward, and of everything smaller together.

    Activations are the tensors [N, C, H, W] and the masks. Parameters and buffers are not counted.
    """
    state = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages, kept = {}, []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)  # so that no address is used twice
        storage = t.untyped_storage()
        if storage.data_ptr() not in state and storage.nbytes():
            large = t.dim() == 4 or t.dtype == torch.uint8
            storages[storage.data_ptr()] = storage.nbytes(), large
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    assert y.requires_grad
    large = sorted(n for n, is_large in storages.values() if is_large)
    return large, sum(n for n, is_large in storages.values() if not is_large)


N, H = 4, 8
MAP = N * H * H  # elements a channel; 4 bytes each, a mask has 1/8


@pytest.mark.parametrize("name,options,channels,mask", [
    # x, and the raw results of conv1 and conv2; the mask of the last ReLU
    ("BasicBlock", dict(project=False, planes=16), [16, 16, 16], 16),
    # the same, and the raw projection
    ("BasicBlock", dict(project=True, planes=32), [16, 32, 32, 32], 32),
    # conv3's raw result, the widest of all, is computed again
    ("Bottleneck", dict(project=False, planes=4), [16, 4, 4], 16),
    ("Bottleneck", dict(project=True, planes=8), [16, 8, 8, 32], 32),
    ("SEBasicBlock", dict(project=False, planes=16, reduction=4), [16, 16, 16], 16),
    ("SEBottleneck", dict(project=True, planes=8, reduction=4), [16, 8, 8, 32], 32),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_block_in_training_keeps_only_what_it_must(name, options, channels, mask, layout):
    fused, plain = block_pair(name, **options)
    x = randn((N, 16, H, H), layout=layout).requires_grad_()
    large, small = saved(fused, x)
    assert large == sorted([4 * c * MAP for c in channels] + [mask * MAP // 8])
    vectors = [p.numel() for p in fused.buffers() if p.is_floating_point()]
    rows = sum(p.shape[0] for n, p in fused.named_parameters() if n.endswith("fc1.weight"))
    se = N * (2 * mask + rows) if "SE" in name else 0  # squeezed, hidden and logits
    assert small <= 4 * (2 * sum(vectors) + se)
    eager, _ = saved(plain, x)
    assert sum(large) < sum(eager)


@pytest.mark.parametrize("name", PLAIN_BLOCKS)
def test_frozen_statistics_keep_no_more_than_batch_statistics(name):
    fused, _ = block_pair(name)
    x = randn((N, 16, H, H)).requires_grad_()
    training, _ = saved(fused, x)
    frozen, _ = saved(fused.eval(), x)
    assert frozen == training


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_block_under_autocast(dtype):
    """In bfloat16 every map takes half; the float32 input is kept once, as its bfloat16 copy."""
    fused, _ = block_pair("BasicBlock", project=False, planes=16)
    with torch.autocast("cpu", dtype):
        large, _ = saved(fused, randn((N, 16, H, H), layout="NHWC").requires_grad_())
    weights = {2 * p.numel() for p in fused.parameters() if p.dim() == 4}
    maps = [n for n in large if n not in weights]  # autocast's own copies of the weights
    assert maps == sorted([2 * 16 * MAP] * 3 + [16 * MAP // 8])


@pytest.mark.parametrize("dtype,kept", [(torch.float32, 2), (torch.bfloat16, 1)])
def test_a_wide_last_convolution_is_repeated_only_in_16_bits(dtype, kept):
    """Of the two widest maps, the projection and conv3's raw results."""
    fused, _ = block_pair("Bottleneck", planes=72, project=True)
    x = randn((N, 16, H, H), dtype, layout="NHWC").requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        large, _ = saved(fused, x)
    assert large.count(dtype.itemsize * 4 * 72 * MAP) == kept


@pytest.mark.parametrize("name,plain,share", [
    ("resnet50", torchvision.models.resnet50, 0.75),  # a quarter less
    ("se_resnet50", lambda: torchvision.models.ResNet(PlainSEBottleneck, [3, 4, 6, 3]), 0.65),
])  # fmt: skip
def test_a_network_keeps_less_than_eager(name, plain, share):
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    ours, eager = (sum(saved(m, x)[0]) for m in (getattr(fusedres.models, name)(), plain()))
    assert ours <= share * eager
