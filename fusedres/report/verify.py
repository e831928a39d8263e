"""``verify``: a model's outputs, gradients and buffers against float64, by the accuracy rule.

Three executions of the same model are compared. *Ours* is the model as it is. The *reference* is
PyTorch's own modules in float64, *eager* the same modules in the tested dtype. To run them on
PyTorch's own modules, ``unfuse`` undoes what ``fuse`` did, and a hook that does nothing on every
other module keeps this library's blocks from fusing: a block calls a module that has hooks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import dispatch
from .accuracy import Errors, errors
from .kinks import Kinks
from .table import render

Results = dict[str, Tensor]

# Roundings by which the numbers of a model are moved to stand in for eager in float64.
_ROUNDINGS = 4
_SEED = 0


@dataclass(frozen=True)
class Row:
    """One compared tensor: largest differences from the reference, and what is allowed.

    ``ok`` also takes in the same rule for the L2 norm, whose figures are in ``errors``.
    """

    name: str
    errors: Errors

    @property
    def error(self) -> float:
        return self.errors.max_error

    @property
    def eager(self) -> float:
        """Eager PyTorch's error."""
        return self.errors.max_eager

    @property
    def bound(self) -> float:
        return self.errors.max_bound

    @property
    def ok(self) -> bool:
        return self.errors.ok


@dataclass(frozen=True)
class Verification:
    """What ``verify`` compared. ``str()`` is a table of every row."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def summary(self) -> str:
        failing = sum(not row.ok for row in self.rows)
        verdict = f"{failing} of {len(self.rows)} FAIL" if failing else f"all {len(self.rows)} ok"
        return f"{verdict}: outputs, gradients and buffers against float64"

    def table(self, worst: int | None = None) -> str:
        """A line for every row; or for the failing ones and, up to ``worst``, the next nearest."""
        picked = self.rows
        if worst is not None:
            by_ratio = sorted(self.rows, key=lambda row: row.errors.ratio, reverse=True)
            picked = by_ratio[: max(worst, sum(not row.ok for row in self.rows))]
        columns = "tensor", "error", "eager's", "bound", "L2 error", "L2 eager's", "L2 bound", ""
        rows = [
            (
                row.name, *map(_number, (row.error, row.eager, row.bound)),
                *map(_number, (row.errors.l2_error, row.errors.l2_eager, row.errors.l2_bound)),
                "ok" if row.ok else "FAIL",
            )
            for row in picked
        ]  # fmt: skip
        return render(columns, rows, numeric=columns[1:7])

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary}"


def _number(x: float) -> str:
    return f"{x:.2e}" if x else "0"


def verify(model: nn.Module, *inputs, train: bool = False) -> Verification:
    """Compare the model, as it is and on its backend, with float64.

    Every compared tensor must be as near to the float64 reference as eager PyTorch is, by the rule
    of ``fusedres.report.accuracy``: twice eager's error (three times for gradients) plus four
    roundings of the largest value, for the largest element and for the L2 norm.

    A gradient is no continuous function of a network's roundings: a ReLU whose input is within
    rounding of zero passes or stops its gradient by chance, and where eager happens to fall on the
    reference's side another execution need not. So eager's error of a gradient is the largest of
    three: its own, and those of the reference with every such choice made on the one side, or on
    the other (``fusedres.report.kinks``). Where nothing is within rounding, they are zero.

    In float64 eager would be the reference itself. There it is the reference with all parameters
    and inputs moved by a few roundings.

    The rule's floor grows with the length M of a sum. Here M is 1 for every tensor, also for the
    gradients of parameters, which are sums over images and pixels: their error comes from the
    layers around them, which eager's error measures, and not from their own sum, which is kept in
    float32 or float64. The M of a whole network (10^5 and more) would in bfloat16 allow any value.

    Args:
        model: any module; it and its state are left as they are.
        inputs: its positional arguments; left as they are.
        train: compare a step in training: outputs, gradients of parameters and inputs (for a
            random gradient of the outputs), and buffers. Otherwise inference without gradients:
            outputs, and buffers, which it must not change. The model's own mode does not matter.

    Returns:
        Verification. Autocast counts as the caller has it, for the model and for eager. Random
        layers (dropout, stochastic depth) draw from the same seed in each execution.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model returns no tensor, or tensors of another shape in float64.
        Whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    devices = {t.device for t in _tensors(model, inputs)}
    cuda = sorted({d.index for d in devices if d.type == "cuda"})
    kinks, no_autocast = Kinks(), contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(train))
        ours = _Step(copy.deepcopy(model), inputs, train).results()
        stack.enter_context(dispatch.backend("reference"))
        plain, eager_inputs = _on_plain_modules(model), inputs
        exact = copy.deepcopy(plain).double()
        if _tested_dtype(model, inputs, devices) == torch.float64:
            plain, eager_inputs = _moved_by_roundings(plain, inputs)
        with kinks.recording():
            step = _Step(plain, eager_inputs, train)
        eager = step.results()
        for device in devices:
            no_autocast.enter_context(torch.autocast(device.type, enabled=False))
        with no_autocast, kinks.moving():
            step = _Step(exact, _map(Tensor.double, inputs), train)
        ref = step.results()
        sides = []
        for sign in (1, -1):
            with kinks.side(sign):
                sides.append(step.gradients())
    return Verification(tuple(_compare(ours, ref, eager, sides)))


