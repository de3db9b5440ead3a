"""The largest attention logits against float64 NumPy: every mask, three dtypes, in blocks and by log-sum-exp."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit

import optax_guard as og
from optax_guard.attention import _logits

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 11, 9, 4, 8
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(BATCH, QUERIES, HEADS, SIZE)).astype(np.float32)
KEY = RNG.normal(size=(BATCH, KEYS, HEADS, SIZE)).astype(np.float32)
MASK = RNG.random((BATCH, 1, QUERIES, KEYS)) < 0.3

CASES: dict[str, dict[str, Any]] = {
    "everything": {},
    "mask": {"mask": MASK},
    "mask per head": {"mask": RNG.random((1, HEADS, QUERIES, KEYS)) < 0.2},
    "mask of keys": {"mask": np.arange(KEYS)[None] < 3},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "symmetric window, causal": {"local_window_size": 3, "is_causal": True},
    "padding": {"query_seq_lengths": np.array([3, 11]), "key_value_seq_lengths": np.array([9, 2])},
    "scale": {"scale": 0.02},
    "all of them": {
        "mask": MASK,
        "is_causal": True,
        "local_window_size": (5, 5),
        "key_value_seq_lengths": np.array([7, 4]),
        "scale": 3.0,
    },
}


def logits_of(query: Any, key: Any, scale: float | None = None) -> np.ndarray:
    """[batch, heads, queries, keys] in float64."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return np.einsum("bthd,bshd->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)


def oracle(query: Any, key: Any, options: dict[str, Any]) -> np.ndarray:
    logits = logits_of(query, key, options.get("scale"))
    allowed = np.broadcast_to(options.get("mask", True), logits.shape).copy()
    for b, _, t, s in np.ndindex(logits.shape):
        left, right = np.broadcast_to(options.get("local_window_size", 99), 2)
        ok = not options.get("is_causal") or s <= t
        ok &= t - s <= left and s - t <= right
        ok &= "query_seq_lengths" not in options or t < options["query_seq_lengths"][b]
        ok &= "key_value_seq_lengths" not in options or s < options["key_value_seq_lengths"][b]
        allowed[b, :, t, s] &= ok
    return np.where(allowed, logits, -np.inf).max((0, 2, 3))


def as_jax_has_it(options: dict[str, Any]) -> dict[str, Any]:
    """Masks of rank 4 and lengths in int32."""
    options = {name: jnp.asarray(x, jnp.int32) if name.endswith("lengths") else x for name, x in options.items()}
    if "mask" in options:
        options["mask"] = jnp.asarray(options["mask"]).reshape(-1, *np.shape(options["mask"])[-3:])
    return options


@functools.cache
def found() -> dict[str, Any]:
    """All cases in one program: (maxima in blocks, (output, bound), JAX's output)."""

    def run(query: Any, key: Any) -> dict[str, Any]:
        return {
            name: (
                og.max_attention_logits(query, key, **case, block_size=4),
                og.attention_with_max_logits(query, key, key, **as_jax_has_it(case)),
                jax.nn.dot_product_attention(query, key, key, **as_jax_has_it(case)),
            )
            for name, case in CASES.items()
        }

    return quick_jit(run)(QUERY, KEY)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_exact_and_the_log_sum_exp_bounds_under_every_mask(name: str) -> None:
    exact, (maxima, (output, bound), expected) = oracle(QUERY, KEY, CASES[name]), found()[name]
    np.testing.assert_allclose(maxima, exact, rtol=2e-6)
    np.testing.assert_array_equal(output, expected)
    above = np.asarray(bound, np.float64) - exact
    assert np.all(above >= -1e-6)
    assert np.all(above <= (np.log(KEYS) if _logits._RETURNS_LSE else 0) + 1e-5)


