"""Results -> tables: in the terminal and in the section of docs/benchmarks/performance.md."""

from pathlib import Path

from benchmarks.accelerators.bounds import BOUNDS, broken, said
from benchmarks.accelerators.measure import Measured, Record
from benchmarks.accelerators.steps import BARE
from benchmarks.marked import put

__all__ = ["PAGE", "regions", "summary", "terminal_table", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "performance.md"
HEAD = (
    "step",
    "bytes",
    "of bare",
    "main memory",
    "of bare",
    "other branches",
    "temporaries",
    "kernels",
    "conditionals",
    "copies",
    "bound",
)


def cells(record: Record, row: Measured) -> list[str]:
    """One line of the table."""
    bare = record.rows.get(BARE)
    bound = BOUNDS[record.chip].get(row.name)
    misses = broken(row, bound, record.rows) if bound else []

    def of_bare(value: float, unit: float) -> str:
        return f"{value / unit:.2f}"

    return [
        row.name,
        f"{row.bytes:.2f}" + ("" if not row.unclear else f" (of {row.unclear} conditionals the dearer branch)"),
        of_bare(row.bytes, bare.bytes) if bare else "",
        f"{row.main:.2f}",
        of_bare(row.main, bare.main) if bare else "",
        f"{row.otherwise:.2f}" if row.conditionals else "",
        f"{row.temporaries:.3f}",
        str(row.kernels),
        str(row.conditionals),
        str(row.copies),
        "" if bound is None else said(bound) + (f"; **misses: {', '.join(misses)}**" if misses else ""),
    ]


def _without_main(record: Record, line: list[str]) -> list[str]:
    """A GPU's program knows one memory only."""
    return line if record.chip == "tpu" else line[:3] + line[5:]


def markdown(record: Record) -> str:
    """A line for each row."""
    table = [
        _without_main(record, list(HEAD)),
        *(_without_main(record, cells(record, row)) for row in record.rows.values()),
    ]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def summary(record: Record) -> str:
    """How many bounds hold, and which do not."""
    bounds = {name: bound for name, bound in BOUNDS[record.chip].items() if name in record.rows}
    missed = [name for name, bound in bounds.items() if broken(record.rows[name], bound, record.rows)]
    return f"{len(bounds) - len(missed)} of {len(bounds)} bounds hold."


def terminal_table(record: Record) -> str:
    """The same, aligned."""
    table = [
        _without_main(record, list(HEAD)),
        *(_without_main(record, cells(record, row)) for row in record.rows.values()),
    ]
    table = [[cell.replace("`", "").replace("**", "") for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([f"{record.title}, {record.setting['tree']}", "", *lines, "", summary(record)])


def regions(records: list[Record]) -> dict[str, str]:
    """Name of the marks -> what stands between them."""
    parts = []
    for record in records:
        setting = record.setting
        parts.append(
            f"**{record.title}**: {setting['tree']}; JAX {setting['jax']}, optax {setting['optax']} "
            f"(`benchmarks/results/{record.name}.json`). {summary(record)}\n\n{markdown(record)}"
        )
    picture = "![Bytes on a TPU and a GPU](accelerators.png)"
    return {"accelerators": "\n\n".join([*parts, picture]) if parts else "Not compiled yet."}


def write_page(records: list[Record]) -> None:
    """Writes the section."""
    for name, content in regions(records).items():
        put(PAGE, name, content)
