"""Peers of single ops on a GPU: cuDNN's fused convolution, its graphs, and apex' batch norm.

What they compute is checked like every other result before it is timed.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .measure import Competitor
from .peers import APEX, CUDNN, CUDNN_FRONTEND, Unavailable, op_call

EPS = 1e-5


def _folded(conv_weight, weight, bias, running_mean, running_var) -> tuple[Tensor, Tensor]:
    """Batch norm in the convolution's weight and a bias, in float64, rounded once."""
    scale = weight.double() / (running_var.double() + EPS).sqrt()
    folded = conv_weight.double() * scale[:, None, None, None]
    shift = bias.double() - running_mean.double() * scale
    like = conv_weight.dtype
    return folded.to(like, memory_format=torch.channels_last), shift.to(like)


def cudnn_convolution(tensors: dict[str, Tensor], stride: int, padding: int) -> Competitor:
    """``cudnn_convolution_relu`` or ``_add_relu`` on folded weights, as PyTorch exposes them."""
    x, residual = tensors["x"], tensors.get("residual")
    weight, shift = _folded(**{k: t for k, t in tensors.items() if k not in ("x", "residual")})
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1

    def call() -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, shift, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *geometry)

    return Competitor(CUDNN, call, lambda: {"y": call()})


_CUDNN_TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}


def cudnn_graph(tensors: dict[str, Tensor], stride: int, padding: int) -> Competitor:
    """The same as one graph of cuDNN's own frontend: convolution, bias, addition, ReLU."""
    if importlib.util.find_spec("cudnn") is None:
        raise Unavailable("nvidia-cudnn-frontend is not installed")
    import cudnn

    x, residual = tensors["x"], tensors.get("residual")
    weight, shift = _folded(**{k: t for k, t in tensors.items() if k not in ("x", "residual")})
    shift = shift.view(1, -1, 1, 1)
    graph = cudnn.pygraph(
        io_data_type=getattr(cudnn.data_type, _CUDNN_TYPES[x.dtype]),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    inputs = {graph.tensor_like(t): t for t in (x, weight, shift)}
    image, kernel, offset = inputs
    sides = dict(padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1])
    value = graph.bias(input=graph.conv_fprop(image=image, weight=kernel, **sides), bias=offset)
    if residual is not None:
        other = graph.tensor_like(residual)
        inputs[other] = residual
        value = graph.add(a=value, b=other)
    result = graph.relu(input=value)
    result.set_output(True)
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)
    size = [(s + 2 * padding - weight.shape[2]) // stride + 1 for s in x.shape[2:]]
    y = x.new_empty((x.shape[0], weight.shape[0], *size)).to(memory_format=torch.channels_last)

    def call() -> Tensor:
        graph.execute(inputs | {result: y}, workspace)
        return y

    return Competitor(CUDNN_FRONTEND, call, lambda: {"y": call().clone()})


def apex_batch_norm(
    tensors: dict[str, Tensor], dy: Tensor, direction: str, dtype: torch.dtype
) -> Competitor:
    """apex' NHWC batch norm with addition and ReLU; its kernels take float16 only."""
    if importlib.util.find_spec("apex") is None:
        raise Unavailable("apex is not installed (PyPI's package of that name is another)")
    if dtype != torch.float16:
        raise Unavailable(f"its kernels take float16, not {str(dtype).removeprefix('torch.')}")
    from apex.contrib.groupbn import BatchNorm2d_NHWC

    layer = BatchNorm2d_NHWC(tensors["x"].shape[1], fuse_relu=True).to(dy.device)

    def function(x, weight, bias, running_mean, running_var, residual=None) -> Tensor:
        # Its tensors are [N, H, W, C]; a channels_last tensor is one, seen from another side.
        z = None if residual is None else residual.permute(0, 2, 3, 1)
        parts = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
        y = torch.func.functional_call(layer, parts, (x.permute(0, 2, 3, 1), z))
        return y.permute(0, 3, 1, 2)

    return op_call(APEX, function, tensors, dy, direction, dtype)
