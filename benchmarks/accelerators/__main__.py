"""From compilation to page. `make accelerators` runs it in an environment that has the compilers.

    python -m benchmarks.accelerators                  # both chips; --tpu or --gpu: one of them
    python -m benchmarks.accelerators --tpu --only muon accumulate     # rows whose name holds a word; others are kept
    python -m benchmarks.accelerators --tpu --width 2048    # layers of another width; prints, and writes nothing
    python -m benchmarks.accelerators --write-pages    # compiles nothing: results -> page and picture

Run it from the root of the repository. It writes `benchmarks/results/accelerators-*.json`, the section of
`docs/benchmarks/performance.md` and its picture.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on an accelerator, even where there is one

from benchmarks.accelerators.chips import CHIPS, chip_of
from benchmarks.accelerators.measure import Record, measured, new_record, read_records, write_record
from benchmarks.accelerators.page import terminal_table, write_page
from benchmarks.accelerators.pictures import draw
from benchmarks.accelerators.steps import STEPS

WIDTH = 1024  # of the layers: 25 M parameters


def compile_rows(key: str, only: list[str], width: int) -> Record:
    """Compiles the rows whose name holds one of the words, all without words; the results keep the others."""
    chip = chip_of(key)
    record = new_record(key, width)
    old = {each.chip: each.rows for each in read_records()}.get(key, {})
    chosen = [step for step in STEPS if not only or any(word in step.name for word in only)]
    for number, step in enumerate(chosen, 1):
        row = measured(step, width, chip)
        record.rows[step.name] = row
        print(f"[{number}/{len(chosen)}] {record.title}: {step.name}, {row.seconds} s", file=sys.stderr, flush=True)
    names = [step.name for step in STEPS]
    rows = (old if only and width == WIDTH else {}) | record.rows
    return record._replace(rows={name: rows[name] for name in names if name in rows})


def main(arguments: list[str] | None = None) -> None:
    """Compiles, counts, prints, writes."""
    parser = argparse.ArgumentParser(description="What a step costs on a TPU and a GPU, by their own compilers.")
    for key, chip in CHIPS.items():
        parser.add_argument(f"--{key}", action="append_const", const=key, dest="chips", help=f"{chip.title} alone")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--write-pages", action="store_true", help="compiles nothing: writes page and picture")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of the layers (default: {WIDTH}); others print only")
    options = parser.parse_args(arguments)
    if not options.write_pages:
        for key in options.chips or CHIPS:
            record = compile_rows(key, options.only, options.width)
            if options.width == WIDTH:
                write_record(record)
            print(terminal_table(record), flush=True)
    if options.width == WIDTH:
        records = read_records()
        write_page(records)
        draw(records)


if __name__ == "__main__":
    main()
