"""From compilation to page. `make accelerators` runs it in an environment that has the compilers.

    python -m benchmarks.accelerators                  # both chips; --tpu or --gpu: one of them
    python -m benchmarks.accelerators --tpu --only muon accumulate     # rows whose name holds a word; others are kept
    python -m benchmarks.accelerators --tpu --width 2048    # layers of another width; prints, and writes nothing
    python -m benchmarks.accelerators --parts pod         # of steps, training, pod: some; all without it
    python -m benchmarks.accelerators --tpu --check  # bounds of single steps; ends with 1 if one is broken
    python -m benchmarks.accelerators --write-pages    # compiles nothing: results -> page and picture

Run it from the root of the repository. It writes `benchmarks/results/accelerators-*.json`, the section of
`docs/benchmarks/performance.md` and its picture.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on an accelerator, even where there is one

from benchmarks.accelerators.bounds import BOUNDS, worse
from benchmarks.accelerators.chips import CHIPS, chip_of
from benchmarks.accelerators.measure import Record, measured, new_record, read_records, write_record
from benchmarks.accelerators.page import terminal_table, write_page
from benchmarks.accelerators.pictures import draw
from benchmarks.accelerators.pod import POD_STEPS, PODS, PodRecord, pod_parameters, pod_row, read_pods, write_pod
from benchmarks.accelerators.steps import STEPS
from benchmarks.accelerators.training import TRAINING, training_row

WIDTH = 1024  # of the layers: 25 M parameters


PARTS = ("steps", "training", "pod")
ONE_CHIP = {"steps": STEPS, "training": TRAINING}
SLOW = "muon"  # takes a minute to compile: `--check` leaves it out


def compile_rows(key: str, parts: list[str], only: list[str], width: int) -> Record:
    """Compiles the rows whose name holds one of the words, all without words; the results keep the others."""
    chip = chip_of(key)
    record = new_record(key, width)
    old = {each.chip: each.rows for each in read_records()}.get(key, {}) if width == WIDTH else {}
    chosen = [(step, part) for part, all_of in ONE_CHIP.items() if part in parts for step in all_of]
    chosen = [(step, part) for step, part in chosen if not only or any(word in step.name for word in only)]
    for number, (step, part) in enumerate(chosen, 1):
        row = measured(step, width, chip) if part == "steps" else training_row(step, chip)
        record.rows[step.name] = row
        say(f"[{number}/{len(chosen)}] {record.title}: {step.name}, {row.seconds} s")
    rows = old | record.rows
    names = [step.name for all_of in ONE_CHIP.values() for step in all_of]
    return record._replace(rows={name: rows[name] for name in names if name in rows})


def compile_pod(key: str, only: list[str]) -> None:
    """The same over many chips, each row written as it is known: a compilation takes minutes."""
    pod = PODS[key]
    for number, step in enumerate(POD_STEPS, 1):
        if only and not any(word in step.name for word in only):
            continue
        row = pod_row(step, pod, pod_parameters())
        say(f"[{number}/{len(POD_STEPS)}] {pod.title}: {step.name}, {row.seconds} s")
        old = next((each.rows for each in read_pods() if each.pod == key), {})
        rows = old | {step.name: row}
        write_pod(PodRecord(key, {each.name: rows[each.name] for each in POD_STEPS if each.name in rows}))


def check(key: str) -> list[str]:
    """Compiles each row with a bound, and what bounds refer to; what is broken, in words."""
    recorded = next(each.rows for each in read_records() if each.chip == key)
    bounds = {name: bound for name, bound in BOUNDS[key].items() if SLOW not in name}
    needed = set(bounds) | {bound.of for bound in bounds.values()}
    chip = chip_of(key)
    rows = {step.name: measured(step, WIDTH, chip) for step in STEPS if step.name in needed}
    return [text for name, bound in bounds.items() for text in worse(rows[name], bound, rows, recorded)]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, counts, prints, writes."""
    parser = argparse.ArgumentParser(description="What a step costs on a TPU and a GPU, by their own compilers.")
    for key, chip in CHIPS.items():
        parser.add_argument(f"--{key}", action="append_const", const=key, dest="chips", help=f"{chip.title} alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of them (default: all)")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--check", action="store_true", help="single steps with a bound; ends with 1 if one is broken")
    parser.add_argument("--write-pages", action="store_true", help="compiles nothing: writes page and picture")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of the layers (default: {WIDTH}); others print only")
    options = parser.parse_args(arguments)
    chips = options.chips or CHIPS
    if options.check:
        found = [text for key in chips for text in check(key)]
        print("\n".join(found) or "Every bound holds, or is missed by no more than the results say.")
        sys.exit(bool(found))
    if not options.write_pages:
        for key in chips:
            if set(options.parts) != {"pod"}:
                record = compile_rows(key, options.parts, options.only, options.width)
                if options.width == WIDTH:
                    write_record(record)
                print(terminal_table(record), flush=True)
            if "pod" in options.parts and options.width == WIDTH:
                compile_pod(key, options.only)
    if options.width == WIDTH:
        write_page(read_records(), read_pods())
        draw(read_records())


if __name__ == "__main__":
    main()
