"""``verify``: a model's outputs, gradients and buffers against float64, by the accuracy rule.

Three executions of the same model are compared. *Ours* is the model as it is. The *reference* is
PyTorch's own modules in float64, *eager* the same modules in the tested dtype. To run them on
PyTorch's own modules, ``unfuse`` undoes what ``fuse`` did, and a hook on every module keeps this
library's blocks from fusing: a block calls a module that has hooks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import dispatch
from .accuracy import Errors, errors
from .execute import (
    Results,
    Step,
    map_floating,
    moved_by_roundings,
    on_plain_modules,
    summed_elements,
    tensors_of,
    tested_dtype,
)
from .kinks import Kinks
from .table import render


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


NEAREST = 12  # rows that str() shows, besides failing ones


@dataclass(frozen=True, repr=False)
class Verification:
    """What ``verify`` compared. ``str()`` is a table of the rows nearest to their bounds, and of
    every failing one; ``table()`` has all of them."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def summary(self) -> str:
        failing = sum(not row.ok for row in self.rows)
        verdict = f"{failing} of {len(self.rows)} FAIL" if failing else f"all {len(self.rows)} ok"
        return f"{verdict} against float64"

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
        more = "" if len(self.rows) <= NEAREST else f", the {NEAREST} nearest to their bounds"
        head = f"distances from float64{more} (bound: what is allowed)"
        return f"{head}\n{self.table(NEAREST)}\n{self.summary}"

    def __repr__(self) -> str:
        return f"Verification({self.summary})"


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

    The rule's floor grows with the length M of a sum. A parameter's gradient sums over the images
    and pixels that its own module puts out: M is that module's output elements divided by the
    parameter's rows (N*H*W for a convolution or a norm, N for a linear layer). What came before in
    the network is not counted: it is in eager's error, and an M for all of it (10^6 and more) would
    allow any value in bfloat16. Every other tensor has M = 1. Where a gradient cancels (that of a
    bias before a batch norm is zero but for rounding), the floor is one of the module's other
    gradients.

    Args:
        model: any module; it and its state are left as they are.
        inputs: its positional arguments; left as they are.
        train: compare a step in training: outputs, gradients of parameters and inputs (for a
            random gradient of the outputs), and buffers. Otherwise inference without gradients:
            outputs, and buffers, which it must not change. The model's own mode does not matter.
            Give batch norm 8 values a channel or more: over two or three it magnifies roundings at
            random, by more in one execution than in the other.

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
    devices = {t.device for t in tensors_of(model, inputs)}
    cuda = sorted({d.index for d in devices if d.type == "cuda"})
    kinks, no_autocast = Kinks(), contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(train))
        ours = Step(copy.deepcopy(model), inputs, train).results()
        stack.enter_context(dispatch.backend("reference"))
        plain, eager_inputs = on_plain_modules(model), inputs
        exact = copy.deepcopy(plain).double()
        if tested_dtype(model, inputs, devices) == torch.float64:
            plain, eager_inputs = moved_by_roundings(plain, inputs)
        with kinks.recording():
            step = Step(plain, eager_inputs, train)
        eager = step.results()
        for device in devices:
            no_autocast.enter_context(torch.autocast(device.type, enabled=False))
        with no_autocast, kinks.moving():
            step = Step(exact, map_floating(Tensor.double, inputs), train)
        ref = step.results()
        sides = []
        for sign in (1, -1):
            with kinks.side(sign):
                sides.append(step.gradients())
    counts = summed_elements(exact)
    return Verification(tuple(_compare(ours, ref, eager, sides, counts)))


def _compare(
    ours: Results, ref: Results, eager: Results, sides: list[Results], counts: dict[str, int]
) -> Iterator[Row]:
    if not ours.keys() == ref.keys() == eager.keys():
        names = sorted(ours.keys() ^ ref.keys())
        raise ValueError(f"model: wanted the same tensors in float64, got other ones: {names}")
    scales: dict[str, float] = {}
    for name in counts.keys() & ref.keys():
        size = ref[name].norm().item() / max(1, ref[name].numel()) ** 0.5
        scales[_module(name)] = max(size, scales.get(_module(name), 0.0))
    for name, value in ours.items():
        eagers = [eager[name], *(side[name] for side in sides if name in side)]
        found = errors(
            value, ref[name], eagers,
            gradient=name.startswith("gradient"),
            count=counts.get(name, 1),
            scale=scales.get(_module(name), 0.0),
        )  # fmt: skip
        yield Row(name, found)


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name
