"""The kernels of a network in each structure of passes that ``benchmarks.roofline`` describes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedres.ops.conv_tail import recompute_max_channels

from .costs import Costs, Kernel
from .networks import Block, Conv, Network

Kernels = list[Kernel]
INDEX_BYTES = 8  # of eager's max pooling, which keeps an int64 index for each result
OPTIMISER_BYTES = 22  # a parameter: SGD with momentum in float32, and the cast for the next step


def _pass(name: str, *moved: int) -> Kernel:
    return Kernel(name, 0, sum(moved))


# --- inference


def _eager_inference(c: Costs, net: Network) -> Kernels:
    def unit(conv: Conv, squeeze: int = 0, *, residual: bool = False, act: str = "relu") -> Kernels:
        """Convolution and tail; the formula of the tail counts eager's passes one by one."""
        evaluated = dict(batch_stats=False, stats_given=True, eager=True)
        tail = c.tail(conv.y, squeeze, residual=residual, act=act, **evaluated)
        return [c.conv(conv), tail]

    found = [*unit(net.stem), c.max_pool(net)]
    for block in net.blocks:
        for conv in block.convs[:-1]:
            found += unit(conv)
        if block.shortcut is not None:
            found += unit(block.shortcut, act="identity")
        found += unit(block.convs[-1], block.squeeze, residual=True)
    return [*found, c.classifier(net, train=False)]


def _pointwise_inference(c: Costs, net: Network) -> Kernels:
    """The shortcut's batch norm is applied where its convolution's result is added."""
    given = dict(batch_stats=False, stats_given=True)
    found = [c.conv(net.stem), _pass("bn_act, max_pool", c.max_pool(net).bytes)]
    for block in net.blocks:
        for conv in block.convs[:-1]:
            found += [c.conv(conv), c.tail(conv.y, residual=False, **given)]
        if block.shortcut is not None:
            found.append(c.conv(block.shortcut))
        tail = c.tail(block.y, block.squeeze, residual=True, **given)
        found += [c.conv(block.convs[-1]), tail]
    return [*found, c.classifier(net, train=False)]


def _epilogue_inference(c: Costs, net: Network) -> Kernels:
    found = [c.conv_bn_act(net.stem, residual=False), c.max_pool(net)]
    for block in net.blocks:
        found += [c.conv_bn_act(conv, residual=False) for conv in block.convs[:-1]]
        if block.shortcut is not None:
            found.append(c.conv_bn_act(block.shortcut, residual=False, act="identity"))
        last = block.convs[-1]
        if block.squeeze:
            found.append(c.conv_bn_act(last, residual=False, act="identity"))
            found.append(c.squeeze_excite(last.y, block.squeeze))
        else:
            found.append(c.conv_bn_act(last, residual=True))
    return [*found, c.classifier(net, train=False)]


def _block_inference(c: Costs, net: Network) -> Kernels:
    def launch(name: str, convs: list[Conv], x, y) -> Kernel:
        weights = sum(c.weight(conv).nbytes for conv in convs)
        return Kernel(name, sum(c.conv(v).flops for v in convs), c.bytes(x) + c.bytes(y) + weights)

    found = [launch("stem", [net.stem], net.stem.x, net.pooled)]
    for block in net.blocks:
        found.append(launch("block", block.all_convs(), block.x, block.y))
    return [*found, c.classifier(net, train=False)]


# --- training


def _ends(c: Costs, net: Network) -> Kernels:
    return [c.classifier(net, train=True), _pass("optimiser", OPTIMISER_BYTES * net.parameters)]


