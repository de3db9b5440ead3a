"""The study of attention logits: its model against NumPy, a short run, and that page and results agree."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import ROOT

import optax_guard as og

sys.path.insert(0, str(ROOT))

from benchmarks import attention as study
from benchmarks.marked import marked

TINY = study.QUICK._replace(steps=30, context=8, batch=2)

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")


@pytest.fixture
def rank_promotion() -> Iterator[None]:
    """The study broadcasts as NumPy does."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_largest_logits_are_those_of_the_model() -> None:
    text = study.read_text()
    seed = study.draw(0, TINY, text)
    tokens = text.train[seed.starts[0] + np.arange(TINY.context + 1)]
    with jax.disable_jit():
        _, max_logits = study.loss_fn(jax.tree.map(jnp.asarray, seed.params), jnp.asarray(tokens), False)
    hidden = seed.params["tokens"][tokens[:, :-1]].astype(np.float64) + seed.params["positions"]
    normed = hidden / np.sqrt(np.mean(hidden**2, -1, keepdims=True) + 1e-6)
    query, key = (
        (normed @ seed.params["layers"][name][0]).reshape(*tokens[:, 1:].shape, study.HEADS, -1)
        for name in ("query", "key")
    )
    logits = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(query.shape[-1])
    expected = np.where(np.tri(TINY.context, dtype=bool), logits, -np.inf).max((0, 2, 3))
    np.testing.assert_allclose(max_logits["layers"][0], expected, rtol=1e-4)


@pytest.mark.parametrize(("optimizer", "name"), [*zip(itertools.cycle(study.OPTIMIZERS), study.ARMS, strict=False)])
def test_every_arm_takes_a_step_from_a_traced_rate(optimizer: str, name: str) -> None:
    params = jax.tree.map(jnp.asarray, study.draw(0, TINY, study.read_text()).params)
    maxima = {"layers": jnp.full((TINY.layers, study.HEADS), 400.0)}

    def step(rate: jax.Array) -> optax.Params:
        tx = study.ARMS[name].wrap(study.OPTIMIZERS[optimizer][1](lambda _: rate))
        loss = jnp.float32(1)
        return og.apply_gradients(tx, params, tx.init(params), params, value=loss, max_logits=maxima)[0]

    assert jax.eval_shape(step, jnp.float32(0.1))["layers"]["query"].shape == params["layers"]["query"].shape


def test_the_study_of_moments_scales_those_of_queries_and_keys_and_no_others() -> None:
    params = jax.tree.map(jnp.asarray, study.draw(0, TINY, study.read_text()).params)
    maxima = {"layers": jnp.full((TINY.layers, study.HEADS), 4 * study.THRESHOLD)}  # factors of 1/2 for both sides

    @jax.jit
    def moments(params: optax.Params) -> list[optax.Params]:
        states = []
        for arm in study.MOMENTS_ARMS.values():
            tx = arm.wrap(optax.adam(0.1))
            _, state = og.apply_gradients(tx, params, tx.init(params), params, max_logits=maxima)
            states.append({name: optax.tree.get(state, name)["layers"] for name in ("mu", "nu")})
        return states

    kept, scaled = moments(params)
    for name, factor in (("mu", 0.5), ("nu", 0.25)):
        for leaf, moment in kept[name].items():
            expected = factor * moment if leaf in ("query", "key") else moment
            np.testing.assert_allclose(scaled[name][leaf], expected, rtol=1e-6)


def test_a_cell_is_summed_up_as_one_counts_by_hand() -> None:
    largest = np.arange(2 * 3 * 60, dtype=float).reshape(2, 3, 60)
    held_out = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, np.inf]])
    cell = study.summary(study.Runs(held_out, largest, largest))
    assert cell["held_out"] == [[1, 2, 3], [1, None, None]]
    assert cell["largest_at_end"][0] == [59, 119, 179]
    assert cell["curve"]["middle"][0] == [69, 79, 89, 99, 109, 119]
    assert study.row(cell, (0.1, 1.0)) == ["2.00 ± 1.00, 119", "NaN in 2 of 3, 299"]


def test_the_page_says_what_the_results_say() -> None:
    results = json.loads(study.RESULTS.read_text())
    assert marked(study.PAGE.read_text(), "tables") == study.generated(results).strip()
    assert results["cells"].keys() == {f"{optimizer} {name}" for name in study.ARMS for optimizer in study.OPTIMIZERS}
    moments = json.loads(study.MOMENTS_RESULTS.read_text())
    assert marked(study.PAGE.read_text(), "moments") == study.generated_moments(moments).strip()
    assert results["setting"]["size"]["seeds"] >= 5
    untreated = [
        np.median(results["cells"][f"{optimizer} none"]["largest_at_end"], axis=1) for optimizer in study.OPTIMIZERS
    ]
    assert all(largest.max() > 1000 for largest in untreated)


@pytest.mark.slow
def test_a_short_run_continues_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {name: study.ARMS[name] for name in ("none", "qk_clip")}
    monkeypatch.setattr(study, "THRESHOLD", 1.0)
    monkeypatch.setattr(study, "OPTIMIZERS", {"adamw": study.OPTIMIZERS["adamw"]})
    path = tmp_path / "attention.json"
    size = TINY._replace(rates=(3e-2, 1e-1))
    assert not study.measure(size, path, 0, False, arms)["cells"]
    results = study.measure(size, path, np.inf, False, arms)
    assert results == json.loads(path.read_text()) == study.measure(size, path, np.inf, False, arms)
    free, clipped = (np.array(results["cells"][f"adamw {name}"]["largest_at_end"]) for name in arms)
    assert np.all(clipped < free)
    assert "| nothing |" in study.generated(results)