def _compare(ours: Results, ref: Results, eager: Results, sides: list[Results]) -> Iterator[Row]:
    if not ours.keys() == ref.keys() == eager.keys():
        names = sorted(ours.keys() ^ ref.keys())
        raise ValueError(f"model: wanted the same tensors in float64, got other ones: {names}")
    for name, value in ours.items():
        eagers = [eager[name], *(side[name] for side in sides if name in side)]
        gradient = name.startswith("gradient")
        yield Row(name, errors(value, ref[name], eagers, gradient=gradient))


class _Step:
    """One forward of a model, which it changes, and what is compared of it, by name."""

    def __init__(self, model: nn.Module, inputs: tuple, train: bool):
        torch.manual_seed(_SEED)
        self._model, self._train = model.train(train), train
        self._inputs = tree_map_only(Tensor, lambda t: _leaf(t, train), inputs)
        self._outputs = _named_outputs(model(*self._inputs))
        if not self._outputs:
            raise ValueError("model: wanted a forward that returns tensors, got one without")

    def results(self) -> Results:
        outputs = {name: t.detach() for name, t in self._outputs.items()}
        buffers = {f"buffer {n}": b.detach() for n, b in self._model.named_buffers()}
        return outputs | self.gradients() | buffers

    def gradients(self) -> Results:
        """Gradients for a random gradient of the outputs; zeros where none arrives."""
        parameters = self._model.named_parameters()
        wanted = {f"gradient of {n}": p for n, p in parameters if p.requires_grad}
        for i, t in enumerate(_leaves(self._inputs)):
            if t.requires_grad:
                wanted[f"gradient of input {i}"] = t
        starts = [t for t in self._outputs.values() if t.requires_grad]
        if not self._train or not starts:
            return {}
        random = torch.Generator().manual_seed(_SEED)
        # Rounded to bfloat16, so that every execution gets the same values in its own dtype.
        cotangents = [torch.randn(t.shape, generator=random).bfloat16().to(t) for t in starts]
        grads = torch.autograd.grad(
            starts, list(wanted.values()), cotangents,
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(wanted, grads, strict=True))


def _named_outputs(value: object, name: str = "output") -> Results:
    """The tensors in a forward's result: a tensor, or any nesting of mappings and sequences."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}", v) for key, v in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = [(f"{name} {i}", v) for i, v in enumerate(value)]
    else:
        return {}
    found: Results = {}
    for key, v in items:
        found |= _named_outputs(v, key)
    return found


def _on_plain_modules(model: nn.Module) -> nn.Module:
    """A copy that runs on PyTorch's own modules."""
    from ..convert import unfuse  # here, because convert is built on the blocks that call dispatch

    plain = copy.deepcopy(model)
    with contextlib.suppress(TypeError, ValueError):  # compiled, or hidden by a later subclass:
        unfuse(plain, inplace=True)  # then its ops run on the reference backend
    for module in plain.modules():
        module.register_forward_hook(_do_nothing)
    return plain


def _do_nothing(module: nn.Module, args, output) -> None:
    """Its presence is enough: a block does not fuse a module that has hooks."""


def _moved_by_roundings(model: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    """A copy of both whose numbers differ by a random share of a few roundings in float64."""
    random = torch.Generator().manual_seed(_SEED)
    relative = _ROUNDINGS * torch.finfo(torch.float64).eps / 2

    def move(x: Tensor) -> Tensor:
        share = 2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1
        return x * (1 + relative * share.to(x.device))

    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(move(p))
    return model, _map(move, inputs)


def _leaves(inputs: tuple) -> list[Tensor]:
    return [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]


def _tensors(model: nn.Module, inputs: tuple) -> list[Tensor]:
    inside = [*model.parameters(), *model.buffers()]
    return inside + _leaves(inputs)


def _tested_dtype(model: nn.Module, inputs: tuple, devices: set[torch.device]) -> torch.dtype:
    """The coarsest dtype that the model computes in."""
    dtypes = {t.dtype for t in _tensors(model, inputs) if t.is_floating_point()}
    autocast = [d.type for d in devices if torch.is_autocast_enabled(d.type)]
    dtypes |= {torch.get_autocast_dtype(kind) for kind in autocast}
    return max(dtypes or {torch.get_default_dtype()}, key=lambda d: torch.finfo(d).eps)


def _map(fn: Callable[[Tensor], Tensor], inputs: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: fn(t) if t.is_floating_point() else t, inputs)


def _leaf(t: Tensor, train: bool) -> Tensor:
    return t.detach().clone().requires_grad_(train and t.is_floating_point())
