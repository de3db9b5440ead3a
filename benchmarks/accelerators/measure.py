"""A step -> what its compiled program moves, and the record of all of them."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.accelerators.chips import CHIPS, Program, compiled
from benchmarks.accelerators.hlo import count, parsed
from benchmarks.accelerators.ordinary import Taken, chooser, taken
from benchmarks.accelerators.steps import Step, parameters, step_arguments

__all__ = ["RESULTS", "Measured", "Record", "counted", "measured", "new_record", "read_records", "write_record"]

RESULTS = Path(__file__).parents[1] / "results"


class Measured(NamedTuple):
    """One row. Bytes are over those of the parameters."""

    name: str
    bytes: float  # read and written by an ordinary step
    main: float  # those of them in the main memory
    otherwise: float  # `bytes` where every conditional takes its other branch
    temporaries: float
    kernels: int
    conditionals: int  # in the program
    copies: int
    unclear: int  # conditionals whose branch the ordinary step does not tell: the one that moves most is counted
    seconds: float  # to trace and compile


class Record(NamedTuple):
    """All rows of a chip."""

    chip: str
    setting: dict[str, Any]
    rows: dict[str, Measured]

    @property
    def title(self) -> str:
        """What it was compiled for."""
        return CHIPS[self.chip].title

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        return f"accelerators-{self.chip}"


def measured(step: Step, width: int, chip: Any) -> Measured:
    """Compiles the step for the chip and counts."""
    params = parameters(width)
    start = time.perf_counter()
    program = compiled(step.take(step.tx()), step_arguments(step, params), chip)
    seconds = time.perf_counter() - start
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return counted(step.name, program, taken(step, chip.platform), size, seconds)


def counted(name: str, program: Program, ways: Taken, size: int, seconds: float) -> Measured:
    """What an ordinary run of the program moves, over `size`."""
    hlo = parsed(program.text)
    choose, unknown = chooser(program.text, ways)
    ordinary = count(hlo, choose)
    unclear = [each for each in ordinary.conditionals if each.instruction.name in unknown]
    other = count(hlo, chooser(program.text, ways, otherwise=True)[0])
    conditionals = sum(each.operation == "conditional" for body in hlo.computations.values() for each in body.values())
    return Measured(
        name,
        bytes=round(ordinary.bytes / size, 4),
        main=round(ordinary.main / size, 4),
        otherwise=round(other.bytes / size, 4),
        temporaries=round(program.temporaries / size, 4),
        kernels=ordinary.kernels,
        conditionals=conditionals,
        copies=ordinary.copies,
        unclear=len(unclear),
        seconds=round(seconds, 1),
    )


def new_record(chip: str, width: int) -> Record:
    """Without rows."""
    leaves = jax.tree.leaves(parameters(width))
    millions = sum(x.size for x in leaves) / 1e6
    setting = {
        "tree": f"{millions:.1f} M float32 parameters in {len(leaves)} leaves",
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    return Record(chip, setting, {})


def write_record(record: Record, folder: Path = RESULTS) -> Path:
    """As JSON, one row a line."""
    rows = ",\n".join("  " + json.dumps(row._asdict()) for row in record.rows.values())
    path = folder / f"{record.name}.json"
    path.write_text(f'{{\n "setting": {json.dumps(record.setting)},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def read_records(folder: Path = RESULTS) -> list[Record]:
    """Those of the chips that have been compiled for."""
    records = []
    for chip in CHIPS:
        path = folder / f"accelerators-{chip}.json"
        if path.exists():
            content = json.loads(path.read_text())
            rows = [Measured(**row) for row in content["rows"]]
            records.append(Record(chip, content["setting"], {row.name: row for row in rows}))
    return records
