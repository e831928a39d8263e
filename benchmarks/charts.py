"""The report's charts. Each takes results and returns a figure, or None where there is no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from matplotlib.figure import Figure  # without pyplot: it draws with Agg and needs no display
from matplotlib.lines import Line2D

from . import peers
from .peers import EAGER, OURS

COLOURS = {
    OURS: "#d1495b",
    EAGER: "#8a8f98",
    peers.EAGER_NCHW: "#c3c7cd",
    peers.COMPILE: "#33658a",
    peers.MAX_AUTOTUNE: "#6fa8d6",
    peers.FREEZING: "#2a9d8f",
    peers.OPENVINO: "#edae49",
    peers.ONNXRUNTIME: "#7b5ea7",
    peers.TENSORRT: "#76b900",
}
OTHER = "#4a4e57"
MIB = 2**20
WIDTH = 9


def measured(found: dict) -> list[dict]:
    return [row for row in found["rows"] if row["status"] == "measured"]


def networks(found: dict) -> list[dict]:
    return [row for row in measured(found) if "network" in row["facts"]]


def ops(found: dict) -> list[dict]:
    return [row for row in measured(found) if "op" in row["facts"]]


def label(row: dict) -> str:
    facts = row["facts"]
    if "network" in facts:
        text = f"{facts['network']} {facts['mode']}, batch {facts['batch']}, {facts['dtype']}"
    else:
        text = row["id"].replace("+", " + ")
    return text if row["device"] == "cpu" else f"{text}, {row['device']}"


def speed_up(found: dict) -> Figure | None:
    """How many times as long each peer takes as fusedres, by network; a tie is hatched."""
    rows = networks(found)
    names = _peers(rows)
    if not names:
        return None
    count = sum(len(_present(row, names)) + 1 for row in rows)
    figure, axes = _figure(0.23 * count + 1.2)
    y, ticks = 0.0, []
    for row in rows:
        bars = _present(row, names)
        ticks.append((y + (len(bars) - 1) / 2, label(row)))
        for name in bars:
            peer = row["competitors"][name]
            hatch = "////" if peer["tie"] else None
            axes.barh(
                y, peer["ratio"] - 1, left=1, height=0.85, color=COLOURS.get(name, OTHER),
                hatch=hatch, edgecolor="white", linewidth=0.4,
            )  # fmt: skip
            right = peer["ratio"] >= 1
            axes.annotate(
                f"{peer['ratio']:.2f}x", (peer["ratio"], y), xytext=(3 if right else -3, 0),
                textcoords="offset points", va="center", ha="left" if right else "right",
                fontsize=7,
            )  # fmt: skip
            y += 1
        y += 1
    peers_of = (row["competitors"][name] for row in rows for name in _present(row, names))
    _plain_ticks(axes, [peer["ratio"] for peer in peers_of])
    axes.axvline(1, color="black", linewidth=0.8)
    _names(axes, ticks)
    axes.set_xlabel("the peer's time over fusedres' (above 1 fusedres is faster; hatched: a tie)")
    axes.set_title("Speed-up over each peer", loc="left")
    _legend(axes, names)
    return figure


def against_floor(found: dict) -> Figure | None:
    """Each op's time, and the floor that the machine's rates set."""
    rows = [row for row in ops(found) if row["floor"] is not None]
    if not rows:
        return None
    figure, axes = _figure(0.26 * len(rows) + 1.4)
    names: list[str] = []
    for y, row in enumerate(rows):
        floor = 1e3 * row["floor"]["seconds"]
        axes.plot([floor] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        for name, figures in row["competitors"].items():
            names += [name] * (name not in names)
            times = [1e3 * figures[key] for key in ("q1", "median", "q3")]
            colour = COLOURS.get(name, OTHER)
            axes.plot(times[::2], [y, y], color=colour, linewidth=1)
            axes.plot(times[1], y, "o", color=colour, markersize=5 if name == OURS else 4)
    axes.set_xscale("log")
    _names(axes, [(y, label(row)) for y, row in enumerate(rows)])
    axes.set_xlabel("ms (median and quartiles); black: the floor")
    axes.set_title("Time of each op against its floor", loc="left")
    marks = [Line2D([], [], color=COLOURS.get(n, OTHER), marker="o", label=n) for n in names]
    axes.legend(handles=marks, frameon=False, fontsize=7)
    axes.grid(axis="x", linewidth=0.3)
    return figure


def memory(found: dict) -> Figure | None:
    """Bytes kept for the backward."""
    return _pairs(
        networks(found), "saved", 1 / MIB, "MiB", "Memory kept for the backward, by training step"
    )


def launches(found: dict) -> Figure | None:
    return _pairs(
        networks(found), "launches", 1, "operators on activations (kernels on a GPU)",
        "Launches of one call",
    )  # fmt: skip


def history(runs: Sequence[dict]) -> Figure | None:
    """The ratio to eager of each network over the runs of one machine."""
    lines: dict[str, list[tuple[datetime, float]]] = {}
    commits: dict[datetime, str] = {}
    for run in runs:
        when = datetime.fromisoformat(run["date"])
        commits[when] = (run["commit"] or "?")[:7]
        for row in networks(run):
            eager = row["competitors"].get(EAGER)
            if eager is not None:
                lines.setdefault(label(row), []).append((when, eager["ratio"]))
    if not lines:
        return None
    figure, axes = _figure(4.2)
    order = sorted(commits)
    for name, points in lines.items():
        xs = [order.index(when) for when, _ in points]
        axes.plot(xs, [value for _, value in points], marker="o", markersize=3, label=name)
    axes.set_xticks(range(len(order)), [f"{commits[w]}\n{w:%Y-%m-%d}" for w in order], fontsize=7)
    ratios = [value for points in lines.values() for _, value in points]
    _plain_ticks(axes, ratios, "y")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("eager's time over fusedres'")
    axes.set_title("History: the ratio to eager channels_last, by commit", loc="left")
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


CHARTS: dict[str, Callable[[dict], Figure | None]] = {
    "speed_up": speed_up,
    "against_floor": against_floor,
    "memory": memory,
    "launches": launches,
}


def _pairs(rows: list[dict], key: str, scale: float, unit: str, title: str) -> Figure | None:
    """One bar for each competitor that has the figure, by row."""
    bars = [
        (row, [(n, f[key] * scale) for n, f in row["competitors"].items() if f[key] is not None])
        for row in rows
    ]
    bars = [(row, found) for row, found in bars if len(found) > 1]
    if not bars:
        return None
    figure, axes = _figure(0.23 * sum(len(found) + 1 for _, found in bars) + 1.2)
    y, ticks, names = 0.0, [], []
    for row, found in bars:
        ticks.append((y + (len(found) - 1) / 2, label(row)))
        for name, value in found:
            names += [name] * (name not in names)
            drawn = axes.barh(y, value, height=0.85, color=COLOURS.get(name, OTHER))
            axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=7)
            y += 1
        y += 1
    axes.margins(x=0.1)
    _names(axes, ticks)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    _legend(axes, names)
    return figure


def _figure(height: float):
    figure = Figure(figsize=(WIDTH, min(height, 24)), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _peers(rows: list[dict]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["competitors"] if name != OURS)
    return list(found)


def _present(row: dict, names: list[str]) -> list[str]:
    return [name for name in names if name in row["competitors"]]


def _names(axes, ticks: list[tuple[float, str]]) -> None:
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()


def _plain_ticks(axes, ratios: list[float], which: str = "x") -> None:
    """A logarithmic axis of ratios with ticks that read as such."""
    low, high = min(*ratios, 0.8), max(*ratios, 1.2)
    label = (high / low) ** 0.09  # a share of the axis, for the labels at its ends
    low, high = low / max(1.15, label), high * max(1.25, label)
    steps = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)
    if high / low < 3:
        steps = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2)
    shown = [s for s in steps if low <= s <= high]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(shown, [f"{s:g}x" for s in shown], fontsize=8)
    axis.set_ticks([], minor=True)


def _legend(axes, names: list[str]) -> None:
    marks = [Line2D([], [], color=COLOURS.get(n, OTHER), linewidth=6, label=n) for n in names]
    axes.legend(handles=marks, frameon=False, fontsize=7, loc="best")
