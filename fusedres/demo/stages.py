"""How far the demo is."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """A bar a stage; where the output is no terminal, a line as each begins."""

    def __init__(self, console: Console):
        self._console = console
        columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn()
        self._bars = Progress(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bars.stop()

    def begin(self, name: str, steps: int) -> Callable[..., None]:
        """A function to call after each step, with a note if there is one."""
        if not self._console.is_terminal:
            self._console.print(f"{name}: {steps} steps", markup=False, highlight=False)
        task = self._bars.add_task(name, total=steps, note="")
        return lambda note="": self._bars.update(task, advance=1, note=note)
