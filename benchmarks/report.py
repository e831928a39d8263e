"""``python -m benchmarks.report``: one self-contained HTML page, and the charts as PNG.

    python -m benchmarks.report                                   all of benchmarks/results/
    python -m benchmarks.report build/benchmarks.json             other files
    python -m benchmarks.report --publish benchmarks/results      README.md and charts/ there

The newest result is the one shown; older ones of the same machine make the history.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

from . import charts, markdown, page, results, roofline, show
from .networks import network
from .peers import OURS
from .roofline import Hardware

DPI = 110
CHARTS = "charts"


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        runs = _runs(args.files)
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return 2
    latest = runs[-1]
    figures = {name: draw(latest) for name, draw in charts.CHARTS.items()}
    figures["history"] = charts.history([run for run in runs if _same_machine(run, latest)])
    images = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    if args.publish is not None:
        _publish(args.publish, latest, images)
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(html(latest, images))
    print(f"written to {args.html}" + (f" and {args.publish}/" if args.publish else ""))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Results as a page and charts."
    )
    parser.add_argument("files", nargs="*", type=Path, help="results (all of benchmarks/results/)")
    parser.add_argument("--html", type=Path, default=Path("build/benchmarks.html"))
    parser.add_argument("--publish", type=Path, help="folder for README.md and charts/ (none)")
    return parser.parse_args(argv)


def _runs(files: Iterable[Path]) -> list[dict]:
    """The oldest first."""
    runs = [results.load(path) for path in files] or list(results.load_folder().values())
    if not runs:
        raise results.ResultError(f"{results.FOLDER}: holds no result")
    return sorted(runs, key=lambda run: run["date"])


def _same_machine(a: dict, b: dict) -> bool:
    def identity(run: dict) -> tuple:
        gpu = run["gpu"] and run["gpu"]["name"]
        return run["machine"]["cpu"], run["machine"]["isa"], run["machine"]["threads"], gpu

    return identity(a) == identity(b)


def _publish(folder: Path, found: dict, images: dict[str, bytes]) -> None:
    (folder / CHARTS).mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / CHARTS / f"{name}.png").write_bytes(data)
    (folder / "README.md").write_text(markdown.page(found, images, CHARTS))


def _png(figure) -> bytes:
    data = io.BytesIO()
    # The same figure gives the same bytes: no version and no date inside.
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def html(found: dict, images: dict[str, bytes]) -> str:
    commit = (found["commit"] or "unknown")[:12] + (", modified" if found["modified"] else "")
    sections = [
        f"<p>{escape(show.headline(found))}</p>",
        f"<p>Commit {escape(commit)}, {escape(found['date'])}, selection"
        f" {escape(str(found['settings'].get('suite', '?')))}. Ratio: the peer's time over ours,"
        " of the medians; a tie differs between its two halves by more than it claims.</p>",
    ]
    for name, data in images.items():
        source = base64.b64encode(data).decode()
        title = name.replace("_", " ")
        sections.append(
            f'<figure id="{name}"><img alt="{title}" src="data:image/png;base64,{source}"></figure>'
        )
    sections += [
        _table("Goals", markdown.GOALS, markdown.goals(found)),
        _table("Figures", _COLUMNS, _figures(found)),
        _table(
            "What the passes allow on this machine: floors in ms, CPU",
            ("network", *dict.fromkeys((*roofline.INFERENCE, *roofline.TRAINING))),
            _floors(found),
        ),
        _table("Not timed", ("peer", "reason", "work"), markdown.absent(found)),
    ]
    return page.TEMPLATE.replace("{{body}}", "\n".join(sections))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<section><h2>{escape(title)}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></section>"
    )


_COLUMNS = (
    "work", "who", "rounds", "median ms", "q1", "q3", "ratio", "tie", "GB/s", "% of copy",
    "% of floor", "calls", "peak MiB", "kept MiB", "note",
)  # fmt: skip


def _figures(found: dict) -> Iterable[tuple[str, ...]]:
    for row in charts.measured(found):
        for name, f in row["competitors"].items():
            times = (f"{1e3 * f[key]:.3f}" for key in ("median", "q1", "q3"))
            ours = name == OURS
            sizes = (None if f[k] is None else f[k] / charts.MIB for k in ("peak", "saved"))
            yield (
                row["id"], name, str(f["rounds"]), *times,
                "" if ours else f"{f['ratio']:.2f}", "tie" if not ours and f["tie"] else "",
                *(_number(f[k]) for k in ("gigabytes_per_second", "percent_of_copy")),
                _number(f["percent_of_floor"]), "" if f["launches"] is None else str(f["launches"]),
                *map(_number, sizes), f["note"] or "",
            )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _floors(found: dict) -> Iterable[tuple[str, ...]]:
    """Batch 8 in float32, at the copy bandwidth and matmul rate that the run measured."""
    rates = found["machine"]["measured"]["cpu"]
    hardware = Hardware(rates["copy_bandwidth"], rates["matmul"]["float32"])
    structures = tuple(dict.fromkeys((*roofline.INFERENCE, *roofline.TRAINING)))
    for name in ("resnet18", "resnet50", "se_resnet50"):
        for train in (False, True):
            cells = dict.fromkeys(structures, "")
            for s in roofline.TRAINING if train else roofline.INFERENCE:
                least = roofline.floor(network(name), s, train, 8, torch.float32, hardware)
                cells[s] = f"{1e3 * least.seconds:.0f}"
            mode = "training" if train else "inference"
            yield f"{name} {mode}, batch 8, fp32", *cells.values()


if __name__ == "__main__":
    raise SystemExit(main())
