"""Where growth, an alarm and a forecast of attention logits begin and end; nothing is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_guard._common.tree import path_hash
from optax_guard._host.logits import (
    LayerLogits,
    largest_of,
    layer_logits,
    logit_finding,
    logit_table,
    maxima_in,
)
from optax_guard.report._logits import LogitLog, growth_of, logit_log, logit_sentences, usable

RNG = np.random.default_rng(0)
FIRST_STEP = 700  # of the record: positions are no steps


def record(logits: Any, heads: Any = 0, layers: Any = 0) -> np.ndarray:
    """The columns of a flight log that are about logits."""
    logits = np.asarray(logits, np.float32)
    rows = np.zeros(len(logits), [("step", "i4"), ("max_logit", "f4"), ("logit_layer", "u4"), ("logit_head", "i4")])
    rows["step"] = FIRST_STEP + np.arange(len(logits))
    rows["max_logit"], rows["logit_head"], rows["logit_layer"] = logits, heads, layers
    return rows


def words(logits: Any, layers: Any = "layer", thresholds: Any = (), heads: Any = 0) -> str:
    """What is said of a record; of one layer, or of one for each row."""
    rows = record(logits, heads)
    of_rows = (layers,) * len(rows) if isinstance(layers, str) else tuple(layers)
    return " ".join(logit_sentences(rows, LogitLog(of_rows, dict(thresholds))))


# The report


def by_hand(logits: list[float]) -> tuple[float, int, int] | None:
    """Level, begin and peak, one number at a time."""
    numbers = [(row, logit) for row, logit in enumerate(logits) if 0 < logit < np.inf]
    if not numbers:
        return None
    first = sorted(logit for _, logit in numbers[:8])
    level = (first[(len(first) - 1) // 2] + first[len(first) // 2]) / 2
    peak, top = numbers[0]
    for row, logit in numbers:
        if logit > top:
            peak, top = row, logit
    if top < 3 * level:
        return None
    begin = None
    for row, logit in numbers:
        if row <= peak and logit <= 2 * level:
            begin = None
        elif row <= peak and begin is None:
            begin = row
    assert begin is not None
    return level, begin, peak


def test_growth_begins_where_one_finds_it_by_hand() -> None:
    """Of few different values, so that twice and three times the level are met exactly, too."""
    found = set()
    for _ in range(1500):
        values = RNG.choice([[1, 2, 2, 3, 4, 6, 9, np.nan, np.inf, 0, -5], [1, 1, 1, 1, 2, 3, 3, np.nan, -1, 2, 1]])
        logits = RNG.choice(values, RNG.integers(1, 16)).astype(np.float32).tolist()
        assert growth_of(record(logits)) == by_hand(logits), logits
        found.add(by_hand(logits) is None)
    assert found == {True, False}
    assert usable(record([np.nan, np.inf, -np.inf, -1, 0, 1e-30])).tolist() == [False] * 5 + [True]


def test_a_level_is_the_median_of_eight() -> None:
    assert growth_of(record([1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9])) == (3.0, 8, 8)


def test_sentences_name_the_steps_and_whose_logits_they_are() -> None:
    text = words([4, np.nan, 2.5, 3, -7, 3], layers=["a", "b", "c", "d", "e", ""], heads=[0, 1, 2, 3, 4, 5])
    assert text == (
        "The largest attention logit was between 2.5 and 4, the latter in step 700 (head 0 of `a`). "
        "An attention logit was NaN or Inf in 1 step, first in step 701 (head 1 of `b`)."
    )
    text = words([1, np.inf, np.nan, 2, 3], layers=[*"abcd", ""], heads=[9, 0, 1, 2, 3])
    assert text == (
        "The largest attention logit was between 1 and 3, the latter in step 704 (head 3 of a layer whose name is not "
        "known). An attention logit was NaN or Inf in 2 steps, first in step 701 (head 0 of `b`)."
    )
    text = words([2] * 8 + [4, 5, 7, 6.5], heads=range(12))
    assert text == (
        "The largest attention logit, 2 at first, began to grow in step 709 (head 9 of `layer`), and reached 7 in step "
        "710 (head 10 of `layer`)."
    )


def test_steps_without_maxima_are_no_bad_ones() -> None:
    assert "NaN" not in words([1, np.nan, 1], heads=[0, -1, 0])
    assert words([np.nan, np.nan], heads=[0, -1]).startswith("An attention logit was NaN or Inf in 1 step, first in st")
    assert logit_sentences(record([1.0]), None) == []


def test_an_alarm_begins_above_the_limit_of_its_own_layer() -> None:
    assert "above" not in words([1000, 999])
    text = words([900, np.nan, 1001, 1000, 1002])
    assert "It was above 1,000 in 2 of 4 steps, first in step 702 (head 0 of `layer`); trouble has begun at" in text
    limits = {"low": 5.0, "high": 50.0}
    assert "above" not in words([5, 50, 999], layers=["low", "high", "other"], thresholds=limits)
    text = words([4, 49, 51, 6, 1001], layers=["low", "high", "high", "low", "other"], thresholds=limits)
    assert "above the threshold of `qk_clip`, 50, in 3 of 5 steps, first in step 702 (head 0 of `high`)." in text
    assert "the threshold of `qk_clip`, 50, in 2 of 2" in words([51, 1001], ["high", "other"], limits)
    assert "above 1,000 in 2 of 2 steps, first" in words([1001, 51], ["other", "high"], limits)


def grown(level: float, quiet: int, factor: float, steps: int) -> np.ndarray:
    """Constant, and from then on larger by the same factor in every step."""
    return level * factor ** np.maximum(np.arange(quiet + steps) - quiet + 1.0, 0)


def expected_end(logits: np.ndarray, limit: float, begin: int) -> tuple[float, float]:
    """The step in which a line through the logarithms of the second half meets the limit, and how fast they double."""
    fitted = np.arange(begin, len(logits))
    fitted = fitted[len(fitted) // 2 :]
    x, y = fitted - fitted.mean(), np.log(logits[fitted])
    slope = (x @ y) / (x @ x)
    return FIRST_STEP + fitted.mean() + (np.log(limit) - y.mean()) / slope, np.log(2) / slope


def test_a_forecast_takes_the_pace_of_the_second_half() -> None:
    steep = grown(2.0, 10, 1.2, 20)
    logits = np.append(steep, steep[-1] * np.exp(0.05 * np.arange(1, 21) + 0.01 * RNG.normal(size=20)))
    begin = 10 + int(np.ceil(np.log(2) / np.log(1.2))) - 1
    for limit, thresholds, what in (
        (1000, {}, "where trouble has begun"),
        (300, {"layer": 300.0}, "the threshold of `qk_clip`"),
    ):
        end, doubling = expected_end(logits, limit, begin)
        text = words(logits, thresholds=thresholds)
        assert f"began to grow in step {FIRST_STEP + begin} " in text
        assert f"doubling every {doubling:.3g} steps, it passes {limit:,}, {what}, near step {end:.0f}." in text
    text = words(logits, layers=["other"] * 49 + ["layer"], thresholds={"layer": 300.0})
    assert "it passes 300, the threshold" in text, "of the layer that is the largest now"


@pytest.mark.parametrize(("ahead", "told"), [(0.5, True), (4 * 49 - 1, True), (4 * 49 + 1, False)])
def test_a_forecast_looks_four_times_as_far_ahead_as_the_record_is_long(ahead: float, told: bool) -> None:
    logits = grown(1.0, 8, 1.05, 42)
    limit = logits[-1] * 1.05**ahead
    assert ("near step" in words(logits, thresholds={"layer": limit})) == told


@pytest.mark.parametrize(("steps", "told"), [(15, True), (14, False)])
def test_a_forecast_needs_eight_steps_of_the_second_half(steps: int, told: bool) -> None:
    assert ("near step" in words(grown(2.0, 10, 2.01, steps), thresholds={"layer": 1e6})) == told


@pytest.mark.parametrize(("last", "told"), [(1 / 1.45, True), (1 / 1.55, False), (1.0, True)])
def test_growth_that_is_over_has_no_forecast(last: float, told: bool) -> None:
    logits = grown(2.0, 10, 1.1, 40)
    assert ("near step" in words(np.append(logits, logits[-1] * last))) == told
    assert "near step" in words([*[2] * 10, *range(5, 90, 5), 96, 64]), "64 is just 96 / 1.5"


def test_logits_that_fall_or_are_beyond_the_limit_by_the_line_have_no_forecast() -> None:
    peak = 10 * 1.5 ** np.arange(5)
    falling = np.concatenate([np.full(10, 2.0), peak, peak[-1] * 0.99 ** np.arange(1, 30)])
    assert words(falling).endswith("reached 50.6 in step 714 (head 0 of `layer`).")
    flat = np.concatenate([np.full(10, 2.0), np.full(30, 50.0)])
    assert words(flat).endswith("reached 50 in step 710 (head 0 of `layer`).")
    bent = np.append(grown(2.0, 10, 1.1, 39), 2.0 * 1.1**38)
    assert np.log(bent).argmax() == len(bent) - 2
    end, _ = expected_end(bent, bent.max() * 1.001, 17)
    assert end < FIRST_STEP + len(bent) - 1, "the line is there before the last step, although no logit was"
    assert "near step" not in words(bent, thresholds={"layer": bent.max() * 1.001})


def test_names_come_from_the_clips_and_from_the_paths_of_the_parameters() -> None:
    leaf = jax.ShapeDtypeStruct
    params = {
        "params": {"stack": {"attention": {"kernel": leaf((256, 2, 3), jnp.float32)}}},
        "long": {"a": {"kernel": leaf((257, 2, 3), jnp.float32)}},
        "flat": {"a": {"kernel": leaf((4, 3), jnp.float32)}},
        "alone": leaf((5, 2, 3), jnp.float32),
    }
    stack, known = ["params", "params/stack", "params/stack/attention", "stack", "stack/attention"], ["(root)"]
    known += [name + end for name in stack for end in ("", "[0]", "[255]")] + ["long", "long/a", "a", "flat", "flat/a"]
    unknown = ["attention", "stack/attention/kernel", "alone", "alone[0]", "stack[256]", "long/a[0]", "flat/a[0]"]
    clips = [(7.0, {"mine": np.ones((2, 3))}), (0.0, {"off": np.ones(2)}), (0.5, {"flat/a": np.ones(2)})]
    known += ["mine[0]", "mine[1]", "off"]
    unknown += ["mine", "mine[2]"]
    names = [*known, *unknown, "stack"]
    heads = [*[0] * (len(names) - 1), -1]
    log = logit_log(record(np.ones(len(names)), heads, [path_hash(name) for name in names]), clips, params)
    assert log == LogitLog((*known, *[""] * len(unknown), ""), {"mine[0]": 7.0, "mine[1]": 7.0, "flat/a": 0.5})
    assert logit_log(record([np.nan], [-1]), clips, params) is None
    assert logit_log(record([1.0], [0], [path_hash("mine[1]")]), clips, None) == log._replace(layers=("mine[1]",))


# Before the run, and of one step


@pytest.mark.parametrize(
    ("aux", "known"),
    [
        ({"blocks/0": jnp.ones(2)}, True),
        ({"blocks": jnp.ones((1, 2), jnp.bfloat16)}, True),
        ({"": jnp.ones(2)}, True),
        ({"block": jnp.ones(2)}, False),
        ({"blocks/0/query": jnp.ones(2)}, False),
        ({"blocks/0": jnp.ones(())}, False),
        ({"blocks/0": jnp.ones(2, jnp.int32)}, False),
        ({"blocks/0": [1.0, 2.0]}, False),
        ({"blocks": jnp.ones(2), 3: jnp.ones(2)}, False),
        ({}, False),
        ([jnp.ones(2)], False),
        (None, False),
    ],
    ids=str,
)
def test_a_dict_of_layers_is_known_by_its_keys_and_arrays(aux: Any, known: bool) -> None:
    params = {"blocks": [{"query": jnp.ones(3)}]}
    assert maxima_in("f", aux, params) is (aux if known else None)


def test_heads_are_listed_by_layer_in_their_order() -> None:
    got = layer_logits({"b": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "a": jnp.asarray([5.0])})
    assert got == (LayerLogits("a", (5.0,)), LayerLogits("b[0]", (1.0, 2.0)), LayerLogits("b[1]", (3.0, 4.0)))


def test_a_finding_begins_above_1000_and_the_first_nan_is_named() -> None:
    calm = LayerLogits("a", (3.0, 999.0))
    assert logit_finding(()) is None
    assert logit_finding((calm, LayerLogits("b", (1000.0, 7.0)))) is None
    text = logit_finding((LayerLogits("a", (1000.0, 1002.0)), LayerLogits("b", (7.0, 1234.6)), calm))
    assert text == (
        "The largest attention logit is 1235, that of head 1 of `b`; 2 of 6 heads have passed 1,000; trouble has begun "
        "at 1,000 to 10,000, in bfloat16 earlier. See `qk_clip`."
    )
    bad = (LayerLogits("a", (1e6, 2.0)), LayerLogits("b", (1.0, np.nan)), LayerLogits("c", (np.nan, 1.0)))
    assert logit_finding(bad) == "An attention logit is not finite: that of head 1 of `b`."
    assert np.isnan(largest_of(bad)[0])
    assert logit_finding((calm, LayerLogits("b", (np.inf,)))) == (
        "An attention logit is not finite: that of head 0 of `b`."
    )


def test_a_table_shows_eight_heads_and_the_largest_of_all() -> None:
    assert logit_table(()) == ""
    header, _, eight, nine, note = logit_table(
        (LayerLogits("a", (*[1.0] * 7, 2.0)), LayerLogits("b" * 50, (*[1.0] * 8, 1234.56)))
    ).splitlines()
    assert header.split() == ["attention", "layer", "largest", "logit", "head", "all", "heads"]
    assert eight.split() == ["a", "2", "7", *["1"] * 7, "2"]
    assert nine.split() == ["b" * 10 + "..." + "b" * 27, "1235", "8", *["1"] * 8, "..."]
    assert note == "(trouble has begun at 1,000 to 10,000, in bfloat16 earlier)"
