"""The examples run as a person runs them, in their short mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def example(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_quickstart_shows_five_arms_of_which_the_guarded_ones_live(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "picture.png"))
    assert run.returncode == 0, run.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in run.stdout.splitlines() if line.startswith("│")
    ]
    arms = ("bare optimizer", "optax.clip_by_global_norm", "optax.apply_if_finite", "og.stabilize")
    arms = (*arms, "og.stabilize, max_change=0.001")
    assert [row[0] for row in rows] == [arm for arm in arms for _ in range(3)]
    for arm, rate, accuracy, skipped, dead in rows:
        if not arm.startswith("og."):
            assert dead.startswith("step")
            continue
        assert dead == "never"
        assert skipped == "12"  # all batches with NaN pixels, both scaled ones, and no other
        assert float(accuracy) > (0.15 if rate == "0.001" else 0.3)  # chance is 0.1
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "worst leaf" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least"),
        (["--steps", "70"], "a multiple of it"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--out", "no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_quickstart_refuses_bad_arguments_in_a_sentence(arguments: list[str], message: str) -> None:
    run = example(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_quickstart_explains_its_options() -> None:
    run = example("--help")
    assert run.returncode == 0
    assert "--learning-rate" in run.stdout
