"""Finds the Triton kernels, and remembers why when they cannot run. Does not import Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .native import REFUSED, explained

OLDEST = (3, 6)  # the oldest release that the kernels are compiled and run with
LOWEST_CAPABILITY = (8, 0)  # Ampere: the lowest that the kernels are compiled for


@cache
def package() -> ModuleType:
    """``fusedres.kernels``; in a checkout that is not installed, the folder beside this one."""
    name = "fusedres.kernels"
    if importlib.util.find_spec(name) is None:
        folder = Path(__file__).parents[1] / "kernels"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return importlib.import_module(name)


@cache
def version() -> str | None:
    """The installed Triton, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, as ROCm's is
        return importlib.import_module("triton").__version__


@cache
def missing() -> str | None:
    """Why no kernel can run here, or None."""
    found = version()
    if found is None:
        return "Triton is not installed"
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        return f"Triton {found} is older than {OLDEST[0]}.{OLDEST[1]}"
    if torch.version.hip is not None:
        return "the kernels are compiled for NVIDIA GPUs only, this PyTorch is built for ROCm"
    return None


@cache
def device_reason(index: int) -> str | None:
    """Why kernels cannot run on this CUDA device, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(index), LOWEST_CAPABILITY
        has = "{}.{}".format(*capability)
        return f"{name} has compute capability {has}, the kernels need {major}.{minor}"
    try:
        if interpreted():
            return "TRITON_INTERPRET is set: the kernels are interpreted, on CPU tensors"
    except ImportError as error:
        return f"Triton {version()} cannot be imported: {error}"
    return trial(torch.device("cuda", index))


def trial(device: torch.device) -> str | None:
    """Why Triton compiles or launches nothing for this device, or None: runs its least kernel.

    A C compiler may be missing, which Triton needs to launch, or code for so new a GPU in Triton.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # compiling spoils a capture: the op that is captured will say what is wrong
    launch, bn_act = (package().module(name) for name in ("launch", "bn_act"))
    try:
        with launch.uncounted(), _disable_current_modes():  # fake tensors launch nothing
            bn_act.bn_stats(torch.zeros(2, 16, 1, 1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        return f"Triton {version()} runs no kernel on {device}: {type(error).__name__}: {told}"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton interprets the kernels instead of compiling them. Imports Triton."""
    return package().module("launch").INTERPRETED


def counted():
    """A context whose value is the list of the kernels that this thread launches inside."""
    return package().module("launch").counted()


def has(op: str) -> bool:
    return op in package().LAUNCHERS


def launcher(op: str) -> Callable:
    """The function that runs ``op``: its schema's arguments and results."""
    return package().launcher(op)


def plan(op: str, plain: Callable, native: Callable[[int], object] | None, args: tuple):
    """Who runs a composed op, as a ``kernels.ways.Plan``: a kernel, cuDNN or ``plain``.

    Args:
        plain: runs the op as the composition that it is, for measuring.
        native: runs the library's CUDA kernel in a variant; None if it cannot run.
    """
    kernels = package()
    own = None if native is None else partial(_or_unfit, op, args[0], native)
    return kernels.module(kernels.LAUNCHERS[op]).plan(plain, own, *args)


def _or_unfit(op: str, x: Tensor, native: Callable, *args):
    """``native(*args)``, where a launch that the GPU refused leaves this way to run ``op`` out."""
    try:
        return native(*args)
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise explained(op, x, error) from None
        raise unfit()(str(error).splitlines()[0]) from error


@cache
def decides(index: int) -> bool:
    """Whether measurements have a say in who runs an op on this GPU: if there are, or will be, any.

    Every op asks, so it is found out once, and Triton is imported only where there is a file.
    """
    kernels = package()
    if kernels.tuning_asked():
        return True
    if not any(kernels.cache_folder().glob("*.json")):
        return False
    if missing() is not None or device_reason(index) is not None:
        return False
    return kernels.module("rivals").any_measured(torch.device("cuda", index))


def faster(op: str, x: Tensor, native: Callable, args: tuple) -> tuple[str, str | None]:
    """Who was measured to run ``op`` faster, "native" or "triton", and what that rests on.

    Args:
        native: runs the library's CUDA kernel.
    """
    own = partial(_or_unfit, op, x, native)
    return package().module("rivals").faster(op, own, launcher(op), x.device, args)


def ways() -> ModuleType:
    """The part of the convolutions' choice that needs no Triton."""
    return package().module("ways")


def unfit() -> type[RuntimeError]:
    """What a launcher raises when the GPU has not the resources for any configuration."""
    return package().module("tuning").Unfit


def misfits() -> tuple[type[Exception], ...]:
    """``unfit``, and what Triton raises for a kernel that has one configuration only."""
    return unfit(), package().module("tuning").OutOfResources


def can_run(op: str, x: Tensor, *, by_name: bool) -> str | None:
    """Why the kernels cannot run ``op`` on ``x``, or None.

    Args:
        by_name: whether Triton was asked for by name: only then is a CPU tensor interpreted.
    """
    if (reason := missing()) is not None:
        return reason
    if x.dtype == torch.float64:
        return "float64 runs on the reference"
    if x.device.type == "cuda":
        return device_reason(x.device.index)
    if x.device.type != "cpu":
        return f"the kernels run on CUDA devices, not on {x.device.type}"
    if not by_name:
        return "the kernels run on CUDA devices, not on cpu"
    if not interpreted():
        return (
            "x is on cpu, where Triton only interprets kernels, for tests: set TRITON_INTERPRET=1"
            " before the first import of triton or fusedres"
        )
    return None
