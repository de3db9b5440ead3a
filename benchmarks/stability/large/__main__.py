"""Runs the two large tasks and the study of neutrality of StabilityBench, and writes docs/benchmarks/large.md.

    python -m benchmarks.stability.large                            # everything: hours on two cores, minutes on a GPU
    python -m benchmarks.stability.large --only characters,cartpole --seconds 240 --workers 4
    python -m benchmarks.stability.large --list                     # the jobs, and which are done
    python -m benchmarks.stability.large --quick                    # one seed, few steps; writes nothing
    python -m benchmarks.stability.large --page                     # the page again, from the results

A job that is done is not run again. When `--seconds` are over, what is running is written to
benchmarks/results/large-unfinished/, and the next call goes on from there, on any device. Results go to
benchmarks/results/large-<platform>.json after every job.
"""

import argparse
import sys

from benchmarks.stability.large.page import write_page
from benchmarks.stability.large.studies import Size, all_jobs
from benchmarks.stability.large.workers import read, read_apart, run_jobs


def main(arguments: list[str] | None = None) -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability.large", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", help="comma-separated beginnings of job names: characters, neutral:, 'cartpole none'")
    parser.add_argument("--without", help="comma-separated beginnings of job names to leave out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so many, and go on later")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument("--seeds", type=int, help="fewer seeds than the study has")
    parser.add_argument("--rates", type=int, help="the lowest rates alone: so many")
    parser.add_argument("--fresh", action="store_true", help="run jobs again that are done")
    parser.add_argument("--quick", action="store_true", help="one seed and a hundredth of the steps; writes nothing")
    parser.add_argument("--list", action="store_true", help="run nothing: the jobs, and which are done")
    parser.add_argument("--page", action="store_true", help="run nothing: the page from the results")
    options = parser.parse_args(arguments)
    if not options.page:
        names = chosen(options)
        size = Size(1, options.rates, 100) if options.quick else Size(options.seeds, options.rates)
        jobs, cells = all_jobs(size), {} if options.fresh or options.quick else read()
        done = {name for name in names if name in cells and cells[name]["shape"] == list(jobs[name].shape)}
        if options.list:
            print("\n".join(f"{'done' if name in done else '    '}  {name}" for name in names))
            return
        missing = [name for name in names if name not in done]
        run_jobs(missing, size, options.workers, options.seconds, keep=not options.quick)
        if options.quick:
            return
    write_page(read_apart())


def chosen(options: argparse.Namespace) -> list[str]:
    """The names of the jobs that were asked for, in the order of `--only`."""
    jobs, without = list(all_jobs()), tuple(filter(None, (options.without or "").split(",")))
    wanted = [n for start in (options.only or "").split(",") for n in jobs if n.startswith(start)]
    names = [n for n in dict.fromkeys(wanted) if not n.startswith(without)]
    if not names:
        sys.exit(f"no such jobs. There are: {', '.join(jobs)}")
    return names


if __name__ == "__main__":
    main()
