"""What ``explain`` hears of a running model: modules and ops, as rows.

Modules announce themselves through PyTorch's global module hooks: a hook on a module of the model
would keep it from being fused. Fused ops announce themselves through ``observers.observe``. In the
backward an op belongs to the module whose result the gradient has come through last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from .. import observers
from ..blocks import SqueezeExcite
from ..blocks.recognise import only_listens
from ..convert.recognise import why_left_alone

# What runs an op in one pass of its own. Anything else is PyTorch's eager execution.
_FUSED_BACKENDS = ("native", "triton", "onednn", "cudnn")


@dataclass(frozen=True)
class Row:
    """One op call, or one part that ran unfused.

    ``module`` is the innermost named module of the model that was running ("" is the model
    itself), ``backend`` what carried the op out: "native", "triton", "onednn", "cudnn",
    "reference", "aten" or "aten + ..." (PyTorch's convolution, and ops with rows of their own) for
    an op of this library, "torch" for a module of PyTorch that ran by itself,
    "unfused" for a part whose modules are not seen one by one. Bytes are of memory moved.
    """

    module: str
    op: str
    backend: str
    launches: int
    bytes_moved: int
    eager_bytes: int
    reason: str | None = None

    @property
    def fused(self) -> bool:
        return self.backend in _FUSED_BACKENDS


@dataclass
class _Frame:
    """A named module that is running (None: nothing of the model)."""

    module: nn.Module | None
    name: str
    reason: str | None  # why a part of the model that it belongs to is unfused
    has_ops: bool = False
    # The latest "unfused" event: its row, and how many of the next modules it is about.
    notice: Row | None = None
    about: int = 0


class Recorder:
    """Turns what it hears of modules and ops into rows."""

    def __init__(self, model: nn.Module):
        self.rows: list[Row] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._frames: list[_Frame] = []
        self._thread = threading.get_ident()
        self._backward_of = ""  # the module whose gradient is being computed
        self._nodes: set[Node] = set()  # of results of modules, the innermost's first

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(observers.observe(self._on_event))
            before = hooks.register_module_forward_pre_hook(self._on_enter)
            stack.callback(before.remove)
            after = hooks.register_module_forward_hook(self._on_leave, with_kwargs=True)
            stack.callback(after.remove)
            # remove() forgets this one, and torch.compile then warns of a hook (PyTorch 2.13).
            stack.callback(hooks._global_forward_hooks_with_kwargs.pop, after.id, None)
            yield

    @only_listens
    def _on_enter(self, module: nn.Module, args) -> None:
        if module not in self._names or threading.get_ident() != self._thread:
            return
        # What a module reads, and no module made, the one around it did.
        self._belongs(args, self._frames[-1].name if self._frames else "")
        reason = self._take_reason() if self._frames else None
        self._frames.append(_Frame(module, self._names[module], reason))

    def _take_reason(self) -> str | None:
        """The reason that the running module gave for the modules it is about to call."""
        frame = self._frames[-1]
        if frame.about:
            frame.about -= 1
            return frame.notice.reason
        return frame.reason

    @only_listens
    def _on_leave(self, module: nn.Module, args, kwargs, output) -> None:
        if module not in self._names or threading.get_ident() != self._thread:
            return
        frame = self._frames.pop()
        while frame.module is not module:  # one that raised, and whose caller went on without it
            frame = self._frames.pop()
        self._belongs(output, frame.name)
        leaf = next(module.children(), None) is None
        if leaf and not frame.has_ops:
            self._add_module(frame, tree_leaves((args, kwargs)), tree_leaves(output))

    def _belongs(self, values: object, name: str) -> None:
        """The backward of these, but for what is known already, is that of module ``name``."""
        for node in {t.grad_fn for t in tree_leaves(values) if isinstance(t, Tensor)}:
            if node is not None and node not in self._nodes:
                self._nodes.add(node)
                node.register_prehook(partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradients) -> None:
        self._backward_of = name

    def _add_module(self, frame: _Frame, inputs: list, outputs: list) -> None:
        moved = _module_bytes(frame.module, inputs, outputs)
        if moved == 0:
            return
        kind = type(frame.module).__name__
        reason = frame.reason or self._outside(frame.module)
        self._drop_notice(frame.reason)
        self.rows.append(Row(frame.name, kind, "torch", 1, moved, moved, reason))

    def _outside(self, module: nn.Module) -> str | None:
        """What to say of a module that a fused op could have run."""
        if not _is_fusable(module):
            return None
        around = self._frames[-1].module if self._frames else None
        cause = None if around is None else why_left_alone(around)
        return "not in a fused block" + (f": {cause}" if cause else "")

    def _drop_notice(self, reason: str | None) -> None:
        """The modules that a notice is about have rows of their own: it has none."""
        for frame in self._frames:
            if frame.notice is not None and frame.notice.reason == reason:
                self.rows = [row for row in self.rows if row is not frame.notice]

    def _on_event(self, event: observers.Event) -> None:
        frame = self._frames[-1] if self._frames else _Frame(None, self._backward_of, None)
        row = Row(
            frame.name, event.op, event.backend, event.launches, event.bytes_moved,
            event.eager_bytes, event.reason,
        )  # fmt: skip
        if event.backend == "unfused":
            if frame.about and frame.notice.reason == row.reason:  # the same part, told twice
                self._drop_notice(row.reason)
            frame.notice, frame.about = row, event.launches
            if isinstance(frame.module, SqueezeExcite):
                frame.reason = row.reason  # all of it
        else:
            frame.has_ops = True
            if not row.fused:
                row = replace(row, bytes_moved=row.eager_bytes)
            self._split_convolution(row)
        self.rows.append(row)

    def _split_convolution(self, row: Row) -> None:
        """A conv_bn_act in two calls: the second speaks for itself, the first is a convolution."""
        before = self.rows[-1] if self.rows else None
        two_calls = before is not None and (before.op, row.op) == ("conv_bn_act", "bn_act")
        if two_calls and not before.fused:
            alone = before.eager_bytes - row.eager_bytes
            self.rows[-1] = replace(before, bytes_moved=alone, eager_bytes=alone)


def _is_fusable(module: nn.Module) -> bool:
    """Whether a fused op exists for modules of this kind."""
    kinds = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.ReLU, nn.SiLU
    return isinstance(module, kinds) or type(module).__name__ in ("ReLU6", "Hardswish", "GELU")


def _module_bytes(module: nn.Module, inputs: list, outputs: list) -> int:
    """Inputs, outputs and parameters once each; 0 for a module that hands its input on."""
    inputs, outputs = ([t for t in ts if isinstance(t, Tensor)] for ts in (inputs, outputs))
    known = {_address(t) for t in inputs}
    in_place = getattr(module, "inplace", False)
    if all(_address(t) in known for t in outputs) and not in_place:
        return 0
    return sum(t.numel() * t.element_size() for t in (*inputs, *outputs, *module.parameters()))


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
