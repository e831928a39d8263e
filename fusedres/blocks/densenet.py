"""DenseNet's blocks (Huang et al. 2017), with torchvision's arguments, names and state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, dispatch, observers
from ..layout import dense
from ..ops import bn_act, conv_stats
from ..ops.convolution import Geometry
from ..ops.define import PLAIN
from ..ops.dense_block import Layer, dense_block
from ..running_stats import normalised
from .recognise import Norm, act_of, geometry_of, hooked, norm_of, symbolic
from .unit import autocasts, operands, track, track_all


class DenseLayer(nn.Module):
    """``conv2(relu2(norm2(conv1(relu1(norm1(x))))))``: torchvision's _DenseLayer.

    Args:
        num_input_features: channels of the concatenated input.
        growth_rate: channels of the result.
        bn_size: channels of the bottleneck, in growth rates.
        drop_rate: probability of dropping an element of the result in training.
        memory_efficient: compute again in the backward what the second convolution read. What the
            first one read, the concatenation, a DenseBlock never keeps.
    """

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float,
        memory_efficient: bool = False,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(
            num_input_features=num_input_features, growth_rate=growth_rate, bn_size=bn_size
        )
        for name, size in sizes.items():
            checks.size(name, size)
        checks.probability("drop_rate", drop_rate)
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        """A tensor, or tensors to concatenate: [N, *, H, W] -> [N, growth_rate, H, W]."""
        x = input if not isinstance(input, list | tuple) else torch.cat(input, 1)
        x = pre_norm_conv(x, self.norm1, self.relu1, self.conv1)
        x = pre_norm_conv(x, self.norm2, self.relu2, self.conv2)
        return nn.functional.dropout(x, self.drop_rate, self.training) if self.drop_rate else x


def pre_norm_conv(x: Tensor, norm: nn.Module, act: nn.Module, conv: nn.Conv2d) -> Tensor:
    """``conv(act(norm(x)))``, of which only x is kept for the backward."""
    half = "tracing" if symbolic(x) else _half_of(x, None, norm, act, conv)
    if isinstance(half, str):
        observers.notify(observers.Event("norm, conv", "unfused", half, launches=3))
        return conv(act(normalised(norm, x)))
    found, geometry = half
    x, weight, bias = operands(x, conv)
    x = dense(x)
    mean, var = found.running_mean, found.running_var
    if found.batch_stats:
        checks.more_than_one_value(x)
        mean, var = bn_act.stats_op(x.detach())
    y = conv_stats.op(
        x, found.weight, found.bias, mean, var, found.batch_stats, found.eps, act_of(act), weight,
        bias, *geometry, False,
    )[0]  # fmt: skip
    track(found, mean, var, x.shape)
    return y


Half = tuple[Norm, Geometry]


def _half_of(x: Tensor, channels: int | None, norm, act, conv) -> Half | str:
    """What the ops need of norm-act-conv, or why the three must run as they are.

    Args:
        channels: of the operand, where that is not x but something made of x.
    """
    found, geometry = norm_of(norm), geometry_of(conv)
    for reason in (found, geometry):
        if isinstance(reason, str):
            return reason
    if act_of(act) is None:
        return hooked(act) or f"{type(act).__name__} has no fused form"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, not 4"
    if x.dtype not in dispatch.DTYPES:
        return f"the input is {x.dtype}"
    if x.dtype != conv.weight.dtype and not autocasts(x, conv.weight):
        return f"the input is {x.dtype}, the convolution's weight {conv.weight.dtype}"
    channels = x.shape[1] if channels is None else channels
    sizes = {len(p) for p in (found.weight, found.running_mean) if p is not None}
    if sizes - {channels} or channels != conv.in_channels or x.device != conv.weight.device:
        return "the input does not fit the norm or the convolution"
    return found, geometry


class DenseBlock(nn.ModuleDict):
    """Layers that each read the input and all results before: torchvision's _DenseBlock.

    The features are written in place into one buffer: no concatenation, each channel's statistics
    computed once, and memory for the backward that is linear in the number of layers.

    Args:
        num_layers: their number.
        num_input_features: channels of the input.
        bn_size, growth_rate, drop_rate, memory_efficient: as for DenseLayer.
    """

    def __init__(
        self, num_layers: int, num_input_features: int, bn_size: int, growth_rate: int,
        drop_rate: float, memory_efficient: bool = False,
    ):  # fmt: skip
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate,
                memory_efficient,
            )  # fmt: skip

    def forward(self, init_features: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + num_layers * growth_rate, H, W]."""
        return run_dense_block(init_features, list(self.values()))