@pytest.mark.parametrize(("dtype", "groups"), [(jnp.float32, 1), (jnp.bfloat16, 2), (jnp.float16, 1)])
def test_three_dtypes_at_logits_of_ten_thousand_and_grouped_queries(dtype: Any, groups: int) -> None:
    query, key = jnp.asarray(QUERY * 70, dtype), jnp.asarray(KEY[:, :, :groups] * 70, dtype)
    logits = logits_of(query, key)
    exact = logits.max((0, 2, 3))
    assert np.all(exact > 7e3)
    maxima = quick_jit(functools.partial(og.max_attention_logits, block_size=6))(query, key)
    np.testing.assert_allclose(maxima, exact, rtol=2e-6)
    assert maxima.dtype == jnp.float32
    lse = logits.max(-1) + np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    above = np.asarray(og.max_attention_logits_from_lse(jnp.asarray(lse.swapaxes(1, 2), dtype)), np.float64) - exact
    assert np.all(above >= 0)
    assert np.all(above <= np.log(KEYS) + float(jnp.finfo(dtype).eps) * (exact + np.log(KEYS)))


@pytest.mark.usefixtures("standard_promotion")  # JAX's own attention needs it in 16 bits
def test_attention_in_bfloat16_with_grouped_queries() -> None:
    query, key = jnp.asarray(QUERY * 70, jnp.bfloat16), jnp.asarray(KEY[:, :, :2] * 70, jnp.bfloat16)

    @quick_jit
    def run(query: Any, key: Any) -> Any:
        ways = [og.attention_with_max_logits(query, key, key, exact=exact) for exact in (True, False)]
        return ways, jax.nn.dot_product_attention(query, key, key)

    ((output, exact), (again, bound)), expected = run(query, key)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(again, expected)
    truth = logits_of(query, key).max((0, 2, 3))
    np.testing.assert_allclose(exact, truth, rtol=2e-6)
    assert np.all(bound >= truth * (1 - 2e-6))
    assert np.all(bound <= truth * (1 + 2**-7) + np.log(KEYS))


def test_a_rounded_log_sum_exp_is_never_below_the_largest_logit() -> None:
    exact = jnp.linspace(1.0, 2.0, 1000, dtype=jnp.float32) * 100
    for dtype in (jnp.bfloat16, jnp.float16):
        bounds = jax.vmap(og.max_attention_logits_from_lse)(exact.astype(dtype)[:, None, None])[:, 0]
        assert jnp.any(exact.astype(dtype).astype(jnp.float32) < exact)
        assert jnp.all(bounds >= exact)
        assert jnp.all(bounds <= exact * (1 + float(jnp.finfo(dtype).eps)))


def test_rows_that_attend_to_nothing_do_not_count() -> None:
    lse = jnp.array([[3.0, 1.0], [jnp.inf, jnp.inf]])
    np.testing.assert_allclose(
        og.max_attention_logits_from_lse(lse, where=np.array([[True], [False]])), [3, 1], rtol=1e-6
    )


def test_soft_caps_and_biases_do_not_belong_to_a_logit() -> None:
    query, key, value = jnp.asarray(QUERY), jnp.asarray(KEY), jnp.asarray(KEY)
    bias = jnp.full((1, 1, QUERIES, KEYS), 1e3)
    output, maxima = og.attention_with_max_logits(query, key, value, bias)
    np.testing.assert_allclose(maxima, oracle(QUERY, KEY, {}), rtol=2e-6)
    np.testing.assert_array_equal(output, jax.nn.dot_product_attention(query, key, value, bias))
    uncapped = og.max_attention_logits(100 * query, key)
    capped = (30 * np.tanh(logits_of(100 * QUERY, KEY) / 30)).max((0, 2, 3))
    np.testing.assert_allclose(30 * np.tanh(np.asarray(uncapped, np.float64) / 30), capped, rtol=2e-6)
    assert np.all(uncapped > 100)


