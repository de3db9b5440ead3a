"""The examples run as a person runs them, in their short mode."""

from pathlib import Path

import pytest
from running import example


def test_quickstart_shows_four_arms_of_which_the_guarded_one_lives(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "picture.png"))
    assert run.returncode == 0, run.stderr
    fates = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in run.stdout.splitlines()
        if line.startswith("│")
    }
    assert set(fates) == {"bare optimizer", "optax.clip_by_global_norm", "optax.apply_if_finite", "optax_guard"}
    accuracy, skipped, _, dead = fates.pop("optax_guard")
    assert float(accuracy) > 0.3  # chance is 0.1
    assert skipped == "10"  # all batches with NaN pixels, and no other
    assert dead == "never"
    assert all(fate[3].startswith("step") for fate in fates.values())
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "worst leaf" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least"),
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


def test_smoothing_certifies_three_nets(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "picture.png"), script="smoothing.py")
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run.stdout.splitlines() if line[:1] == "│"]
    certified, noisy = rows[:3], rows[3:]
    assert [row[0] for row in noisy] == ["without noise", "with noise 0.25", "with noise 0.5"]
    for _, abstains, *shares in certified:
        assert float(shares[0]) > 0.5  # chance is 0.1
        assert float(shares[0]) + float(abstains) <= 1.0 + 1e-3
        assert shares == sorted(shares, reverse=True)
    assert all(float(row[1]) > 0.7 for row in noisy)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--samples", "0"], "--samples must be at least"), (["--out", "no/such/folder/x.png"], "there is no folder")],
)
def test_smoothing_refuses_bad_arguments_in_a_sentence(arguments: list[str], message: str) -> None:
    run = example(*arguments, script="smoothing.py")
    assert run.returncode == 2
    assert message in run.stderr
