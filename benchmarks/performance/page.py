"""Results -> tables: in the terminal, and between the marks of the pages that quote them. Nothing is copied by hand."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.marked import put
from benchmarks.performance.measure import Row

__all__ = ["Record", "read_records", "regions", "shown", "terminal_table", "write_pages", "write_record"]

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
GPU_TARGETS = ("on a GPU: guarded AdamW over bare at most 1.10, and the host never waits for a step", "", "")
PARTS = {
    "guard": "guard",
    "rules": "rules",
    "recovery": "recovery",
    "updates": "updates",
    "proximal": "proximal",
    "noise": "noise",
    "accumulation": "accumulation",
    "memory": "memory",
    "bytes": "bytes",
    "traps": "traps",
    "training": "training",
    "pytorch": "PyTorch",
    "import": "import",
    "gpu": "GPU",
}
QUOTED = {  # which other page quotes which part
    "docs/accumulation/index.md": "accumulation",
    "docs/transforms/noise.md": "noise",
    "docs/recovery/index.md": "recovery",
    "docs/rules/which_rule.md": "guard",
    "docs/transforms/update_bounds.md": "updates",
}
README = (  # the rows that the README shows: how they begin
    "guarded AdamW (clip, skip, recorder)",
    "`optax.apply_if_finite(chain(clip, adamw))` over guarded",
    "each further rule",
    "guarded through `update`",
    "`optax.MultiSteps(chain(clip, adamw), 4)` over `acc",
    "`accumulate(guard(adamw, clip), 4)`",
    "the same with `on_nonfinite",
    "peak memory of a guarded step beyond bare",
    "temporaries of `accumulate`",
    "`chain(noise_injection, adam)` over `chain(",
    "`limit_step(1e-3)`",
    "compiling, 1000 leaves",
    "`import optax_guard`",
    "a training step",
)


class Record(NamedTuple):
    """A results file."""

    name: str  # of the file, without its ending
    setting: dict[str, Any]
    rows: list[Row]

    @property
    def title(self) -> str:
        """The head of its column."""
        platform, version = self.name.removeprefix("performance-").split("-jax")
        device = platform.upper() if platform == "cpu" else self.setting["device"].removeprefix("NVIDIA ")
        return f"{device}, JAX {version}"


def read_records(folder: Path = RESULTS) -> list[Record]:
    """All of them, in the order of their names: a CPU first."""
    records = []
    for path in sorted(folder.glob("performance-*.json")):
        content = json.loads(path.read_text())
        rows = [Row(**{k: v for k, v in row.items() if k != "met"}) for row in content["rows"]]
        records.append(Record(path.stem, content["setting"], rows))
    return records


def write_record(record: Record) -> Path:
    """As JSON, one row per line."""
    RESULTS.mkdir(exist_ok=True)
    rows = ",\n".join("  " + json.dumps({**row._asdict(), "met": row.met}) for row in record.rows)
    path = RESULTS / f"{record.name}.json"
    path.write_text(f'{{\n "setting": {json.dumps(record.setting)},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def shown(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.3f}"


def cell(row: Row) -> str:
    """The value with its spread, marked if it misses its target; one of another statistic (`older`) is left out."""
    unit = "" if row.unit in ("x", "") else f" {row.unit}"
    value = str(round(row.value)) if not row.unit else shown(row.value) + unit
    low, middle, high = (float(shown(x)) for x in (row.low, row.value, row.high))
    spread = f" ({shown(row.low)} to {shown(row.high)})" if row.low < row.high and low <= middle <= high else ""
    return value + spread + (", **missed**" if row.met is False else "")


def target_of(row: Row) -> str:
    """In words."""
    if row.target is None:
        return ""
    return f"{'at least' if row.at_least else 'at most'} {row.target:g}{'' if row.unit == 'x' else ' ' + row.unit}"


def plain(records: list[Record], rows: list[Row]) -> str:
    """A Markdown table: a line for each of `rows`, a column for each record."""
    targets = any(row.target is not None for row in rows)
    head = ["what", *(["target"] if targets else []), *(record.title for record in records)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    found = [{row.what: row for row in record.rows} for record in records]
    for row in rows:
        cells = [cell(each[row.what]) if row.what in each else "" for each in found]
        lines.append("| " + " | ".join([row.what, *([target_of(row)] if targets else []), *cells]) + " |")
    return "\n".join(lines)


def rows_of(records: list[Record], part: str) -> list[Row]:
    """The rows of a part in any record, without points of curves."""
    found = {row.what: row for record in reversed(records) for row in record.rows}
    return [row for row in found.values() if row.part == part and not row.series]


def curves(record: Record, part: str) -> str:
    """A Markdown table of the curves of a part: a line for each place, a column for each curve."""
    points = {(row.series, row.at): row for row in record.rows if row.part == part and row.series}
    names = list(dict.fromkeys(series for series, _ in points))
    places = sorted({at for _, at in points})
    lines = ["| " + " | ".join([part, *names]) + " |", "|---" * (len(names) + 1) + "|"]
    for at in places:
        where = f"{at / 1e6:.3g} M" if at >= 1e6 or part == "parameters" else f"{at:g}"
        lines.append(
            "| "
            + " | ".join([where, *(cell(points[name, at]) if (name, at) in points else "" for name in names)])
            + " |"
        )
    return "\n".join(lines)


def settings(records: list[Record]) -> str:
    """The setting of each record, one per line."""
    lines = []
    for record in records:
        s = record.setting
        lines.append(
            f"- {record.title}: {s['tree']}; {s['device']}; optax {s['optax']}, Python {s['python']}; "
            f"{s['rounds']} rounds (`benchmarks/results/{record.name}.json`)."
        )
    return "\n".join([*lines, *(["", older(records)] if older(records) else [])])


def older(records: list[Record]) -> str:
    """A sentence about the numbers that were measured as ratios of medians, if there are any.

    A record says so in its setting; a part shows it by a number that is not between its quartiles.
    """
    found = []
    for record in records:
        parts = dict.fromkeys(row.part for row in record.rows if not row.low <= row.value <= row.high)
        if record.setting.get("statistic") == "ratio of medians":
            found.append(f"all of {record.title}")
        elif parts:
            found.append(f"{', '.join(PARTS.get(part, part) for part in parts)} of {record.title}")
    return f"Measured before as ratios of two medians: {'; '.join(found)}." if found else ""


def targets(records: list[Record]) -> str:
    """All rows with a target; those of a GPU are marked as not measured where they are missing."""
    rows = [row for part in (*PARTS, "leaves") for row in rows_of(records, part) if row.target is not None]
    text = plain(records, rows)
    if not any(row.part == "gpu" for row in rows):
        text += f"\n| {GPU_TARGETS[0]} | |{' not measured |' * len(records)}"
    return text


def readme(records: list[Record]) -> str:
    """The README's rows, of a CPU and beside it of what else was measured."""
    rows = [row for start in README for row in records[0].rows if row.what.startswith(start) and not row.series]
    trees = "; ".join(f"{r.title}: {r.setting['tree']}, {r.setting['device']}" for r in records)
    note = (
        f"Each number is the median of the ratios of single rounds, in which both arms take turns (quartiles). {trees}."
    )
    note += f" {older(records)}" if older(records) else ""
    return f"{note}\n\n{plain(records, list(dict.fromkeys(r for r in rows if keeps(r))))}"


