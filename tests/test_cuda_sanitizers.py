"""Every CUDA kernel on tiny tensors under ASan + UBSan and under TSan, in three thread orders.

The calls are recorded as the ops make them, and replayed by a program that the sanitizer is built
into: each operand is an allocation of its own, and the results must not depend on the order.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

import cuda_host
import test_bn_act as bn
import test_bn_se_act as bnse
import test_conv_bn_act as inference
import test_conv_stats as training
import test_cuda_conv as conv
import test_residual_mix as mix
import test_squeeze_excite as se
from cases import Conv, misaligned
from cuda_host import SIMULATOR
from cuda_ops import cuda_on_host
from harness import gradients

# Layouts, channels that fill no pack, several tiles or segments, several images. ThreadSanitizer
# takes some 30 us for every thread that waits, so it gets the smallest only.
SHAPES = {
    "asan": [
        ((3, 16, 3, 5), "NHWC", torch.bfloat16),
        ((2, 5, 7, 5), "NHWC", torch.float32),
        ((1, 264, 3, 2), "NHWC", torch.float32),
        ((3, 3, 4, 8), "NCHW", torch.float32),
        ((2, 5, 7, 5), "NCHW", torch.bfloat16),
        ((1, 1, 46, 46), "NCHW", torch.float32),
    ],
    "tsan": [((2, 16, 3, 7), "NHWC", torch.float32), ((2, 3, 4, 8), "NCHW", torch.float32)],
}


def run_residual_mix(shape, layout, dtype):
    for options in (dict(act="relu", rows=True), dict(act="silu", gate=True)):
        tensors = mix.tensors_of(shape, layout, dtype, **options)
        gradients(mix.fused(**options), tensors, constants=mix.CONSTANTS)


def run_bn_act(shape, layout, dtype):
    tensors = bn.tensors_of(shape, layout, dtype)
    gradients(bn.fused("relu"), tensors, constants=bn.CONSTANTS)
    tensors = bn.tensors_of(shape, layout, dtype, residual=False, training=False)
    tensors["x"] = misaligned(tensors["x"])[0]
    gradients(bn.fused("silu"), tensors, constants=bn.CONSTANTS)


def run_squeeze_excite(shape, layout, dtype):
    tensors = se.tensors_of(shape, layout, dtype, squeezed=5)
    gradients(se.fused(), tensors)


def run_bn_whole():
    """Two blocks that meet twice; of their rows some in registers, some in shared memory."""
    for act, layout, shape in (
        ("relu", "NHWC", (1, 256, 6, 6)),
        ("silu", "NHWC", (1, 256, 6, 6)),
        ("relu", "NCHW", (1, 1, 91, 91)),  # packs that are not whole
        ("silu", "NCHW", (1, 1, 92, 92)),
    ):
        tensors = bn.tensors_of(shape, layout, torch.float32)
        gradients(bn.fused(act), tensors, constants=bn.CONSTANTS)


def run_se_cluster():
    """Two blocks, each with its share of x and dy."""
    tensors = se.tensors_of((1, 264, 4, 4), "NHWC", torch.float32, squeezed=5)
    gradients(se.fused("silu"), tensors)
    assert cuda_host.clusters == [2, 2, 1]


def run_bn_se_act(shape, layout, dtype):
    tensors = bnse.tensors_of(shape, layout, dtype, squeezed=3)
    gradients(bnse.fused(), tensors, constants=bnse.CONSTANTS)


# Whole packs and packs that are not, taps outside of the image, two tiles and groups.
CONVS = {
    "asan": [
        Conv((2, 16, 6, 5), (24, 16, 3, 3), stride=(2, 1), bias=True),
        Conv((1, 40, 9, 8), (72, 40, 1, 1), padding=(0, 0)),
        Conv((1, 10, 5, 4), (14, 5, 3, 3), groups=2),
    ],
    "tsan": [Conv((1, 16, 5, 4), (8, 16, 3, 3))],
}
# Of the kernels for Hopper: several taps, and pixels outside.
HOPPER = Conv((2, 8, 12, 5), (16, 8, 4, 2), stride=(3, 1), padding=(3, 1), dilation=(1, 3))


def run_conv_bn_act(case):
    conv.infer(case, "relu6", inference.tensors_of(case, torch.bfloat16))


def run_conv_stats(case):
    conv.train(case, "relu", training.tensors_of(case, torch.bfloat16, bn="running"))
    conv.train(case, "relu", training.tensors_of(case, torch.bfloat16, bn=None), stats=False)


OPS = {
    "residual_mix": run_residual_mix,
    "bn_act": run_bn_act,
    "squeeze_excite": run_squeeze_excite,
    "bn_se_act": run_bn_se_act,
    "conv_bn_act": run_conv_bn_act,
    "conv_stats": run_conv_stats,
}
IN_ONE_LAUNCH = {"bn_act": run_bn_whole, "squeeze_excite": run_se_cluster}
IN_ONE_LAUNCH_LAYOUTS = {"bn_act": ("NHWC", "NCHW"), "squeeze_excite": ("NHWC",)}


@cache
def recorded(op: str, flavour: str) -> tuple[list[bytes], set[str]]:
    """The op's calls, and the kernels that they launch."""
    run, kernels = OPS[op], set()

    def on_host(run, *args, variant="by_size"):
        with cuda_on_host(variant=variant) as launched:
            run(*args)
        kernels.update(launched)

    with cuda_host.record() as recording:
        if op.startswith("conv_"):
            for case in CONVS[flavour]:
                on_host(run, case)
            on_host(run, HOPPER, variant="sm90_64")
            return recording.calls, kernels
        for shape, layout, dtype in SHAPES[flavour]:
            on_host(run, shape, layout, dtype, variant="streaming")
            if layout in IN_ONE_LAUNCH_LAYOUTS.get(op, ()):
                on_host(run, shape, layout, dtype)
        if op in IN_ONE_LAUNCH:
            on_host(IN_ONE_LAUNCH[op])
    return recording.calls, kernels


def replay(op: str, calls: list[bytes], flavour: str, tmp_path: Path) -> None:
    """Run the calls in every order under the sanitizer, which must find nothing."""
    (tmp_path / "calls").write_bytes(b"".join(calls))
    sources = [SIMULATOR / "replay.cpp", SIMULATOR / "ops" / f"{op}.cpp"]
    command = cuda_host.program(f"replay.{op}", sources, flavour)
    environment = {**os.environ, **cuda_host.ENVIRONMENT}
    done = subprocess.run(
        [*command, tmp_path / "calls"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, f"{len(calls)} calls\n"), done.stdout + done.stderr


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("op", OPS)
def test_sanitizers_find_nothing(op, flavour, tmp_path):
    replay(op, recorded(op, flavour)[0], flavour, tmp_path)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_every_kernel_is_among_them(flavour):
    sources = "".join(p.read_text() for p in (cuda_host.ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", sources))
    assert kernels == {kernel for op in OPS for kernel in recorded(op, flavour)[1]}
