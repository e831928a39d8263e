"""Tables as text: drawn by rich where it is installed, aligned columns otherwise."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

# Wide enough that no cell is ever folded or cut in a file, a pipe or a notebook.
_NO_LIMIT = 10_000


def render(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str] = ()
) -> str:
    """Lines of text; the columns named in ``numeric`` are aligned to the right.

    On a terminal, rich folds long cells into its width; elsewhere every row is one line.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return _plain(columns, rows, numeric)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in numeric else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are not markup
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_LIMIT
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str]) -> str:
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])

    def text(cells: list[str]) -> str:
        aligned = (
            cell.rjust(width) if name in numeric else cell.ljust(width)
            for cell, width, name in zip(cells, widths, columns, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(text, lines))


def size(count: float) -> str:
    """A number of bytes for people: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