def keeps(row: Row) -> bool:
    """Whether the README shows the row: of training steps and compilation, only those that concern the guard."""
    if row.part in ("training", "leaves"):
        return "guarded over bare" in row.what
    return True


def regions(records: list[Record]) -> dict[str, dict[str, str]]:
    """Page -> name of the marks -> what stands between them."""
    page = {"settings": settings(records), "targets": targets(records)}
    page |= {part: plain(records, rows_of(records, part)) or "" for part in PARTS if rows_of(records, part)}
    page.setdefault("gpu", "Not measured yet.")
    page.setdefault("pytorch", "Not measured yet: PyTorch was not installed.")
    for part in ("leaves", "parameters"):
        tables = [plain(records, rows_of(records, part))]
        tables += [
            f"{record.title}:\n\n{curves(record, part)}"
            for record in records
            if any(row.part == part and row.series for row in record.rows)
        ]
        page[part] = "\n\n".join(tables)
    for kind in ("ratios", "growth"):
        page[f"{kind} picture"] = "\n".join(
            f"![{record.title}]({record.name}-{kind}.png)"
            for record in records
            if (PICTURES / f"{record.name}-{kind}.png").exists()
        )
    quoted = {name: {"costs": plain(records, rows_of(records, part))} for name, part in QUOTED.items()}
    return {"docs/benchmarks/performance.md": page, "README.md": {"costs": readme(records)}, **quoted}


def write_pages(records: list[Record]) -> None:
    """Writes every region of every page."""
    for name, parts in regions(records).items():
        for mark, content in parts.items():
            put(ROOT / name, mark, content)


def terminal_table(rows: list[Row]) -> str:
    """One row a line."""
    lines = []
    for row in rows:
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        unit = {"x": "", "": ""}.get(row.unit, row.unit)
        text = f"{shown(row.value):>7s} {unit:2s} [{shown(row.low)}, {shown(row.high)}]"
        lines.append(f"{row.what.replace('`', ''):88s} {text:27s} {target_of(row):15s} {verdict}".rstrip())
    return "\n".join(lines)