def test_leading_axes_and_single_sequences() -> None:
    query, key = jnp.asarray(QUERY), jnp.asarray(KEY)

    @quick_jit
    def run(query: Any, key: Any) -> Any:
        whole = og.max_attention_logits(query, key, mask=MASK)
        deeper = og.max_attention_logits(query[:, None], key[:, None], mask=MASK[:, None], block_size=5)
        alone = [og.max_attention_logits(query[b], key[b], mask=MASK[b]) for b in range(BATCH)]
        _, exact = og.attention_with_max_logits(query[0], key[0], key[0], None, MASK[:1], exact=True)
        return whole, deeper, alone, exact

    maxima, deeper, alone, exact = run(query, key)
    np.testing.assert_allclose(deeper, maxima, rtol=1e-6)
    np.testing.assert_allclose(np.maximum(*alone), maxima, rtol=1e-6)
    np.testing.assert_allclose(exact, alone[0], rtol=1e-6)


def test_heads_that_see_nothing_and_queries_that_are_not_finite() -> None:
    assert np.all(np.isneginf(og.max_attention_logits(QUERY, KEY, key_value_seq_lengths=np.zeros(BATCH, int))))
    spoilt = QUERY.copy()
    spoilt[1, -1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(og.max_attention_logits(spoilt, KEY, block_size=4)), np.arange(HEADS) == 2)
    hidden = og.max_attention_logits(spoilt, KEY, query_seq_lengths=np.array([QUERIES, QUERIES - 1]), block_size=4)
    assert np.all(np.isfinite(hidden))


def temporaries(length: int) -> int:
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.bfloat16)
    program = jax.jit(lambda q, k: og.max_attention_logits(q, k, block_size=32)).lower(shape, shape)
    return program.compile().memory_analysis().temp_size_in_bytes


def test_temporaries_do_not_grow_with_the_square_of_the_length() -> None:
    short, long = (temporaries(length) for length in (128, 1024))
    assert long < 1024 * 1024 * 2 * 4 / 16  # a sixteenth of all logits in float32
    assert long - short <= 12 * (1024 - 128) * 2 * 8  # linear: copies of queries and keys


def test_blocks_that_nothing_may_see_are_not_computed() -> None:
    def blocks(**options: Any) -> int:
        visible = _logits._Visible(None, None, None, options.get("is_causal", False), options.get("window"))
        return len(_logits._corners(1024, 1024, 64, 64, visible))

    assert blocks() == 256
    assert blocks(is_causal=True) == 136
    assert blocks(is_causal=True, window=(64, 64)) == 16 + 15
    assert blocks(window=(0, 0)) == 16


