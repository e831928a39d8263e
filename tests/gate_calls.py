"""What the compile gate compiles: every launcher on meta tensors of ResNet-50's first stage."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedres import triton_kernels


def meta(shape, dtype=torch.float32, nhwc=False) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if nhwc else x


def bn_act_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("bn_act")
    x, c = meta((256, 256, 56, 56), dtype, nhwc), meta(256)
    _, mean, var, mask = ops.bn_act(x, c, c, x, None, None, True, 1e-5, "relu", True)
    ops.bn_act(x, c, c, None, c, c, False, 1e-5, "relu", False)
    args = mean, var, mask, True, 1e-5, "relu"
    ops.bn_act_backward(x, x, c, c, None, *args, True)
    args = mean, var, mask[:0, 0], True, 1e-5, "relu"
    ops.bn_act_backward(x, x, c, c, None, *args, False)
    x = meta((8, 256, 16, 16), dtype, nhwc)  # in one launch each
    ops.bn_stats(x)
    _, mean, var, mask = ops.bn_act(x, c, c, x, None, None, True, 1e-5, "relu", True)
    ops.bn_act_backward(x, x, c, c, None, mean, var, mask, True, 1e-5, "relu", True)
    if nhwc:
        x, c = meta((16, 2048, 7, 7), dtype, nhwc), meta(2048)
        ops.bn_stats(x)
        _, mean, var, mask = ops.bn_act(x, c, c, x, None, None, True, 1e-5, "relu", True)
        ops.bn_act_backward(x, x, c, c, None, mean, var, mask, True, 1e-5, "relu", True)


def squeeze_excite_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("squeeze_excite")
    x, w1, w2 = meta((256, 256, 56, 56), dtype, nhwc), meta((16, 256)), meta((256, 16))
    mlp = w1, meta(16), w2, meta(256)
    _, *saved = ops.squeeze_excite(x, *mlp, x, "relu", "sigmoid", "relu", True)
    ops.squeeze_excite_backward(x, x, w1, w2, None, *saved, "relu", "sigmoid", "relu", True)


def bn_se_act_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("bn_se_act")
    x, c = meta((256, 256, 56, 56), dtype, nhwc), meta(256)
    w1, w2 = meta((16, 256)), meta((256, 16))
    options = True, 1e-5, "relu", "sigmoid", "relu", True
    _, *saved = ops.bn_se_act(x, c, c, w1, meta(16), w2, meta(256), x, None, None, *options)
    ops.bn_se_act_backward(x, x, c, c, w1, w2, None, *saved, *options)


def residual_mix_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("residual_mix")
    x, rows = meta((256, 256, 56, 56), dtype, nhwc), meta(256, dtype)
    for gate, scales in ((None, rows), (x, None)):
        _, mask = ops.residual_mix(x, x, gate, scales, 1.0, 1.0, "relu", True)
        ops.residual_mix_backward(x, x, x, gate, scales, mask, 1.0, 1.0, "relu")


def residual_add_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("residual_add")
    x, c, rows = meta((256, 256, 56, 56), dtype, nhwc), meta(256), meta((256, 1))
    for norm, scale in (((c, c, c, c), None), ((None,) * 4, rows)):
        batch = norm[0] is not None
        if not (batch or nhwc):  # the layout's own is in the tiles, which the norms have too
            return
        numbers = batch, batch, 1e-5, 1e-5, "relu"
        _, mask, _, _ = ops.residual_add(x, *norm, x, *norm, scale, *numbers, True, False)
        kept = x if batch else None
        args = x, kept, *norm, kept, *norm, scale, mask, *numbers, batch, batch, True
        ops.residual_add_backward(*args)
    ops.residual_add_backward(x, x, *norm, x, *norm, rows, mask, *numbers, True, False, True)


def add_norm_calls(dtype: torch.dtype, nhwc: bool) -> None:
    if nhwc:
        return
    ops = triton_kernels.package().module("add_norm")
    for d, norm, keep in ((768, "layer", True), (8192, "rms", False)):
        x, p, rows = meta((16384, d), dtype), meta(d), meta(16384)
        kept = meta((16384, d), torch.bool) if keep else None
        bias = p if norm == "layer" else None
        _, total, mean, rstd = ops.add_norm(x, x, p, bias, kept, rows, 1.25, 1e-5, norm)
        ops.add_norm_backward(total, x, x, p, mean, rstd, kept, rows, 1.25, norm)


def gate_calls(dtype: torch.dtype, nhwc: bool) -> None:
    if not nhwc:
        return
    kernels = triton_kernels.package()
    highway, lstm = (kernels.module(name) for name in ("highway", "lstm_cell"))
    x, c = meta((8192, 1024), dtype), meta((512, 1024), dtype)
    for coupled in (True, False):
        parts = meta((8192, (2 if coupled else 3) * 1024), dtype)
        highway.highway(parts, x, "gelu", coupled)
        highway.highway_backward(x, parts, x, "gelu", coupled)
        gates = meta((512, (4 if coupled else 3) * 1024), dtype)
        lstm.lstm_cell(gates, c, coupled)
        lstm.lstm_cell_backward(gates, c, c, c if coupled else None, coupled)


def dense_block_calls(dtype: torch.dtype, nhwc: bool) -> None:
    ops = triton_kernels.package().module("dense_block")
    x, p = meta((64, 256, 56, 56), dtype, nhwc), meta(224)
    h, new = (meta((64, c, 56, 56), dtype, nhwc) for c in (224, 32))
    numbers = meta(256)
    ops.dense_store(x, new, numbers, numbers, 224)
    ops.dense_store(x, new, None, None, 224)
    ops.dense_load(h, x, p, p, p, p, 1e-5)
    ops.dense_grad(x, numbers, numbers, h, x, p, p, p, p, 1e-5)
    ops.dense_finish(x, x, p[:32], p[:32], p[:32], 192, 32)


def conv_bn_act_calls(dtype: torch.dtype, nhwc: bool) -> None:
    if not nhwc:
        return
    ops = triton_kernels.package().module("conv_bn_act")
    x = meta((256, 64, 56, 56), dtype, nhwc)
    for weight, pad, residual in (
        (meta((256, 64, 1, 1), dtype), 0, meta((256, 256, 56, 56), dtype, nhwc)),
        (meta((64, 64, 3, 3), dtype, nhwc), 1, None),
    ):
        c = meta(weight.shape[0])
        geometry = [1, 1], [pad, pad], [1, 1], 1
        args = x, weight, None, residual, c, c, c, c, 1e-5, *geometry, "relu"
        ops.conv_bn_act(*args)
        ops.Inference(*args).folded()


def conv_stats_calls(dtype: torch.dtype, nhwc: bool) -> None:
    if not nhwc:
        return
    ops = triton_kernels.package().module("conv_stats")
    no_bn = None, None, None, None, False, 0.0, "identity"
    for c, k, taps, stride, bn in (
        (256, 64, 1, 1, False),
        (64, 256, 1, 1, True),
        (64, 64, 3, 2, True),
    ):
        x, weight, p = (
            meta((256, c, 56, 56), dtype, nhwc),
            meta((k, c, taps, taps), dtype, nhwc),
            meta(c),
        )
        before = (p, p, p, p, True, 1e-5, "relu") if bn else no_bn
        geometry = [stride, stride], [taps // 2, taps // 2], [1, 1], 1
        ops.conv_stats(x, *before, weight, None, *geometry, True)


def conv_grad_calls(dtype: torch.dtype, nhwc: bool) -> None:
    if not nhwc:
        return
    ops = triton_kernels.package().module("conv_grad")
    p, x = meta(64), meta((256, 64, 56, 56), dtype, nhwc)
    for k, taps, batch_stats in ((256, 1, True), (256, 1, False), (64, 3, True)):
        dy, weight = meta((256, k, 56, 56), dtype, nhwc), meta((k, 64, taps, taps), dtype, nhwc)
        geometry = [1, 1], [taps // 2, taps // 2], [1, 1], 1
        ops.conv_grad(dy, weight, x, p, p, p, p, batch_stats, 1e-5, "relu", *geometry, batch_stats)


# A function of dtype and layout for every op.
CALLS: list[Callable[[torch.dtype, bool], None]] = [
    bn_act_calls,
    squeeze_excite_calls,
    bn_se_act_calls,
    residual_mix_calls,
    residual_add_calls,
    add_norm_calls,
    gate_calls,
    dense_block_calls,
    conv_bn_act_calls,
    conv_stats_calls,
    conv_grad_calls,
]


def variant(launch) -> tuple:
    """What a launch is apart from its configuration: the arguments it has, its other flags."""
    present = tuple(a is None for a in launch.args)
    flags = {k: v for k, v in launch.flags.items() if not k.startswith("BLOCK")}
    return launch.name, present, tuple(flags.items())


def configuration(launch) -> tuple:
    """Its kernel, layout and configuration alone."""
    shape = {k: v for k, v in launch.flags.items() if k.startswith("BLOCK")}
    nhwc = launch.flags.get("NHWC")
    return launch.name, nhwc, tuple(shape.items()), tuple(launch.options.items())
