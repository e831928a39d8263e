"""Counts kernels and memory traffic of a call, plain or fused, with one ruler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import dispatch, observers

# Batch norm reads its arguments once for the sums and once more to apply them: in training x, and
# in the backward dy and x.
_READ_AGAIN = {"native_batch_norm": 1, "cudnn_batch_norm": 1, "_batch_norm_with_update": 1}
_READ_AGAIN |= {"native_batch_norm_backward": 2, "cudnn_batch_norm_backward": 2}


@dataclass
class Traffic:
    """Kernels that read or write an activation, and the bytes of activations they move."""

    kernels: int = 0
    bytes: int = 0


class _Counter(TorchDispatchMode):
    """Hears PyTorch's own operators; the library's report themselves (``observers.observe``)."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.total = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        if (
            func.namespace in ("aten", "mkldnn")
            and not func.is_view
            and not op.startswith(("empty", "new_"))
        ):
            moved = [t for t in tree_leaves((args, kwargs, out)) if self._is_activation(t)]
            shapes_only = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(out))
            if moved and not shapes_only:
                again = _READ_AGAIN.get(op, 0) * max(_bytes(t) for t in moved)
                self.add(1, sum(map(_bytes, moved)) + again)
        return out

    def _is_activation(self, t: object) -> bool:
        whole = isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == self.batch
        return whole and t.shape[2] * t.shape[3] > 1

    def add(self, kernels: int, moved: int) -> None:
        self.total.kernels += kernels
        self.total.bytes += moved

    def hear(self, event: observers.Event) -> None:
        # What runs as several of PyTorch's operators has been heard one by one.
        native = event.backend == "native" and event.op not in dispatch.COMPOSED
        if native or event.backend == "triton":
            self.add(event.launches, event.bytes_moved)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def traffic_of(call: Callable[[], object], batch: int) -> Traffic:
    """What ``call()`` runs on tensors of ``batch`` images."""
    counter = _Counter(batch)
    with observers.observe(counter.hear), counter:
        call()
    return counter.total


def training_traffic(model: nn.Module, x: Tensor, y: Tensor) -> Traffic:
    """Forward and backward of one step; the weights' own traffic and the optimiser are left out."""
    total = traffic_of(lambda: F.cross_entropy(model(x), y).backward(), x.shape[0])
    model.zero_grad()
    return total
