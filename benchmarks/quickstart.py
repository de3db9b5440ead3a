"""What README says and shows of `examples/quickstart.py`: the run, its picture and the sentences, from one source.

    python -m benchmarks.quickstart                  # the run, some two minutes, then all of it
    python -m benchmarks.quickstart --write-pages    # the sentences again, from the results

It writes `docs/quickstart.png`, `benchmarks/results/quickstart.json` and the sentences in README.md.
"""

import argparse
import importlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.marked import put

__all__ = ["RESULTS", "claims", "main"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"


def claims(results: dict[str, Any]) -> str:
    """What README says about a run, which holds for every seed of it; a ValueError if one of the claims does not."""
    example = quickstart()
    outcomes, faults, limit = results["outcomes"], results["faults"], example.NONFINITE_LIMIT
    first, scaled, sixth = faults["NaN pixels"][0], faults["scaled by 1e4"][0], faults["NaN pixels"][2] + limit

    def dead(name: str) -> set[int | None]:
        return {step for rate in outcomes[name]["dead"] for step in rate}

    right, large = outcomes["limited"]["accuracy"]
    plain, lost = outcomes["stabilize"]["accuracy"]
    found = {
        "the bare optimizer dies by the first scaled batch": all(
            step is not None and step <= scaled + 2 for step in dead("bare")
        ),
        "the clip dies at the first NaN": dead("clip") == {first},
        "apply_if_finite dies at the sixth NaN in a row": dead("finite") == {sixth},
        "stabilize lives": dead("stabilize") == dead("limited") == {None},
        "stabilize learns at the right rate": min(plain) > 0.6,
        "max_change learns at both rates": min(right + large) > 0.6,
        "stabilize learns nothing at ten times the rate": max(lost) < 0.2,
    }
    broken = [claim for claim, holds in found.items() if not holds]
    if broken:
        raise ValueError(f"README would claim what this run does not show for every seed: {broken}")

    def share(numbers: list[float]) -> str:
        return example.between(numbers, "{:.2f}").replace("-", " to ")

    text = f"""
        One recurrent net on real digits, and the same batches for every way to take the step, some of them corrupted.
        Every sentence holds for each of {results["seeds"]} seeds. The parameters of the bare optimizer are NaN within
        two steps of the first batch that was scaled by 1e4, or before; those behind the clip at the first NaN, and
        those of `apply_if_finite(..., {limit})` at the sixth NaN in a row. `stabilize` survives all of it and
        classifies {share(plain)} of the held-out digits correctly at a good learning rate. At ten times that rate it
        stays finite but learns nothing (chance is 0.1): no clip relative to the history can help there, and steps of
        1 % of the weights, which its default allows, are too long for this recurrent net. With
        `max_change={example.MAX_CHANGE:g}`, a tighter bound, it learns at both: {share(right)}, and {share(large)} at
        ten times the rate.
    """
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def main(arguments: list[str] | None = None) -> None:
    """Runs the quickstart, unless told not to, and writes the pages."""
    parser = argparse.ArgumentParser(description="The run, the picture and the sentences of README.")
    parser.add_argument("--write-pages", action="store_true", help="run nothing: the sentences from the results")
    if not parser.parse_args(arguments).write_pages:
        results = quickstart().main(["--out", str(ROOT / "docs" / "quickstart.png")])
        claims(results)
        RESULTS.write_text(json.dumps(results) + "\n")
    put(ROOT / "README.md", "quickstart", claims(json.loads(RESULTS.read_text())))


def quickstart() -> Any:
    """The example as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("quickstart")


if __name__ == "__main__":
    main()
