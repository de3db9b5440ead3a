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


def run_file(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_float16_underflows_without_loss_scaling_and_trains_with_it() -> None:
    plain, scaled = run_file("float16.py", "--quick").splitlines()[:2]
    accuracy = [float(line.split("accuracy: ")[1].split()[0]) for line in (plain, scaled)]
    assert "gradients that are 0: 1 " in plain
    assert accuracy[0] < 0.3
    assert accuracy[1] > 0.9


@pytest.mark.parametrize("processes", [1, 2])
def test_multi_device_holds_the_steps_with_nan_on_all_devices(processes: int) -> None:
    output = run_file("multi_device.py", "--quick", "--processes", str(processes))
    assert f"8 devices in {processes} process(es); all-reduces in the step: 1" in output
    assert "device 5 saw NaN at steps [4, 6]; held everywhere at steps [4, 6]" in output
    digests = [line.split("parameters ")[1] for line in output.splitlines() if "parameters" in line]
    assert len(digests) == processes
    assert len(set(digests)) == 1