def test_gradients_are_those_without_maxima() -> None:
    def loss(query: Any, key: Any, exact: bool) -> tuple[jax.Array, Any]:
        output, maxima = og.attention_with_max_logits(query, key, key, exact=exact)
        return jnp.sum(output**2) + jnp.sum(maxima), maxima

    def plain(query: Any, key: Any) -> jax.Array:
        return jnp.sum(jax.nn.dot_product_attention(query, key, key) ** 2)

    def all_grads(query: Any, key: Any) -> Any:
        return [jax.grad(loss, (0, 1), has_aux=True)(query, key, exact)[0] for exact in (True, False)], jax.grad(
            plain, (0, 1)
        )(query, key)

    (exact, bound), expected = quick_jit(all_grads)(QUERY, KEY)
    for grads in (exact, bound):
        jax.tree.map(np.testing.assert_array_equal, grads, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": KEY[:, :, :3]}, "heads a multiple of key heads"),
        ({"key": KEY[:1]}, "`query` and `key` must be"),
        ({"key": KEY[..., :4]}, "`query` and `key` must be"),
        ({"query": QUERY[0, 0]}, "`query` must be floating numbers"),
        ({"query": QUERY[:, :0]}, "no empty axis"),
        ({"query": QUERY.astype(np.int32)}, "`query` must be floating numbers"),
        ({"query": QUERY.astype(np.float16)}, "floating numbers of one dtype"),
        ({"mask": np.ones((BATCH, 1, QUERIES, KEYS))}, "`mask` must be booleans"),
        ({"mask": np.ones((3, 1, QUERIES, KEYS), bool)}, "`mask` must be booleans"),
        ({"key_value_seq_lengths": np.array([3])}, "`key_value_seq_lengths` must be whole numbers"),
        ({"query_seq_lengths": np.array([3.0, 2.0])}, "`query_seq_lengths` must be whole numbers"),
        ({"local_window_size": -1}, "`local_window_size` must be"),
        ({"local_window_size": (1, 2, 3)}, "`local_window_size` must be"),
        ({"scale": np.ones(HEADS)}, "`scale` must be a number"),
        ({"block_size": 0}, "`block_size` must be"),
        ({"is_causal": 1}, "`is_causal` must be"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(change: dict[str, Any], message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, **change}
    with pytest.raises(ValueError, match=message):
        og.max_attention_logits(arguments.pop("query"), arguments.pop("key"), **arguments)


@pytest.mark.parametrize("lse", [jnp.ones(3), jnp.ones((3, 2), jnp.int32)])
def test_a_log_sum_exp_without_rows_and_heads_is_refused(lse: jax.Array) -> None:
    with pytest.raises(ValueError, match="`lse` must be floating numbers"):
        og.max_attention_logits_from_lse(lse)


def test_collecting_finds_records_and_nothing_else() -> None:
    first, second = jnp.array([3.0, 7.0]), jnp.array([4.0, 1.0])
    sown = {
        "intermediates": {
            "blocks_0": {"attention": {"max_logits": (first, second), "attention_weights": (jnp.ones(5),)}},
            "blocks_1": {"feed_forward": {"activations": (jnp.ones(5),)}},
            "scanned": {"max_logits": (jnp.ones((6, 2)),)},
        }
    }
    collected = og.collect_max_logits(sown)
    assert collected.keys() == {"blocks_0/attention", "scanned"}
    np.testing.assert_array_equal(collected["blocks_0/attention"], [4, 7])
    assert collected["scanned"].shape == (6, 2)
    nested = {"encoder": [{"attention": {"max_logits": first}}, {}], "loss": jnp.ones(())}
    assert og.collect_max_logits(nested).keys() == {"encoder/0/attention"}
    with pytest.raises(ValueError, match=r"it has loss\..*sow_weights=True"):
        og.collect_max_logits({"loss": jnp.ones(())})
    with pytest.raises(ValueError, match="it has nothing"):
        og.collect_max_logits({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": QUERY[None]}, "`query` must be .*Reshape the leading axes"),
        ({"value": KEY[:, :-1]}, "`value` must have the shape and dtype of `key`"),
        ({"value": KEY.astype(np.float16)}, "`value` must have the shape and dtype of `key`"),
        ({"bias": np.ones((3, 1, QUERIES, KEYS), np.float32)}, "`bias` must be floating numbers that broadcast"),
        ({"bias": np.ones((QUERIES, KEYS), int)}, "`bias` must be floating numbers that broadcast"),
        ({"mask": np.ones((QUERIES, KEYS + 1), bool)}, "`mask` must be booleans"),
        ({"query_seq_lengths": np.array([3])}, "`query_seq_lengths` must be whole numbers"),
        ({"implementation": "gpu"}, "`implementation` must be one of"),
    ],
)
def test_bad_input_of_the_fused_attention_is_refused_before_jax_sees_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^attention_with_max_logits: {message}"):
        og.attention_with_max_logits(**{"query": QUERY, "key": KEY, "value": KEY, **change})


def test_rows_that_do_not_broadcast_to_the_log_sum_exp_are_refused() -> None:
    for where in (np.ones((4, 1), bool), np.ones((3, 1))):
        with pytest.raises(
            ValueError, match=r"^max_attention_logits_from_lse: `where` must be booleans that broadcast"
        ):
            og.max_attention_logits_from_lse(jnp.ones((3, 2)), where=where)
