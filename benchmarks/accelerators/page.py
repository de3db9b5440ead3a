"""Results -> tables: in the terminal and in the section of docs/benchmarks/performance.md."""

from pathlib import Path

from benchmarks.accelerators.bounds import BOUNDS, broken, said
from benchmarks.accelerators.measure import Measured, Record
from benchmarks.accelerators.pod import PODS, PodRecord, PodRow, missed
from benchmarks.accelerators.steps import BARE
from benchmarks.accelerators.training import TRAINED, TRAINING
from benchmarks.marked import put

__all__ = ["ROOT", "regions", "summary", "terminal_table", "write_page"]

ROOT = Path(__file__).parents[2]
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


IN_TRAINING = [step.name for step in TRAINING]
POD_HEAD = ("step", "all-reduces", "all-gathers", "others", "bytes sent", "temporaries", "conditionals", "compiling")


def cells(record: Record, row: Measured) -> list[str]:
    """One line of the table."""
    bare = record.rows.get(TRAINED if row.name in IN_TRAINING else BARE)
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


def markdown(record: Record, training: bool = False) -> str:
    """A line for each row: those of steps alone, or those of training."""
    rows = [row for row in record.rows.values() if (row.name in IN_TRAINING) == training]
    return table([_without_main(record, line) for line in (list(HEAD), *(cells(record, row) for row in rows))])


def pod_table(record: PodRecord) -> str:
    """A line for each step over many chips."""
    return table([list(POD_HEAD), *(pod_cells(row, record.rows) for row in record.rows.values())])


def pod_cells(row: PodRow, rows: dict[str, PodRow]) -> list[str]:
    """One line of it."""
    over = missed(row, rows)

    def told(name: str, value: str) -> str:
        return f"{value}, **missed**" if name in over else value

    return [
        row.name,
        told("all_reduces", str(row.all_reduces)),
        told("all_gathers", str(row.all_gathers)),
        str(row.others),
        str(row.sent),
        told("temporaries", f"{row.temporaries:.2f}"),
        str(row.conditionals),
        told("seconds", f"{row.seconds:.0f} s" + (f", {row.seconds / rows[BARE].seconds:.2f}" if BARE in rows else "")),
    ]


def table(lines: list[list[str]]) -> str:
    """In Markdown; the first line is the head."""
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


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


def regions(records: list[Record], pods: list[PodRecord]) -> dict[str, dict[str, str]]:
    """Page -> name of the marks -> what stands between them."""
    steps, training = [], []
    for record in records:
        setting = record.setting
        steps.append(
            f"**{record.title}**: {setting['tree']}; JAX {setting['jax']}, optax {setting['optax']} "
            f"(`benchmarks/results/{record.name}.json`). {summary(record)}\n\n{markdown(record)}"
        )
        if any(name in record.rows for name in IN_TRAINING):
            training.append(f"**{record.title}**\n\n{markdown(record, training=True)}")
    picture = "![Bytes on a TPU and a GPU](accelerators.png)"
    many = [f"**{PODS[record.pod].title}**\n\n{pod_table(record)}" for record in pods]
    here = {
        "accelerators": "\n\n".join([*steps, picture]) if steps else "Not compiled yet.",
        "accelerators training": "\n\n".join(training) or "Not compiled yet.",
    }
    pod = {"accelerators pod": "\n\n".join(many) or "Not compiled yet."}
    return {"docs/benchmarks/performance.md": here | pod, "docs/guard/many_devices.md": pod}


def write_page(records: list[Record], pods: list[PodRecord]) -> None:
    """Writes the sections."""
    for name, parts in regions(records, pods).items():
        for mark, content in parts.items():
            put(ROOT / name, mark, content)
