"""What each test runs under: fixed seeds, two threads, poisoned memory; torchvision imports."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

THREADS = 2


# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before the
# first import of Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _hide_kernels_folder() -> None:
    """Keep transformers from taking the repository's kernels/ for the package of that name.

    ``python -m pytest`` puts the working directory on the path.
    """
    spec = importlib.util.find_spec("kernels")
    root = Path(__file__).resolve().parent.parent
    if spec is not None and spec.origin and Path(spec.origin).is_relative_to(root):
        sys.modules["kernels"] = None


_hide_kernels_folder()


def _make_torchvision_importable() -> torch.library.Library | None:
    """Define the two schemas whose absence breaks ``import torchvision`` beside a CPU-only torch.

    torchvision's wheel is built for CUDA: its library does not load there, and its Python code
    then registers fakes for ops that nobody defined. The ops themselves stay unusable; no test
    uses them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return None
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


# At import, before any test module imports torchvision; the definitions live as long as the object.
TORCHVISION_SCHEMAS = _make_torchvision_importable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def reproducible():
    """The same random numbers and thread count for each test, whatever ran before it."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
