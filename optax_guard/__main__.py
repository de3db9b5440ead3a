"""The command line: `python -m optax_guard report CHECKPOINT` and `python -m optax_guard log CHECKPOINT`."""

import argparse
import sys
from pathlib import Path

from optax_guard.report import load, report, story
from optax_guard.report._log import TrainingLog, leaf_label

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns 0 on success and 2 if its input is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m optax_guard",
        description="What happened in a guarded training run, from its checkpoint alone.",
        epilog="CHECKPOINT is an Orbax checkpoint (or the folder of a CheckpointManager, whose latest step is read), "
        "or a file written by optax_guard.report.save_log(path, state, params).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{report,log}")
    page = commands.add_parser("report", help="write a page (HTML) and a picture (PNG)")
    page.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    page.add_argument("-o", "--output", metavar="PAGE", type=Path, default=Path("report.html"),
                      help="where to write the page (default: report.html); the picture goes beside it")  # fmt: skip
    table = commands.add_parser("log", help="print the story and the last steps")
    table.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    table.add_argument(
        "-n", "--last", metavar="N", type=int, default=20, help="how many steps (default: 20; 0 for all)"
    )
    options = parser.parse_args(arguments)
    try:
        log = load(options.checkpoint)
        if options.command == "report":
            print(f"written to {report(log, path=options.output)} and {options.output.with_suffix('.png')}")
        else:
            _print_log(log, options.last)
    except (ValueError, ImportError, OSError) as error:
        print(f"optax_guard: {error}", file=sys.stderr)
        return 2
    return 0


def _print_log(log: TrainingLog, last: int) -> None:
    for sentence in story(log):
        print(sentence)
    rows = log.rows[-last:] if last > 0 else log.rows
    print()
    tagged = bool((rows["tag"] >= 0).any())
    batch = f"{'batch':>10} " if tagged else ""
    logit = "" if log.logits is None else f"{'max logit':>10} "
    heads = f"{'step':>8} {batch}{'verdict':16} {'loss':>10} {'norm':>10} {'let in':>10} {'scale':>8} {logit}"
    print(f"{heads} worst leaf")
    for row in rows:
        loss = f"{row['value']:10.4g}" if row["value_given"] else "not passed"
        batch = f"{row['tag'] if row['tag'] >= 0 else '-':>10} " if tagged else ""
        logit = "" if log.logits is None else f"{row['max_logit']:10.4g} "
        print(
            f"{row['step']:8d} {batch}{row['event']:16} {loss} {row['grad_norm']:10.4g} "
            f"{row['clipped_norm']:10.4g} {row['scale']:8.3g} {logit} {leaf_label(log.names, int(row['worst_leaf']))}"
        )


if __name__ == "__main__":
    sys.exit(main())
