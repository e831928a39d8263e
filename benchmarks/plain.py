"""The peers' networks: torchvision's own ResNet, and squeeze-excite written out in plain PyTorch.

The state dicts are those of ``fusedres.models``, so that all competitors share one set of weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.demo.networks import PlainSqueezeExcite

_definitions: list[torch.library.Library] = []  # they live as long as the object does


def import_torchvision() -> ModuleType:
    """``torchvision.models.resnet``, also where its compiled library does not load.

    Beside a CPU-only torch the wheel's library, built for CUDA, does not load, and its Python code
    then trips over two schemas that nobody defined. Nothing here uses those ops.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ImportError("the model benchmarks compare with torchvision: pip install torchvision")
    if not hasattr(torch.ops.torchvision, "nms"):
        try:
            torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
        except OSError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _definitions.append(library)
    from torchvision.models import resnet

    return resnet


def plain_block(name: str) -> type[nn.Module]:
    """torchvision's BasicBlock or Bottleneck, or either with squeeze-excite ("SEBottleneck")."""
    resnet = import_torchvision()
    base = getattr(resnet, name.removeprefix("SE"))
    if not name.startswith("SE"):
        return base

    class WithSqueezeExcite(base):
        def __init__(self, inplanes: int, planes: int, *args, **kwargs):
            super().__init__(inplanes, planes, *args, **kwargs)
            channels = planes * self.expansion
            # Behind the last norm and before the addition (Hu et al. 2018, figure 3).
            self.se = PlainSqueezeExcite(channels, channels // 16)

        def forward(self, x: Tensor) -> Tensor:
            identity = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            if hasattr(self, "conv3"):
                out = self.bn3(self.conv3(self.relu(out)))
            out = self.se(out)
            out += identity
            return self.relu(out)

    WithSqueezeExcite.__name__ = f"Plain{name}"
    return WithSqueezeExcite


# name: (block, layers), as in fusedres.models
NETWORKS: dict[str, tuple[str, list[int]]] = {
    "resnet18": ("BasicBlock", [2, 2, 2, 2]),
    "resnet50": ("Bottleneck", [3, 4, 6, 3]),
    "se_resnet18": ("SEBasicBlock", [2, 2, 2, 2]),
    "se_resnet50": ("SEBottleneck", [3, 4, 6, 3]),
}


def plain_network(name: str, **kwargs) -> nn.Module:
    block, layers = NETWORKS[name]
    return import_torchvision().ResNet(plain_block(block), layers, **kwargs)


# --- the ops, as torchvision's blocks execute them: the additions and the ReLUs in place


def bn_act(x, weight, bias, running_mean, running_var, residual=None, training=True) -> Tensor:
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training)
    if residual is not None:
        out += residual
    return F.relu_(out)


def squeeze_excite(x, w1, b1, w2, b2, residual) -> Tensor:
    """w1 [R, C, 1, 1] and w2 [C, R, 1, 1]."""
    hidden = F.relu_(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1))
    out = x * torch.sigmoid(F.conv2d(hidden, w2, b2))
    out += residual
    return F.relu_(out)


def bn_se_act(x, weight, bias, running_mean, running_var, w1, b1, w2, b2, residual) -> Tensor:
    z = F.batch_norm(x, running_mean, running_var, weight, bias, True)
    return squeeze_excite(z, w1, b1, w2, b2, residual)


def stochastic_depth(branch, shortcut, row_scale) -> Tensor:
    """torchvision.ops.StochasticDepth in mode "row", the addition and the ReLU."""
    out = branch * row_scale[:, None, None, None]
    out += shortcut
    return F.relu_(out)


def highway(branch, shortcut, gate) -> Tensor:
    return gate * branch + (1 - gate) * shortcut
