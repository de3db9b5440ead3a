"""The large tasks: that a stopped run goes on as if it had not stopped, CartPole and PPO against loops, the rule."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked
from benchmarks.stability.large import page, trials, workers
from benchmarks.stability.large.cartpole import DISCOUNT, LAMBDA, advantages, move
from benchmarks.stability.large.studies import BOUND, COMPARED, CUSTOMARY, LARGE, NETS, STUDIES, all_jobs
from benchmarks.stability.large.training import schedule
from benchmarks.stability.large.trials import Trial, chunk_of, grid, run

pytestmark = pytest.mark.usefixtures("standard_promotion")


def walk() -> Trial:
    """A noisy descent."""

    def step(lane: Any, x: Any, index: Any) -> Any:
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(lane.seed), index), ())
        return x - lane.rate * (x + noise), (x**2, jnp.abs(x))

    return Trial(20, lambda lane: jnp.ones(()) + lane.seed, step, lambda lane, x: (x**2 + 0 * lane.rate, x == x))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    lanes, file = grid(2, (0.1, 0.3), (0.01,)), tmp_path / "x.npz"
    whole = run(walk(), lanes, tmp_path / "y.npz", lambda: False, print)
    told: list[str] = []
    assert run(walk(), lanes, file, lambda: len(told) == 4, told.append) is None  # chunks of two steps
    assert [text.split(",")[0] for text in told] == [f"{n} of 20 steps" for n in (2, 4, 6, 8)]
    later = run(walk(), lanes, file, lambda: False, told.append)
    assert told[4].startswith("10 of 20")
    assert whole is not None
    assert later is not None
    for a, b in zip(whole, later, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not file.exists()


def test_lanes_are_every_bound_seed_and_rate() -> None:
    lanes = grid(2, (0.1, 0.3, 1.0), (np.inf, 0.01))
    rows = list(itertools.product(np.array([np.inf, 0.01], np.float32), (0, 1), np.array([0.1, 0.3, 1], np.float32)))
    assert list(zip(lanes.bound, lanes.seed, lanes.rate, strict=True)) == rows
    assert [chunk_of(n) for n in (1500, 300, 15, 7, 2)] == [150, 30, 3, 7, 1]


def test_the_schedule_rises_and_falls() -> None:
    at = schedule(2.0, 100, 10)
    assert [round(float(at(t)), 6) for t in (0, 4, 9, 10, 55, 100)] == [0.2, 1.0, 2.0, 2.0, 1.0, 0.0]
    assert float(schedule(2.0, 100, 0)(0)) == 2.0


def test_the_pole_moves_as_in_its_equations() -> None:
    # Barto, Sutton, Anderson 1983, with Gymnasium's constants: masses 1 and 0.1, half the pole's length 0.5.
    state, action = np.array([0.1, -0.4, 0.15, 1.2]), 0
    x, speed, angle, turn = state
    total, moment = 1.1, 0.1 * 0.5
    push = -10.0
    temp = (push + moment * turn**2 * math.sin(angle)) / total
    bend = (9.8 * math.sin(angle) - math.cos(angle) * temp) / (0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / total))
    faster = temp - moment * bend * math.cos(angle) / total
    expected = [x + 0.02 * speed, speed + 0.02 * faster, angle + 0.02 * turn, turn + 0.02 * bend]
    new, fell = move(jnp.asarray(state, jnp.float32), jnp.asarray(action))
    np.testing.assert_allclose(new, expected, rtol=1e-5)
    assert not fell
    for where in ([2.5, 0, 0, 0], [0, 0, 0.22, 0], [-2.5, 0, 0, 0]):
        assert move(jnp.asarray(where, jnp.float32), jnp.asarray(1))[1]


def test_advantages_are_sums_of_discounted_surprises() -> None:
    rng = np.random.default_rng(0)
    values, over, last = rng.normal(size=(6, 2)), rng.random((6, 2)) < 0.3, rng.normal(size=2)
    assert over.any()
    expected = np.zeros((6, 2))
    for copy, start in itertools.product(range(2), range(6)):
        weight = 1.0
        for t in range(start, 6):
            following = last[copy] if t == 5 else values[t + 1, copy]
            expected[start, copy] += weight * (1 + DISCOUNT * following * (not over[t, copy]) - values[t, copy])
            weight *= DISCOUNT * LAMBDA
            if over[t, copy]:
                break
    found = advantages(jnp.float32(values), jnp.asarray(over), jnp.float32(last))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def cell(differences: list[float]) -> dict[str, Any]:
    """Two rates, the second is the better one without the bound."""
    without = [[3.0] * len(differences), [2.0] * len(differences)]
    bounded = [[1.0] * len(differences), [2.0 + 2.0 * d for d in differences]]
    return {"rates": [0.1, 0.3], "final": [without, bounded], "device": "x", "seconds": 1}


def test_the_rule_takes_the_better_rate_without_the_bound_and_the_upper_end() -> None:
    rate, differences, middle, upper = page.neutrality(cell([0.01, 0.03]))
    assert rate == 0.3
    np.testing.assert_allclose(differences, [0.01, 0.03])
    assert middle == pytest.approx(0.02)
    assert upper == pytest.approx(0.02 + 12.706 * 0.01, rel=1e-3)  # Student's t, one degree of freedom
    both = {"neutral:digits_rnn lion": cell([0.03, 0.031]), "neutral:digits_rnn sgd": cell([0.0, 0.0])}
    cells = page.of_study(both | {"hard:digits_rnn sgd": cell([0.5, 0.6])}, "neutral")
    assert list(cells) == ["digits_rnn sgd", "digits_rnn lion"]
    assert "1 are within 2% by the rule (1 without any difference)" in page.verdict(cells)
    assert "1 are not: digits_rnn lion" in page.verdict(cells)
    assert page.neutral_text(cells["digits_rnn lion"]).startswith("**+3.0 (")
    dead = cell([0.0, 0.0]) | {"final": [[[1.0, 1.0]] * 2, [[None, 1.0]] * 2]}
    assert page.neutral_text(dead) == "NaN at 0.1"
    assert "1 are not" in page.verdict({"adding sgd": dead})


def test_a_job_leaves_numbers_that_json_can_hold() -> None:
    runs = trials.Runs(
        np.ones(4), np.array([1.0, np.nan, np.inf, 2.0]), np.ones(4, bool), np.ones((60, 4)), np.ones((60, 4))
    )
    kept = json.loads(json.dumps(workers.summary(runs, (1, 2, 2)), allow_nan=False))
    assert kept["final"] == [[[1.0, None], [None, 2.0]]]  # bounds, rates, seeds
    assert np.shape(kept["curve"]) == (1, 2, 60)


def test_there_is_a_job_for_every_method_and_pair() -> None:
    jobs = all_jobs()
    assert len(jobs) == len(LARGE) * len(COMPARED) + len(STUDIES) * len(NETS) * len(CUSTOMARY)
    for study in STUDIES:
        assert set(jobs[f"{study}:characters muon"].lanes.bound) == {np.float32(np.inf), np.float32(BOUND)}
    assert jobs["characters none"].lanes.rate.max() >= 30 * jobs["characters none"].lanes.rate.min()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_jobs() if "characters " in name or "cartpole " in name])
def test_every_job_makes_a_step(name: str) -> None:
    job = all_jobs()[name]
    trial, lane = job.trial(), jax.tree.map(lambda x: x[0], job.lanes)
    carry = jax.eval_shape(trial.start, lane)
    after, seen = jax.eval_shape(trial.step, lane, carry, 0)
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    assert [x.shape for x in seen] == [(), ()]
    assert [x.shape for x in jax.eval_shape(trial.evaluate, lane, carry)] == [(), ()]


def test_the_page_says_what_the_results_say() -> None:
    assert marked(page.PAGE.read_text(), "tables") == page.generated(workers.read_apart()).strip()