def _separate(c: Costs, net: Network, eager: bool) -> Kernels:
    """Convolutions, and between them what follows them: in eager's passes or in two each way."""
    index = INDEX_BYTES if eager else 1
    found = [*_unit(c, net.stem, 0, eager=eager), c.wgrad(net.stem)]
    found += [c.max_pool(net, index)] * 2
    for block in net.blocks:
        for conv in block.all_convs():
            last = conv is block.convs[-1]
            act = "identity" if conv is block.shortcut else "relu"
            found += _unit(
                c, conv, block.squeeze if last else 0, residual=last, act=act, eager=eager
            )
            # The other path's gradient is added in this epilogue; eager adds in a pass of its own.
            joined = [c.bytes(block.x)] if conv is block.convs[0] and not eager else []
            found += [c.dgrad(conv, *joined), c.wgrad(conv)]
        if eager:
            found.append(_pass("add gradients", 3 * c.bytes(block.x)))
    return [*found, *_ends(c, net)]


def _unit(
    c: Costs, conv: Conv, squeeze: int, *, residual: bool = False, act: str = "relu", eager: bool
) -> Kernels:
    bits = residual and not eager
    return [
        c.conv(conv),
        c.tail(conv.y, squeeze, residual=residual, act=act, mask=bits, eager=eager),
        c.tail_backward(conv.y, squeeze, mask=bits, dresidual=bits, act=act, eager=eager),
    ]


def _eager_training(c: Costs, net: Network) -> Kernels:
    return _separate(c, net, eager=True)


def _pointwise_training(c: Costs, net: Network) -> Kernels:
    return _separate(c, net, eager=False)


def _steps_training(c: Costs, net: Network) -> Kernels:
    found = [c.conv(net.stem), c.wgrad(net.stem)]
    found += [*_applied(c, net.stem, "relu"), *[c.max_pool(net, INDEX_BYTES)] * 2]
    for block in net.blocks:
        again = _is_repeated(block.convs[-1], c.dtype)
        for conv in block.all_convs():
            found += [c.conv(conv), c.dgrad(conv), c.wgrad(conv)]
            # Whoever reads a raw result takes its statistics, but for two norms that meet in a sum.
            joined = block.shortcut is not None and not block.squeeze
            if joined and (conv is block.convs[-1] or conv is block.shortcut):
                found.append(c.stats(conv.y))
            if any(conv is later for later in block.convs[1:]):  # norm and ReLU before it, twice
                again_before = c.tail(conv.x, residual=False, stats_given=True)
                behind = c.tail_backward(conv.x, mask=False, dresidual=False)
                found += [c.tail(conv.x, residual=False), again_before, behind]
        last = block.convs[-1]
        if again:
            found.append(Kernel("conv again", c.conv(last).flops, c.conv(last).bytes))
        found += _block_end(c, block)
        found.append(_pass("add gradients", 3 * c.bytes(block.x)))
    return [*found, *_ends(c, net)]


def _is_repeated(conv: Conv, dtype: torch.dtype) -> bool:
    """Whether the backward repeats this convolution rather than keep its result."""
    pointwise = conv.kernel == 1 and conv.stride == 1 and conv.groups == 1
    expands = conv.y[0] >= 2 * conv.x[0]
    return pointwise and expands and conv.x[0] <= recompute_max_channels(dtype)


def _applied(c: Costs, conv: Conv, act: str) -> Kernels:
    """Batch norm, forward and backward."""
    return [
        c.tail(conv.y, residual=False, act=act),
        c.tail_backward(conv.y, mask=False, dresidual=False, act=act),
    ]


def _block_end(c: Costs, block: Block) -> Kernels:
    if block.shortcut is not None and not block.squeeze:
        return c.projected_tail(block.y)
    found = [] if block.shortcut is None else _applied(c, block.shortcut, "identity")
    return [
        *found,
        c.tail(block.y, block.squeeze, residual=True, mask=True),
        c.tail_backward(block.y, block.squeeze, mask=True, dresidual=True),
    ]


