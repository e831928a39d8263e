"""Runs against an installed fusedres, from outside the repository; test_packaging.py starts it.

Prints as JSON where the library came from and what it can run, after a block's forward and backward
have been compared with plain PyTorch. --gpu 9.0: and which backends a GPU of this compute
capability would get; --symbols NAME ...: and which of them this PyTorch lacks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from accuracy import assert_as_accurate_as_eager

with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import fusedres


def plain_forward(block: nn.Module, x: Tensor) -> Tensor:
    out = torch.relu(block.bn1(block.conv1(x)))
    return torch.relu(block.bn2(block.conv2(out)) + x)


def results(forward, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step of a fresh block."""
    torch.manual_seed(0)
    block = fusedres.BasicBlock(24, 24)
    x = torch.randn(3, 24, 9, 7).to(dtype).requires_grad_()
    block = block.to(dtype).train()
    y = forward(block, x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(dtype))
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in block.named_parameters()}
    return found | {name: b for name, b in block.named_buffers() if b.is_floating_point()}


def chosen(capability: str) -> list[str]:
    """The backends of some ops on a GPU that this machine need not have."""
    from fusedres import dispatch

    major_minor = tuple(map(int, capability.split(".")))
    torch.cuda.get_device_capability = lambda index: major_minor
    torch.cuda.get_device_name = lambda index: f"GPU {index}"
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    return [dispatch.choose(op, x).backend for op in ("bn_act", "squeeze_excite", "residual_mix")]


def unresolved(symbols: list[str]) -> list[str]:
    libraries = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch.so"))
    return [name for name in symbols if not hasattr(libraries, name)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu")
    parser.add_argument("--symbols", nargs="*", default=[])
    options = parser.parse_args()
    with warnings.catch_warnings(record=True) as at_run:
        warnings.simplefilter("always")
        outs = results(lambda block, x: block(x), torch.float32)
        on_gpu = chosen(options.gpu) if options.gpu else []
    refs = results(plain_forward, torch.float64)
    eagers = results(plain_forward, torch.float32)
    for name, out in outs.items():
        # A weight's gradient is a sum over the batch and the image; a running mean over as many.
        sums = dict(gradient=name.endswith("grad"), count=3 * 9 * 7)
        assert_as_accurate_as_eager(out, refs[name], eagers[name], name=name, **sums)
    report = {
        "file": str(Path(fusedres.__file__)),
        "version": fusedres.__version__,
        "backends": fusedres.backends(),
        "archs": (fusedres.native.cuda_inside() or ((), ()))[1],
        "chosen": on_gpu,
        "torch": torch.__version__,
        "torch_has_cuda": torch.version.cuda is not None,
        "unresolved": unresolved(options.symbols),
        "warnings": [str(w.message) for w in at_import + at_run],
    }
    try:
        with fusedres.backend("native"):
            results(lambda block, x: block(x), torch.float32)
        report["native"] = None
    except RuntimeError as error:
        report["native"] = str(error)
    print(json.dumps(report))


main()
