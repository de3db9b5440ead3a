"""StabilityBench: measures against loops and hand counts, faults, a short run; that page and results agree."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import ROOT

import optax_guard as og

sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked
from benchmarks.stability import page
from benchmarks.stability.cells import Size, jobs, run_cell
from benchmarks.stability.faults import BASES, FAULTS, START, corrupt, spoil, stacked
from benchmarks.stability.measures import (
    alive,
    best_loss,
    capped,
    equal_best,
    interval,
    regret,
    sensitivity,
    spike_share,
    steps_to_recover,
)
from benchmarks.stability.methods import METHODS
from benchmarks.stability.tasks import TASKS
from benchmarks.stability.train import probed

SMALL = Size(seeds=2, rates=(3e-3, 1e3), shorten=30, tune=False)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def slow_spike_share(values: np.ndarray) -> float:
    """The score, value by value."""
    hits = 0
    for i in range(20, len(values)):
        before = values[max(i - 1000, 0) : i]
        hits += values[i] >= before.mean() + 7 * before.std()
    return hits / (len(values) - 20)


def test_the_spike_score_is_that_of_a_loop() -> None:
    values = np.random.default_rng(0).normal(3, 0.1, 1500)
    values[[100, 700, 1400]] = 30, 8, 5
    assert spike_share(values) == pytest.approx(slow_spike_share(values))
    assert spike_share(values) > 0
    assert spike_share(np.append(values, [np.nan, np.inf])) == spike_share(values)


def test_recovery_is_counted_from_the_end_of_the_fault() -> None:
    clean = np.ones(10)
    loss = np.array([1, 1, 9, 9, 5, 3, 1.05, 1, 1, 1])
    assert steps_to_recover(loss, clean, 4) == 2
    assert steps_to_recover(clean, clean, 4) == 0
    assert steps_to_recover(np.full(10, np.nan), clean, 4) is None


def runs() -> dict[str, Any]:
    """Two rates, two seeds; one run died, one ends worse than it began."""
    return {"initial": [[2.0, 4.0]] * 2, "final": [[1.0, 2.0], [None, 9.0]], "finite": [[1.0, 1.0], [0.0, 1.0]]}


def test_measures_are_what_one_counts_by_hand() -> None:
    assert capped(runs()).tolist() == [[1, 2], [2, 4]]
    assert sensitivity(runs()).tolist() == [0.5, 1]  # (1 + 2) / 2 - 1 and (2 + 4) / 2 - 2
    assert best_loss(runs()).tolist() == [1, 2]
    assert alive(runs()).tolist() == [0.5, 0.5]
    assert regret(runs(), best=1.0).tolist() == [0.5, 2 / 3]
    middle, half = interval([1.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(12.706, rel=1e-4))  # Student's t of one degree of freedom
    noisy = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([1.1, 1.9, 3.1]), "c": np.array([2.0, 3.1, 4.0])}
    assert equal_best(noisy) == {"a", "b"}


def test_every_fault_changes_what_it_says_and_nothing_before_its_start() -> None:
    grads = {"a": jnp.full((2, 2), 0.5), "b": jnp.full(3, 0.5)}
    batch = (jnp.ones((8, 4)), jnp.zeros(8, jnp.int32))
    table = jax.tree.map(jnp.asarray, stacked(FAULTS))
    seen = {}
    for i, name in enumerate(FAULTS):
        for step in (START - 1, START):
            row = jax.tree.map(lambda x, i=i, step=step: x[i, step], table)
            inputs, _, weights = spoil(batch, row)
            changed = {"grads": corrupt(grads, row), "inputs": inputs, "weights": weights}
            seen[name, step] = changed
        neutral = seen[name, START - 1]
        np.testing.assert_array_equal(neutral["grads"]["a"], grads["a"])
        np.testing.assert_array_equal(neutral["weights"], jnp.ones(8))
        np.testing.assert_array_equal(neutral["inputs"], batch[0])
    assert np.isnan(seen["one_nan", START]["grads"]["b"]).sum() == 1
    assert np.isposinf(seen["one_inf", START]["grads"]["b"]).sum() == 1
    assert np.isposinf(seen["overflow", START]["grads"]["a"]).all()
    assert seen["leaf", START]["grads"]["a"][0, 0] == 500
    assert seen["leaf", START]["grads"]["b"][0] == 0.5
    assert not seen["zeros", START]["grads"]["a"].any()
    assert seen["example", START]["inputs"][:2, 0].tolist() == [1e4, 1]
    assert seen["device", START]["weights"].tolist() == [-1000] + [1] * 7


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_step_from_a_traced_setting(name: str) -> None:
    method = METHODS[name]
    params = {"w": jnp.ones((2, 2))}

    def step(setting: jax.Array) -> Any:
        tx = method.build(probed(optax.adam), jnp.float32(1e-3), setting)
        return og.apply_gradients(tx, params, tx.init(params), params, value=jnp.float32(1))

    assert jax.eval_shape(step, jnp.float32(method.settings[0]))[0]["w"].shape == (2, 2)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.takes_rate])
def test_methods_that_take_the_rate_are_measured_between_two_probes(name: str) -> None:
    tx = METHODS[name].build(probed(optax.adam), 1e-3, METHODS[name].settings[0])
    state = jax.eval_shape(tx.init, {"w": jnp.ones((2, 2))})
    assert len(optax.tree.get_all_with_path(state, "passed_norm")) == 2


def test_methods_that_need_a_second_moment_run_only_where_there_is_one() -> None:
    pairs = jobs(["digits_rnn", "digits_float16"], list(BASES), ["none", "spam"])
    assert ("digits_float16", "spam") in pairs
    assert ("faults:adam", "spam") in pairs
    assert ("digits_rnn", "spam") not in pairs
    assert ("faults:sgd", "spam") not in pairs


@pytest.mark.slow  # 20 s of CPU: three cells
def test_a_short_run_tells_a_bare_optimizer_from_a_guarded_one() -> None:
    cells = {f"{where} {name}": run_cell(where, name, SMALL) for where in ("faults:sgd",) for name in ("none", "guard")}
    bare, guarded = (cells[f"faults:sgd {name}"]["faults"] for name in ("none", "guard"))
    assert not any(bare["one_nan"]["finite"])
    assert all(guarded["one_nan"]["finite"])
    assert all(guarded["micro_nan"]["finite"])
    assert bare["one_nan"]["gap"] == [None, None]
    assert guarded["clean"]["gap"] == [0, 0]
    assert guarded["clean"]["touched"] == [0, 0]
    cells["doctor_visits clip"] = run_cell("doctor_visits", "clip", SMALL)
    clipped = cells["doctor_visits clip"]["default"]
    assert np.mean(clipped["touched"]) > 0.5
    assert clipped["final"][0][0] < clipped["initial"][0][0]
    results = {"setting": {}, "cells": cells}
    assert "| `og.guard alone` |" in page.table(results)


def test_the_page_says_what_the_results_say() -> None:
    text = page.PAGE.read_text()
    assert marked(text, "tables") == page.generated(page.read()).strip()
    assert marked(page.RULES_PAGE.read_text(), "result") == page.result_table(page.read())
    for picture in ("tasks", "rates", "faults", "curves"):
        assert f"stability-{picture}.png" in text
        assert (page.DOCS / f"stability-{picture}.png").exists()


def test_the_results_hold_every_cell_of_the_methods_that_were_run() -> None:
    results = json.loads(Path(max(page.results_file().parent.glob("stability-*.json"))).read_text())
    run = [name for name in METHODS if any(cell.endswith(f" {name}") for cell in results["cells"])]
    assert set(results["cells"]) == {f"{w} {m}" for w, m in jobs(list(TASKS), list(BASES), run)}
    assert len(run) >= 27
    assert len(results["setting"]["seeds"]) >= 5
