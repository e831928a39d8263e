"""The demo's two charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: it draws with Agg and needs no display

PLAIN, FUSED = "#8a8f98", "#d1495b"


def loss_curves(path: Path, plain: Sequence[float], fused: Sequence[float]) -> None:
    """Both training losses over the steps, and below them their difference."""
    steps = range(1, len(plain) + 1)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    above.semilogy(steps, plain, color=PLAIN, linewidth=3, label="plain PyTorch blocks")
    above.semilogy(steps, fused, color=FUSED, linewidth=1.2, label="fusedres blocks")
    above.set_ylabel("training loss")
    above.set_title("The same training, twice: scikit-learn's handwritten digits")
    above.legend(frameon=False)
    difference = [abs(a - b) for a, b in zip(plain, fused, strict=True)]
    below.semilogy(steps, difference, color="#33658a", linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel("training step")
    _tidy(above, below)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Bars:
    """One pair of bars: what was measured, its unit, and the two figures (lower is better)."""

    title: str
    unit: str
    plain: float
    fused: float


def speed_chart(path: Path, pairs: Sequence[Bars], subtitle: str) -> None:
    """One panel for each pair of figures, with the ratio in its title."""
    figure = Figure(figsize=(3.1 * len(pairs), 4), layout="constrained")
    for axes, bars in zip(figure.subplots(1, len(pairs)), pairs, strict=True):
        values = (bars.plain, bars.fused)
        drawn = axes.bar(("plain", "fusedres"), values, color=(PLAIN, FUSED), width=0.6)
        axes.bar_label(drawn, labels=[f"{v:,.3g}" for v in values], padding=2)
        less = bars.plain / bars.fused
        ratio = f"{less:.2f}x less" if less >= 1 else f"{1 / less:.2f}x more"
        axes.set_title(f"{bars.title}\n{ratio}")
        axes.set_ylabel(bars.unit)
        axes.margins(y=0.15)
        _tidy(axes)
    figure.suptitle(subtitle, fontsize="medium")
    figure.savefig(path, dpi=150)


def _tidy(*many) -> None:
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)
