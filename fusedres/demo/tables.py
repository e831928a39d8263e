"""The demo's tables and its verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..report import Explanation
from .measure import FIRST_STEPS, FirstSteps
from .plots import Bars


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def training(
    accuracies: Sequence[float], losses: Sequence[Sequence[float]], weight_difference: float
) -> Table:
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    table = _table("Training", "plain", "fusedres", "largest difference")
    table.add_row("test accuracy", *(f"{a:.2%}" for a in accuracies), "")
    table.add_row("loss (last step)", *(f"{run[-1]:.4f}" for run in losses), f"{apart:.1e}")
    table.add_row("weights", "", "", f"{weight_difference:.1e}")
    return table


def exactness(first: FirstSteps, inference) -> Table:
    """How far each execution is from plain PyTorch in float64."""
    columns = "plain fp32", "fusedres fp32", "fusedres fp64", "allowed"
    table = _table("Largest distance from plain PyTorch in float64", *columns)
    for what in ("loss", "weight"):
        runs = first.plain32, first.fused32, first.fused64, first.allowed64
        row = (f"{getattr(run, what):.1e}" for run in runs)
        table.add_row(f"{what}, {FIRST_STEPS} steps", *row)
    errors = f"{inference.plain_error:.1e}", f"{inference.fused_error:.1e}"
    table.add_row("logits, inference", *errors, "", f"{inference.allowed:.1e}")
    return table


def cost(figures: Sequence[Bars]) -> Table:
    table = _table("Cost", "plain", "fusedres", "ratio")
    for bars in figures:
        values = (f"{v:,.0f}" if bars.unit == "calls" else f"{v:,.2f}" for v in _values(bars))
        table.add_row(f"{bars.title}, {bars.unit}", *values, f"{bars.plain / bars.fused:.2f}x")
    return table


def _values(bars: Bars) -> tuple[float, float]:
    return bars.plain, bars.fused


def explanation(explained: Explanation) -> str:
    moved, eager = (f"{n / 2**20:.0f}" for n in (explained.bytes_moved, explained.eager_bytes))
    return (
        f"fusedres.explain, forward in training: {explained.launches} calls move {moved} MiB, "
        f"eager moves {eager} MiB; {explained.fused:.0%} of eager's traffic runs fused"
    )


def verdict(
    console: Console, accuracies: Sequence[float], least: float, first: FirstSteps, inference
) -> int:
    """Print each check with its outcome; the exit code."""
    checks = {
        f"both test accuracies are at least {least:.0%}": min(accuracies) >= least,
        "in float64 the fused training follows PyTorch's as far as rounding allows": first.ok,
        "inference is as exact as PyTorch's": inference.fused_error <= inference.allowed,
    }
    for what, ok in checks.items():
        console.print(f"[{'green' if ok else 'red'}]{'PASS' if ok else 'FAIL'}[/] {what}")
    return 0 if all(checks.values()) else 1
