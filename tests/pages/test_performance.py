"""The performance record: its short run, that pages and results agree, and how kernels are counted."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from running import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked, put
from benchmarks.performance.__main__ import tree_size
from benchmarks.performance.measure import Row
from benchmarks.performance.page import Record, older, plain, read_records, regions
from benchmarks.performance.programs import kernels
from benchmarks.performance.waits import counted


@pytest.mark.slow
def test_the_short_run_measures_and_ends_in_the_targets() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.performance",
        "--quick",
        "--only",
        "accumulation",
        "parameters",
        "programs",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert "[3/3] programs" in run.stderr
    table = run.stdout.split("Targets")[1]
    for what in (
        "optax.MultiSteps(chain(clip, adamw), 4) over acc",
        "peak memory of a guarded step beyond",
        "on a GPU",
    ):
        assert what in table
    assert "a step, 0.3 M parameters, guarded over bare" in run.stdout


def test_waits_of_the_host_are_known_by_their_names() -> None:
    events = {"cuStreamSynchronize": 50, "cuEventSynchronize": 2, "MemcpyD2H": 49, "cuMemcpyDtoHAsync_v2": 1}
    others = {"cuLaunchKernelEx": 500, "cuStreamWaitEvent": 4, "MemcpyH2D": 3, "loop_add_fusion": 100}
    assert counted(Counter(events | others)) == (52, 50)


def test_the_tree_is_as_large_as_memory_allows() -> None:
    assert tree_size("cpu", 24e9) == (640, 12)
    assert tree_size("gpu", 60e9) == (1792, 4)
    assert tree_size("gpu", 8e9) == (640, 4)
    assert tree_size("tpu", 0) == (160, 12)


def test_pages_are_what_the_results_say() -> None:
    records = read_records()
    if not records:
        pytest.skip("no results yet")
    for page, parts in regions(records).items():
        text = (ROOT / page).read_text()
        for name, content in parts.items():
            assert marked(text, name) == content.strip(), (
                f"{page}, {name}: python -m benchmarks.performance --write-pages"
            )


def test_rows_meet_their_targets_on_the_right_side_and_tables_say_so(tmp_path: Path) -> None:
    fast = Row("guard", "ours over theirs", 0.5, 0.4, 0.6, target=0.68)
    slow = Row("guard", "theirs over ours", 2.4, 2.3, 2.6, target=2.5, at_least=True)
    bare = Row("guard", "bytes", 3.0, 3.0, 3.0)
    assert (fast.met, slow.met, bare.met) == (True, False, None)
    table = plain([Record("performance-cpu-jax0.0.0", {}, [fast, slow, bare])], [fast, slow, bare])
    assert "| what | target | CPU, JAX 0.0.0 |" in table
    assert "| ours over theirs | at most 0.68 | 0.50 (0.40 to 0.60) |" in table
    assert "| theirs over ours | at least 2.5 | 2.40 (2.30 to 2.60), **missed** |" in table
    assert "| bytes |  | 3.00 |" in table
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin x: it -->\nold\n<!-- end x -->\nafter\n")
    put(page, "x", table)
    assert page.read_text() == f"before\n<!-- begin x: it -->\n\n{table}\n\n<!-- end x -->\nafter\n"
    put(page, "x", table)
    assert marked(page.read_text(), "x") == table
    with pytest.raises(ValueError, match="begin y"):
        put(page, "y", "")


def test_a_page_says_which_numbers_are_not_of_the_statistic_of_their_brackets() -> None:
    inside, outside = Row("rules", "a", 1.0, 0.9, 1.1), Row("traps", "b", 0.78, 0.8, 0.88)
    assert "| 0.78 |" in plain([Record("performance-cpu-jax0.0.0", {}, [outside])], [outside])
    assert older([Record("performance-cpu-jax0.0.0", {}, [inside])]) == ""
    told = older([Record("performance-cpu-jax0.0.0", {}, [inside, outside])])
    assert told == "Measured before as ratios of two medians: traps of CPU, JAX 0.0.0."
    setting = {"device": "NVIDIA X", "statistic": "ratio of medians"}
    assert "all of X, JAX 0.0.0" in older([Record("performance-gpu-jax0.0.0", setting, [inside])])


def test_kernels_are_those_launched_and_of_a_conditional_its_dearer_branch() -> None:
    program = """HloModule step

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add = f32[2]{0} add(%p, %p)
}

%act (t: (f32[2])) -> (f32[2]) {
  %t = (f32[2]{0}) parameter(0)
  %g = f32[2]{0} get-tuple-element(%t), index=0
  %one = f32[2]{0} fusion(%g), kind=kLoop, calls=%fused
  %two = f32[2]{0} fusion(%one), kind=kLoop, calls=%fused
  ROOT %r = (f32[2]{0}) tuple(%two)
}

%hold (t: (f32[2])) -> (f32[2]) {
  %t = (f32[2]{0}) parameter(0)
  %g = f32[2]{0} get-tuple-element(%t), index=0
  %same = f32[2]{0} copy(%g)
  ROOT %r = (f32[2]{0}) tuple(%same)
}

ENTRY %main (x: f32[2], ok: pred[]) -> (f32[2]) {
  %x = f32[2]{0} parameter(0)
  %ok = pred[] parameter(1)
  %sum = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %t = (f32[2]{0}) tuple(%sum)
  ROOT %c = (f32[2]{0}) conditional(%ok, %t, %t), BRANCHES
}
"""
    by_name = program.replace("BRANCHES", "true_computation=%act, false_computation=%hold")
    assert kernels(by_name) == 3
    assert kernels(program.replace("BRANCHES", "branch_computations={%hold, %act}")) == 3