def _raw_stem(c: Costs, net: Network) -> Kernels:
    """The stem where batch norm and ReLU are in the pooling, and their backward in wgrad."""
    pooled = c.max_pool(net, index_bytes=1)
    index = pooled.bytes - c.max_pool(net).bytes
    return [
        c.conv(net.stem),
        _pass("bn_act, max_pool", pooled.bytes),
        _pass("max_pool backward, sums", pooled.bytes),
        c.wgrad(net.stem, c.bytes(net.pooled), index),
    ]


def _prologue_training(c: Costs, net: Network) -> Kernels:
    found = _raw_stem(c, net)
    for i, block in enumerate(net.blocks):
        for conv in block.all_convs():
            reads = _backward_reads(c, block, conv, first=i == 0)
            # The gradient behind the batch norm is made on the way in: its raw result is read too.
            found += [
                c.conv(conv), c.dgrad(conv, c.bytes(conv.y), *reads), c.wgrad(conv, c.bytes(conv.y))
            ]  # fmt: skip
        found.append(c.tail(block.y, residual=True, stats_given=True, mask=True))
    return [*found, *_ends(c, net)]


def _backward_reads(c: Costs, block: Block, conv: Conv, first: bool) -> list[int]:
    """What dgrad reads besides its operands: for the ReLU before, its sums, the other path."""
    if conv is block.shortcut:
        return []
    raw = [c.bytes(conv.x)]
    if conv is not block.convs[0]:
        return raw
    return raw if first else [*raw, c.bytes(conv.x), c.bits(conv.x)]


def _barrier_training(c: Costs, net: Network) -> Kernels:
    found = _raw_stem(c, net)
    for i, block in enumerate(net.blocks):
        for conv in block.all_convs():
            forward = c.conv(conv)
            if conv is block.convs[0] and i > 0:  # makes the block before's result on the way in
                tail = 2 * c.bytes(conv.x) + c.bits(conv.x)
                forward = Kernel("tail, conv", forward.flops, forward.bytes + tail)
            found += [forward, _both_gradients(c, block, conv, first=i == 0)]
    found.append(c.tail(net.features, residual=True, stats_given=True, mask=True))
    return [*found, *_ends(c, net)]


def _both_gradients(c: Costs, block: Block, conv: Conv, first: bool) -> Kernel:
    """dgrad and wgrad in one: dy, the raw result and the operand read once, dx written."""
    x, y = c.bytes(conv.x), c.bytes(conv.y)
    weights = c.weight(conv)
    moved = 2 * y + 2 * x + weights.nbytes + 4 * weights.numel()
    if conv is block.convs[0]:  # the kept operand is not the raw result that the sums need
        moved += sum(_backward_reads(c, block, conv, first))
    return Kernel("dgrad, wgrad", 2 * c.conv(conv).flops, moved)


def _ideal_training(c: Costs, net: Network) -> Kernels:
    """What is kept: the convolutions' results, the blocks' results, and the pooled stem."""
    shapes = [conv.y for conv in net.convs()] + [block.y for block in net.blocks] + [net.pooled]
    kept = c.bytes(net.stem.x) + sum(map(c.bytes, shapes))
    flops = sum(c.conv(conv).flops for conv in net.convs())
    weights = sum(c.weight(conv).nbytes for conv in net.convs())
    dweights = sum(4 * c.weight(conv).numel() for conv in net.convs())
    return [
        Kernel("forward", flops, kept + weights),
        Kernel("backward", 2 * flops - c.conv(net.stem).flops, kept + weights + dweights),
        *_ends(c, net),
    ]


Structure = Callable[[Costs, Network], Kernels]
INFERENCE: dict[str, Structure] = {
    "eager": _eager_inference,
    "pointwise": _pointwise_inference,
    "epilogue": _epilogue_inference,
    "block": _block_inference,
}
TRAINING: dict[str, Structure] = {
    "eager": _eager_training,
    "pointwise": _pointwise_training,
    "steps": _steps_training,
    "prologue": _prologue_training,
    "barrier": _barrier_training,
    "ideal": _ideal_training,
}
