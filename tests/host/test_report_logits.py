"""What a report says about attention logits: when they began to grow, in which layer and head, and its threshold."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_guard as og
from optax_guard._step.record import read_rows
from optax_guard.attention import AttentionLayout, Projection
from optax_guard.report import TrainingLog, load_checkpoint, load_log, read_log, report, save_log, story

LAYER = {"query": {"kernel": jnp.ones((2, 2, 3))}, "key": {"kernel": jnp.ones((2, 2, 3))}}
PARAMS = {"blocks_0": {"attention": LAYER}, "blocks_1": {"attention": LAYER}}
QUIET = {"blocks_0/attention": [3.0, 2.0], "blocks_1/attention": [1.0, 4.0]}
CLIPPED = og.guard(optax.chain(optax.sgd(1e-3), og.qk_clip(100.0, layers=og.linen_attention())), recorder_rows=64)
BARE = og.guard(optax.sgd(1e-3), recorder_rows=64)


def run(tx: Any, history: list[dict[str, Any]]) -> Any:
    """The state after one step for each of the maxima."""
    take = jax.jit(lambda state, maxima: og.apply_gradients(tx, PARAMS, state, PARAMS, max_logits=maxima)[1])
    state = tx.init(PARAMS)
    for maxima in history:
        state = take(state, {layer: jnp.asarray(numbers, jnp.float32) for layer, numbers in maxima.items()})
    return state


def growing(steps: int = 50, factor: float = 1.2) -> list[dict[str, list[float]]]:
    """Head 0 of the last block grows from step 20 on; head 1 of the first overtakes it in the last three steps."""
    history = []
    for step in range(steps):
        maxima = {layer: list(numbers) for layer, numbers in QUIET.items()}
        maxima["blocks_1/attention"][0] = 4.0 * factor ** max(step - 20, 0)
        if step >= steps - 3:
            maxima["blocks_0/attention"][1] = 2.0 * maxima["blocks_1/attention"][0]
        history.append(maxima)
    return history


@pytest.fixture(scope="module")
def clipped() -> Any:
    return run(CLIPPED, growing())


def told(state: Any, params: Any = PARAMS) -> str:
    """The sentences about logits."""
    return " ".join(sentence for sentence in story(read_log(state, params)) if "logit" in sentence)


def test_each_row_names_layer_and_head_of_the_largest_logit(clipped: Any) -> None:
    log, history = read_log(clipped, PARAMS), growing()
    assert log.logits is not None
    for row, layer, maxima in zip(log.rows, log.logits.layers, history, strict=True):
        largest = max(max(numbers) for numbers in maxima.values())
        np.testing.assert_allclose(row["max_logit"], largest, rtol=1e-6)
        assert maxima[layer][row["logit_head"]] == pytest.approx(largest)
    assert log.logits.thresholds == {"blocks_0/attention": 100.0, "blocks_1/attention": 100.0}


def test_the_story_says_when_a_head_began_to_grow_and_passed_its_threshold(clipped: Any) -> None:
    # 4 * 1.2^n passes twice the level of 4 at n = 4, so in step 24, and 100 at n = 18.
    text = told(clipped)
    assert "4 at first, began to grow in step 24 (head 0 of `blocks_1/attention`)" in text
    assert f"reached {8 * 1.2**29:,.0f} in step 49 (head 1 of `blocks_0/attention`)" in text
    assert "above the threshold of `qk_clip`, 100, in 12 of 50 steps, first in step 38" in text


def test_without_a_clip_the_range_of_trouble_is_named_and_names_come_from_the_parameters() -> None:
    text = told(run(BARE, growing()))
    assert "It was above 1,000 in 3 of 50 steps, first in step 47 (head 1 of `blocks_0/attention`)" in text
    assert "1,000 to 10,000" in text
    state = run(BARE, growing())
    assert "head 0 of a layer whose name is not known" in told(state, None)


def test_growth_that_still_goes_on_is_seen_before_it_hurts() -> None:
    history = growing(50, 1.1)[:47]  # before the other head overtakes it
    text = told(run(BARE, history))
    # 4 * 1.1^n = 1000, or 100 with a clip, n steps after step 20
    assert f"doubling every {np.log(2) / np.log(1.1):.3g} steps, it passes 1,000" in text
    assert f"where trouble has begun, near step {20 + np.log(250) / np.log(1.1):.0f}." in text
    text = told(run(CLIPPED, history))
    assert f"100, the threshold of `qk_clip`, near step {20 + np.log(25) / np.log(1.1):.0f}." in text


def test_a_calm_run_a_run_without_maxima_and_one_with_nan() -> None:
    assert told(run(BARE, [QUIET] * 12)) == (
        "The largest attention logit was between 4 and 4, the latter in step 0 (head 1 of `blocks_1/attention`)."
    )
    state = BARE.init(PARAMS)
    _, state = og.apply_gradients(BARE, PARAMS, state, PARAMS)
    assert read_log(state, PARAMS).logits is None
    bad = QUIET | {"blocks_0/attention": [1.0, np.nan]}
    assert "NaN or Inf in 1 step, first in step 12 (head 1 of `blocks_0/attention`)." in told(
        run(BARE, [*[QUIET] * 12, bad])
    )


def test_layers_of_a_stack_are_told_apart() -> None:
    side = {"kernel": jnp.ones((3, 2, 2, 3))}
    params = {"layers": {"query": side, "key": side}}
    layout = AttentionLayout(
        query=(Projection("query/kernel", axis=1),), key=(Projection("key/kernel", axis=1),), stacked=1
    )
    maxima = jnp.asarray([[1.0, 2.0], [3.0, 9.0], [4.0, 5.0]])
    for inner in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), og.qk_clip(8.0, layers=layout))):
        tx = og.guard(inner)
        _, state = og.apply_gradients(tx, params, tx.init(params), params, max_logits={"layers": maxima})
        log = read_log(state, params)
        assert log.logits is not None
        assert (log.logits.layers, log.rows["logit_head"].tolist()) == (("layers[1]",), [1])


def test_files_and_checkpoints_keep_names_and_threshold(clipped: Any, tmp_path: Path) -> None:
    expected = read_log(clipped, PARAMS)
    assert load_log(save_log(tmp_path / "night", clipped, PARAMS)).logits == expected.logits
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", clipped)
    found: TrainingLog = load_checkpoint(tmp_path / "state")
    assert found.logits == expected.logits
    assert story(found) == story(read_log(clipped))


def test_the_picture_has_a_panel_of_logits(clipped: Any, tmp_path: Path) -> None:
    with_logits = matplotlib.image.imread(report(clipped, PARAMS, tmp_path / "with.html").with_suffix(".png"))
    log = read_log(clipped, PARAMS)._replace(logits=None)
    without = matplotlib.image.imread(report(log, path=tmp_path / "without.html").with_suffix(".png"))
    assert with_logits.shape[0] > without.shape[0]
    page = (tmp_path / "with.html").read_text()
    assert re.search(r"began to grow in step 24 \(head 0 of <code>blocks_1/attention</code>\)", page)


def test_a_largest_logit_is_found_where_numpy_finds_it() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (2,), "b": (3, 4), "c": (1,)}
    history = [{layer: rng.normal(size=shape) for layer, shape in shapes.items()} for _ in range(20)]
    for row, maxima in zip(read_rows(run(BARE, history).recorder), history, strict=True):
        best = max(maxima, key=lambda layer: maxima[layer].max())
        assert row["logit_head"] == np.unravel_index(maxima[best].argmax(), shapes[best])[-1]
