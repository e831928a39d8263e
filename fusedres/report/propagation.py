"""``propagation``: how a signal and its gradient go through a network, block by block.

He et al. 2016b, equations 3 to 5: where every shortcut is the identity and nothing follows the
addition, the signal is a sum, ``x_L = x_l + sum F(x_i)``, and so is the gradient,
``dx_l = dx_L + sum dF(x_i)/dx_i * dx_{i+1}``: it cannot vanish. Both are checked here, with every
term taken from the running network on its own: F(x) is what the branch's last module returned, the
gradient through the branch is what arrived at its first module.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .probe import Block, Probe, norm, relative, tolerance
from .table import render

_BLOCK = re.compile(r"Block|Bottleneck|Highway|EncoderLayer|ResidualUnit")


@dataclass(frozen=True)
class Run:
    """Blocks in a row that are identity mappings, and how exactly the two sums hold over them.

    Errors are relative L2 norms, ``tolerance`` is what roundings may make of them.
    """

    blocks: tuple[str, ...]
    forward_error: float
    backward_error: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        return max(self.forward_error, self.backward_error or 0.0) <= self.tolerance


@dataclass(frozen=True)
class Propagation:
    """What ``propagation`` measured. ``str()`` is a table."""

    blocks: tuple[Block, ...]
    runs: tuple[Run, ...]

    @property
    def ok(self) -> bool:
        return all(run.ok for run in self.runs)

    def __str__(self) -> str:
        columns = "block", "kind", "|x|", "|F(x)|", "|dx|", "|dF|"
        rows = [(b.name, b.kind, *map(_number, (b.x, b.f, b.dx, b.df))) for b in self.blocks]
        lines = [render(columns, rows, numeric=columns[2:])]
        for run in self.runs:
            sums = f"x_L = x_l + sum F holds to {run.forward_error:.1e}"
            if run.backward_error is not None:
                sums += f", dx_l = dx_L + sum dF to {run.backward_error:.1e}"
            verdict = "ok" if run.ok else "FAIL"
            where = run.blocks[0]
            if len(run.blocks) > 1:
                where += f" to {run.blocks[-1]} ({len(run.blocks)} blocks)"
            lines.append(f"{where}: {sums} (allowed {run.tolerance:.1e}): {verdict}")
        if not self.runs:
            lines.append("no block is an identity mapping, so there is no sum to check: norms only")
        return "\n".join(lines)

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw the norms over the blocks into a file; the suffix is the format.

        Args:
            title: above them, as the model's name.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        signal, gradient = figure.subplots(2, 1, sharex=True)
        index = range(len(self.blocks))
        for axes, lines in (
            (signal, {"|x|": "x", "|F(x)|": "f"}), (gradient, {"|dx|": "dx", "|dF|": "df"}),
        ):  # fmt: skip
            for label, name in lines.items():
                values = [getattr(b, name) for b in self.blocks]
                values = [float("nan") if v is None else v for v in values]
                axes.plot(index, values, marker="o", markersize=3, label=label)
            axes.set_yscale("log")
            axes.set_ylabel("L2 norm")
            axes.legend()
        if title:
            signal.set_title(title)
        gradient.set_xlabel("block")
        gradient.set_xticks(list(index), [b.name for b in self.blocks], rotation=90, fontsize=6)
        figure.savefig(path)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def propagation(
    model: nn.Module,
    *inputs,
    loss: Callable[..., Tensor] | None = None,
    blocks: Callable[[str, nn.Module], bool] | None = None,
) -> Propagation:
    """Run ``model(*inputs)`` and its backward once and measure every residual block.

    The network runs on a copy, module by module, in its own mode (train or eval); the model, its
    gradients and the state of the random number generator are left as they were.

    Args:
        model: any module.
        inputs: its positional arguments.
        loss: of the model's result; default: its sum with fixed random weights.
        blocks: which modules are blocks, by name and module; default: the innermost ones whose
            class is called a block, bottleneck, highway or encoder layer.

    Returns:
        Propagation: blocks in the order they ran. A dense block's layers are one block.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no block has run; the result has no tensor to start a gradient from.
        Whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False):
        model = copy.deepcopy(model).requires_grad_()
    wanted = dict(_blocks_of(model, blocks or _is_block))
    probes = {name: Probe(block) for name, block in wanted.items()}
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.enable_grad())
        inputs = tree_map(_ordinary, inputs)
        for name, probe in probes.items():
            stack.enter_context(probe.watching(name, order))
        result = model(*inputs)
        if not order:
            kind = type(model).__name__
            raise ValueError(
                f"model: wanted residual blocks, found none in {kind}; blocks= says which they are"
            )
        _scalar(result, loss).backward()
    measured = [probes[name] for name in order]
    found = tuple(p.block(name or "(model)") for name, p in zip(order, measured, strict=True))
    return Propagation(found, tuple(_runs(found, measured)))


def _ordinary(t):
    """A tensor made in inference mode as one that a gradient can go through."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


def _is_block(name: str, module: nn.Module) -> bool:
    if not _BLOCK.search(type(module).__name__):
        return False
    # A container of blocks has no forward of its own, as a dense block has.
    return type(module).forward not in (nn.Sequential.forward, nn.Module.forward)


def _blocks_of(model: nn.Module, is_block) -> Iterator[tuple[str, nn.Module]]:
    """The matching modules that hold no other one."""
    found = [(name, m) for name, m in model.named_modules() if is_block(name, m)]
    for name, module in found:
        inside = {id(m) for m in module.modules()} - {id(module)}
        if not any(id(other) in inside for _, other in found):
            yield name, module


def _scalar(result, loss) -> Tensor:
    if loss is not None:
        return loss(result)
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise ValueError("model: wanted a result that requires grad, got none")
    random = torch.Generator().manual_seed(0)
    return sum(
        (t * torch.randn(t.shape, generator=random).to(t)).sum() / t.numel() ** 0.5 for t in outputs
    )


def _runs(blocks: tuple[Block, ...], probes: list[Probe]) -> Iterator[Run]:
    """Maximal runs of identity mappings, each of which reads what the one before wrote."""
    at = 0
    while at < len(blocks):
        end = at
        while end < len(blocks) and blocks[end].kind == "identity":
            if end > at and not torch.equal(probes[end].x.detach(), probes[end - 1].y):
                break
            end += 1
        if end > at:
            yield _run(blocks[at:end], probes[at:end])
        at = max(end, at + 1)


def _run(blocks: tuple[Block, ...], probes: list[Probe]) -> Run:
    first, last = probes[0], probes[-1]
    total = sum((p.f.double() for p in probes), first.x.detach().double())
    allowed = tolerance(last.y, 1 + len(blocks), *(b.x for b in blocks), *(b.f for b in blocks))
    backward = None
    if all(b.backward_error is not None for b in blocks):
        # Nothing follows the last addition: what arrives at its branch's result is dx_L.
        dtotal = sum((p.through.double() for p in probes), last.arriving.double())
        backward = relative(first.x.grad - dtotal, first.x.grad)
        norms = [norm(p.through) for p in probes]
        allowed = max(allowed, tolerance(first.x.grad, 1 + len(blocks), *norms))
    names = tuple(b.name for b in blocks)
    return Run(names, relative(last.y - total, last.y), backward, allowed)
