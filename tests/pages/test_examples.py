"""The examples run as a person runs them, in their short mode."""

import json
import re
from pathlib import Path

import pytest
from running import ROOT, ended_by_arguments, example, table_rows

from benchmarks import quickstart
from benchmarks.marked import marked


@pytest.mark.slow  # a minute of CPU: five arms, compiled as users compile them
def test_quickstart_shows_five_arms_of_which_the_guarded_ones_live(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "picture.png"), columns=80)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.search(r"\d\.\d\d \(\d", line)]
    arms = ("optax.sgd alone", "optax.clip_by_global_norm", "optax.apply_if_finite", "og.stabilize")
    arms = (*arms, "og.stabilize, max_change=0.002")
    assert [row[0] for row in rows] == [arm for arm in arms for _ in range(2)]
    for arm, _, accuracy, still, dead in rows:
        if not arm.startswith("og."):
            assert dead[0].isdigit()
            continue
        assert dead == "never"
        assert int(still.split("-")[0]) >= 12  # all batches with NaN pixels, and both scaled ones
        if "max_change" in arm:
            assert still == "12"  # and no other, from both seeds
            assert float(accuracy[:4]) > 0.2  # chance is 0.1
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "gradient norm" in run.stdout


def test_what_readme_says_of_the_quickstart_holds_for_every_seed() -> None:
    results = json.loads(quickstart.RESULTS.read_text())
    assert marked((ROOT / "README.md").read_text(), "quickstart") == quickstart.claims(results).strip()
    results["outcomes"]["limited"]["accuracy"][1][-1] = 0.2
    with pytest.raises(ValueError, match="max_change learns at both rates"):
        quickstart.claims(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least"),
        (["--steps", "70"], "a multiple of it"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--learning-rate", "nan"], "--learning-rate must be positive"),
        (["--seeds", "0"], "--seeds at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--out", "no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_quickstart_refuses_bad_arguments_in_a_sentence(arguments: list[str], message: str) -> None:
    status, printed = ended_by_arguments(*arguments)
    assert status == 2
    assert message in printed


def test_quickstart_explains_its_options() -> None:
    status, printed = ended_by_arguments("--help")
    assert status == 0
    assert "--learning-rate" in printed


@pytest.mark.slow
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
    status, printed = ended_by_arguments(*arguments, script="smoothing.py")
    assert status == 2
    assert message in printed


def output_of(script: str, *arguments: str) -> str:
    run = example(*arguments, script=script, compile_fast=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_float16_underflows_without_loss_scaling_and_trains_with_it() -> None:
    plain, scaled = output_of("float16.py", "--quick").splitlines()[:2]
    accuracy = [float(line.split("accuracy: ")[1].split()[0]) for line in (plain, scaled)]
    assert "gradients that are 0: 1 " in plain
    assert accuracy[0] < 0.3
    assert accuracy[1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_multi_device_holds_the_steps_with_nan_on_all_devices(processes: int) -> None:
    output = output_of("multi_device.py", "--quick", "--processes", str(processes))
    assert f"8 devices in {processes} process(es); all-reduces in the step: 1" in output
    assert "device 5 saw NaN at steps [4, 6]; held everywhere at steps [4, 6]" in output
    digests = [line.split("parameters ")[1] for line in output.splitlines() if "parameters" in line]
    assert len(digests) == processes
    assert len(set(digests)) == 1


@pytest.mark.slow
def test_multi_host_holds_alike_in_all_processes_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    ends = {}
    for folder, runs in (("whole", [16]), ("cut", [8, 16])):
        for steps in runs:
            arguments = ("--local", "2", "--quick", "--steps", str(steps), "--folder", str(tmp_path / folder))
            output = output_of("multi_host.py", *arguments)
        assert "step 16: loss" in output
        assert "2 steps held so far" in output  # those at which one process read NaN
        ends[folder] = sorted(re.findall(r"process (\d) of 2: began at step (\d+), norm ([\d.]+)", output))
    assert [end[:2] for end in ends["whole"]] == [("0", "0"), ("1", "0")]
    assert [end[:2] for end in ends["cut"]] == [("0", "8"), ("1", "8")]
    assert len({norm for of_run in ends.values() for _, _, norm in of_run}) == 1


@pytest.mark.slow
def test_character_transformer_dies_bare_and_lives_guarded_and_leaves_a_report(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "page.html"), script="character_transformer.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    bare, guarded, stabilized = table_rows(run.stdout)
    assert bare[1] == "nan"
    assert float(guarded[1]) < 3.6  # chance is 4.6
    assert guarded[2] == "2"  # the two batches with an unknown character
    assert float(stabilized[1]) < 3.6
    assert int(stabilized[2]) >= 3  # and the one whose loss was summed
    assert "Step 60: the gradient of" in run.stdout
    assert "<html" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
def test_resume_is_the_same_to_the_bit_after_a_kill() -> None:
    run = example("--quick", script="resume.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    rows = table_rows(run.stdout)
    assert len(rows) == 7
    assert all(resumed == uninterrupted and same == "yes" for _, resumed, uninterrupted, same in rows)
    assert {row[0]: row[1] for row in rows}["dropped_total"] == "4"
    done, total, checkpoint = map(int, re.findall(r"\d+", run.stdout.split("Killed after batch")[1])[:3])
    assert checkpoint <= done < total


@pytest.mark.slow
def test_equinox_trains_alike_both_ways() -> None:
    run = example("--quick", script="equinox_mlp.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    rows = table_rows(run.stdout)
    assert [row[0] for row in rows] == ["TX.update", "og.apply_gradients"]
    assert all(float(accuracy) > 0.6 and held == "10" for _, accuracy, held, _ in rows)
    assert float(run.stdout.split("between the two models:")[1]) < 1e-4


@pytest.mark.slow
def test_heavy_tails_compares_four_arms_on_two_sets_of_data() -> None:
    run = example("--quick", script="heavy_tails.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    rows = table_rows(run.stdout)
    clean, faulty = rows[:4], rows[4:]
    assert [row[0] for row in clean] == [row[0] for row in faulty]
    unexplained = [[row[1] for row in part] for part in (clean, faulty)]
    assert all(float(cell.split()[0]) < 1.2 for cell in unexplained[0])
    assert unexplained[1][0].endswith("diverged") or float(unexplained[1][0].split()[0]) > 1.2
    assert float(unexplained[1][3].split()[0]) < 1.2


@pytest.mark.slow
def test_attention_holds_the_logits_of_two_arms_and_draws_all_three(tmp_path: Path) -> None:
    run = example("--quick", "--out", str(tmp_path / "picture.png"), script="attention.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    rows = table_rows(run.stdout)
    assert [row[0] for row in rows] == ["adam", "adam, qk_clip", "adam, limit_step"]
    assert all(float(row[1]) < 4.6 for row in rows)  # chance
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_guarding_a_running_job_saves_it() -> None:
    run = example("--quick", script="guard_a_running_job.py", compile_fast=True)
    assert run.returncode == 0, run.stderr
    bare, guarded, out_again = table_rows(run.stdout)
    assert float(bare[1]) < 0.2  # chance is 0.1
    assert min(float(guarded[1]), float(out_again[1])) > 0.6
    assert guarded[2:] == ["87", "3"]
    assert out_again[2:] == ["87", "no guard"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("character_transformer.py", ["--learning-rate", "-1"], "--learning-rate must be positive"),
        ("character_transformer.py", ["--out", "no/such/folder/x.html"], "there is no folder"),
        ("resume.py", ["--batches", "1"], "--batches must be at least"),
        ("attention.py", ["--steps", "3"], "--steps must be at least"),
    ],
)
def test_examples_refuse_bad_arguments_in_a_sentence(script: str, arguments: list[str], message: str) -> None:
    status, printed = ended_by_arguments(*arguments, script=script)
    assert status == 2
    assert message in printed


def test_readme_lists_every_example_and_every_docstring_has_its_command() -> None:
    readme = (ROOT / "README.md").read_text()
    scripts = [path for path in (ROOT / "examples").glob("*.py") if "argparse" in path.read_text()]
    assert len(scripts) >= 6
    for path in scripts:
        assert f"examples/{path.name}" in readme, f"README's table of examples lacks {path.name}"
        assert f"    python examples/{path.name}" in path.read_text()
