"""What `preflight`, `learning_rate_sweep` and `diagnose` say about attention logits, per layer and head."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.attention import AttentionLayout, Projection
from optax_guard.diagnose import diagnose
from optax_guard.preflight import learning_rate_sweep, preflight

pytestmark = pytest.mark.usefixtures("standard_promotion")  # stock Adam does not work under the strict one

LAYOUT = AttentionLayout(query=(Projection("query", axis=1),), key=(Projection("key", axis=1),))
RNG = np.random.default_rng(0)
LAYERS = ("blocks_0", "blocks_1")
PARAMS = {
    layer: {side: jnp.asarray(RNG.normal(size=(2, 2, 1)), jnp.float32) for side in ("query", "key")} for layer in LAYERS
}
X = jnp.asarray(RNG.normal(size=(4, 3, 2)), jnp.float32)  # sequences of three


def loss_fn(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Two layers of attention with two heads of size 1, which mix the input itself."""
    max_logits = {}
    for layer in LAYERS:
        query, key = (jnp.einsum("btd,dhe->bthe", x, params[layer][side]) for side in ("query", "key"))
        weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", query, key))
        max_logits[layer] = og.max_attention_logits(query, key)
        x = x + jnp.einsum("bhts,bsd->btd", weights, x) / 2
    return jnp.mean(jnp.square(x)), max_logits


def expected(params: Any, x: Any) -> dict[str, np.ndarray]:
    x, found = np.asarray(x, np.float64), {}
    for layer in LAYERS:
        query, key = (np.einsum("btd,dhe->bthe", x, np.asarray(params[layer][s], np.float64)) for s in ("query", "key"))
        logits = np.einsum("bthe,bshe->bhts", query, key)
        found[layer] = logits.max((0, 2, 3))
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        x = x + np.einsum("bhts,bsd->btd", weights / weights.sum(-1, keepdims=True), x) / 2
    return found


def scaled(factor: float) -> Any:
    """The parameters with the logits of head 1 in the last block multiplied."""
    query = PARAMS["blocks_1"]["query"].at[:, 1].multiply(factor)
    return {**PARAMS, "blocks_1": {**PARAMS["blocks_1"], "query": query}}


def clipped(optimizer: optax.GradientTransformation) -> Any:
    return og.guard(optax.chain(optimizer, og.qk_clip(1.0, layers=LAYOUT)))


def test_preflight_reports_every_head_and_the_range_of_trouble(tmp_path: Path) -> None:
    params = scaled(1e4)
    report = preflight(loss_fn, params, X, optimizer=clipped(optax.adam(0.1)), has_aux=True, progress=False)
    assert [each.layer for each in report.logits] == list(LAYERS)
    for each in report.logits:
        np.testing.assert_allclose(each.maxima, expected(params, X)[each.layer], rtol=1e-4)
    text = str(report)
    assert "trouble has begun at 1,000 to 10,000" in text
    (finding,) = (each for each in report.findings if "logit" in each)
    assert "that of head 1 of `blocks_1`; 1 of 4 heads have passed 1,000" in finding
    assert report.stable_learning_rates is not None
    assert report.preconditioned_eigenvalues is not None
    assert report.stable_learning_rates.optimizer is not None
    np.testing.assert_allclose(  # the clip hides no constant
        report.stable_learning_rates.optimizer, 38 / report.preconditioned_eigenvalues[0], rtol=1e-4
    )
    assert json.loads(json.dumps(report.to_dict()["logits"]))[0]["layer"] == "blocks_0"
    assert len(report.plot(tmp_path / "preflight.png").axes) == 5


def test_a_sweep_shows_the_growth_of_the_largest_logit_at_every_rate_and_feeds_the_optimizer(tmp_path: Path) -> None:
    batches = jnp.stack([X] * 6)
    rates = [0.01, 0.3]
    bare = learning_rate_sweep(lambda rate: optax.sgd(-rate), loss_fn, PARAMS, batches, rates, has_aux=True)
    held = learning_rate_sweep(lambda rate: clipped(optax.sgd(-rate)), loss_fn, PARAMS, batches, rates, has_aux=True)
    assert bare.max_logits is not None
    assert held.max_logits is not None
    take = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for rate, logits in zip(rates, bare.max_logits, strict=True):
        params = PARAMS
        for logit in logits:
            np.testing.assert_allclose(logit, max(x.max() for x in expected(params, X).values()), rtol=1e-4)
            params = jax.tree.map(lambda w, g, rate=rate: w + rate * g, params, take(params, X)[1])
    assert np.all(held.max_logits[:, 1:] < 3)
    assert np.all(bare.max_logits[:, 1:] > 3)
    assert f"x{bare.max_logits[1, -1] / bare.max_logits[1, 0]:.3g}" in str(bare)
    assert len(bare.plot(tmp_path / "sweep.png").axes) == 3
    plain = learning_rate_sweep(optax.sgd, lambda w, x: jnp.mean(w * x), jnp.ones(()), jnp.ones((2, 2)), [0.1])
    assert plain.max_logits is None


def test_diagnose_names_layer_and_head() -> None:
    found = diagnose(loss_fn, scaled(30.0), X, has_aux=True, progress=False)
    logit = expected(scaled(30.0), X)["blocks_1"][1]
    assert f"The largest attention logit is {logit:.4g}, that of head 1 of `blocks_1`." in found.story
    assert "trouble has begun" in str(found)
    bad = diagnose(loss_fn, scaled(jnp.nan), X, has_aux=True, progress=False)
    assert "An attention logit is not finite: that of head 1 of `blocks_1`." in bad.story


@pytest.mark.parametrize(
    ("aux", "known"),
    [
        ({"blocks_0": jnp.ones(2)}, True),
        ({"max_logits": {"anything": jnp.ones(2)}, "accuracy": jnp.ones(())}, True),
        ({"accuracy": jnp.ones(()), "blocks_0": jnp.ones(2)}, False),
        ({"histogram": jnp.ones(2)}, False),
        ({}, False),
        (jnp.ones(2), False),
    ],
)
def test_maxima_are_recognised_and_nothing_else_is_taken_for_them(aux: Any, known: bool) -> None:
    found = learning_rate_sweep(
        optax.sgd, lambda w, x: (jnp.mean(w["blocks_0"]["a"] * x), aux), {"blocks_0": {"a": jnp.ones(())}},
        jnp.ones((2, 2)), [0.1], has_aux=True,
    )  # fmt: skip
    assert (found.max_logits is not None) == known


def test_maxima_of_a_wrong_kind_are_refused() -> None:
    for wrong in ({"a": jnp.ones(())}, {"a": jnp.ones(2, jnp.int32)}):
        with pytest.raises(ValueError, match=r"diagnose: `max_logits` must hold a float array \[heads\].*`a`"):
            diagnose(lambda w, x, wrong=wrong: (jnp.mean(w * x), {"max_logits": wrong}), jnp.ones(()), X, has_aux=True)
