"""Shared by the reports: tables in plain text, a progress bar, conversion to plain Python values."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["needed", "number", "plain", "progress_bar", "shown", "text_table", "two_digits"]


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table padded with spaces: the first column is left-aligned, the others are right-aligned."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    rule = ["-" * width for width in widths]
    cells = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def number(value: float | None, digits: int = 3) -> str:
    """A short form of a number; '-' for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def shown(name: str, width: int = 56) -> str:
    """A path shortened in the middle, so that it keeps the end, which distinguishes leaves."""
    return name if len(name) <= width else f"{name[: width // 4]}...{name[-(width - width // 4 - 3) :]}"


def plain(value: Any) -> Any:
    """Converts named tuples to dicts, arrays to lists and numbers to Python's own, as `json.dumps` needs them."""
    if hasattr(value, "_fields"):
        return {name: plain(field) for name, field in zip(value._fields, value, strict=True)}
    if isinstance(value, dict):
        return {name: plain(field) for name, field in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def needed(function: str, library: str) -> ImportError:
    """The error for an optional library that is not installed."""
    return ImportError(f"{function} needs {library}: pip install {library}")


@contextlib.contextmanager
def progress_bar(function: str, total: int, wanted: bool | None) -> Iterator[Callable[[str, int], None]]:
    """Yields `advance(what, steps)`. `wanted=None` shows a bar on a terminal if rich is installed."""
    if wanted is None and not sys.stderr.isatty():
        wanted = False
    rich_progress = None
    if wanted is not False:
        try:
            import rich.progress as rich_progress
        except ImportError as error:
            if wanted:
                raise needed(f"{function}: `progress=True`", "rich") from error
    if rich_progress is None:

        def ignore(what: str, steps: int) -> None:
            del what, steps

        yield ignore
        return
    from rich.console import Console

    columns = [
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
    ]
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(function, total=total)
        yield lambda what, steps: bar.update(task, description=f"{function}: {what}", advance=steps)


def two_digits(value: float) -> float:
    """Rounds to two significant digits."""
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.2g}")