def run_dense_block(x: Tensor, layers: list[nn.Module]) -> Tensor:
    """``torch.cat`` of x and what every layer makes of all before it."""
    found = _halves_of(x, layers)
    if isinstance(found, str):
        observers.notify(observers.Event("dense_block", "unfused", found, launches=len(layers)))
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)
    specs, tensors, norms = [], [], []
    for layer, halves in zip(layers, found, strict=True):
        (norm1, geometry1), (norm2, geometry2) = halves
        x, conv1, _ = operands(x, layer.conv1)
        conv2 = operands(x, layer.conv2)[1]
        batch_stats, eps = (norm1.batch_stats, norm2.batch_stats), (norm1.eps, norm2.eps)
        specs.append(Layer(batch_stats, eps, (geometry1, geometry2), layer.memory_efficient))
        running = (norm1.running_mean, norm1.running_var, norm2.running_mean, norm2.running_var)
        tensors += [norm1.weight, norm1.bias, conv1, norm2.weight, norm2.bias, conv2, *running]
        norms.append((norm1, norm2))
    y, stats = dense_block(specs, x, tensors)
    batches = []
    for pair, found in zip(norms, stats, strict=True):
        for norm, mean, var in zip(pair, found[::2], found[1::2], strict=True):
            batches.append((norm, mean, var, torch.Size((x.shape[0], len(mean), *x.shape[2:]))))
    track_all(batches)
    return y


def _halves_of(x: Tensor, layers: list[nn.Module]) -> list[tuple[Half, Half]] | str:
    """Both halves of every layer, or why the layers run one by one."""
    if symbolic(x):
        return "tracing"
    if torch.compiler.is_compiling():
        return "the compiler plans memory by itself"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    if torch._C._are_functorch_transforms_active():
        return "functorch's levels do not survive the block's own backward"
    if autocasts(x) and x.dtype != torch.get_autocast_dtype(x.device.type):
        return f"the input is {x.dtype}: concatenated with autocast's results it stays so"
    found, channels = [], x.shape[1] if x.dim() > 1 else 0
    for layer in layers:
        kind = type(layer)
        peer = (kind.__module__, kind.__name__) == ("torchvision.models.densenet", "_DenseLayer")
        if kind.forward is not DenseLayer.forward and not peer:
            return f"{kind.__name__} has a forward of its own"
        if (reason := hooked(layer)) is not None:
            return reason
        if layer.training and layer.drop_rate:
            return "dropout: each layer draws from its own result"
        halves, inside = [], channels
        for norm, act, conv in (
            (layer.norm1, layer.relu1, layer.conv1),
            (layer.norm2, layer.relu2, layer.conv2),
        ):
            half = _half_of(x, inside, norm, act, conv)
            if isinstance(half, str):
                return half
            if act_of(act) != "relu" or conv.bias is not None or not _keeps_size(half[1], conv):
                return "not a dense layer's ReLU and convolution"
            halves.append(half)
            inside = conv.out_channels
        found.append(tuple(halves))
        channels += inside
    batch = any(norm.batch_stats for halves in found for norm, _ in halves)
    if batch and x.numel() // max(1, x.shape[1]) <= 1:
        return "batch norm has an error for one value a channel"
    return found


def _keeps_size(geometry: Geometry, conv: nn.Conv2d) -> bool:
    stride, padding, dilation, _ = geometry
    kernel = conv.kernel_size
    return stride == [1, 1] and all(
        2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)
    )


class Transition(nn.Sequential):
    """Halves channels and resolution: torchvision's _Transition (norm, relu, conv, pool)."""

    def __init__(self, num_input_features: int, num_output_features: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, input: Tensor) -> Tensor:
        """[N, num_input_features, H, W] -> [N, num_output_features, H // 2, W // 2]."""
        return self.pool(pre_norm_conv(input, self.norm, self.relu, self.conv))
