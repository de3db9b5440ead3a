"""What the docstrings promise of edge cases, tried: special numbers, every dtype, every elementwise function."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from helpers import bits

import optax_guard as og

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


# The norm of a tree

NORM = quick_jit(og.global_norm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_the_norm_is_exact_from_the_smallest_normal_number_to_the_largest(dtype: str) -> None:
    info = jnp.finfo(dtype)
    smallest, largest = float(info.smallest_normal), float(info.max)
    sizes = [smallest, 1.1 * smallest, 2 * smallest, 1e-37, 1e-30, 1e-19, 1e-6, 1.0, 1e4, 1.9e19, 1e30, largest / 4]
    sizes = sorted({size for size in sizes if smallest <= size <= largest / 4})
    if dtype == "float16":
        sizes = [6e-8, 1e-6, *sizes]  # its subnormals are normal numbers in float32
    with enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        for size in sizes:
            for other in (0.0, smallest, size, largest / 4):
                leaves = np.array([size, -size, 0]).astype(dtype), np.array([other, other]).astype(dtype)
                expected = np.abs(np.concatenate(leaves).astype(np.complex128))
                top = expected.max()
                expected = top * np.sqrt(np.sum((expected / top) ** 2))
                got = float(NORM([jnp.asarray(leaf) for leaf in leaves]))
                np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_norm_of_subnormal_numbers_is_theirs_or_zero_and_never_nan(dtype: str) -> None:
    size = float(jnp.finfo(dtype).smallest_normal) / 4
    with enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        for leaf in (np.array([size, 0]), np.array([size, size]), np.array([-size])):
            got = float(NORM([jnp.asarray(leaf.astype(dtype)), jnp.zeros(2, dtype)]))
            assert got == 0 or got == pytest.approx(np.linalg.norm(leaf), rel=1e-6)
        beside = float(NORM([jnp.asarray(np.array([size]).astype(dtype)), jnp.asarray(np.array([3.0, 4.0], dtype))]))
        assert beside == pytest.approx(5.0)


# Elementwise transformations

REAL = ("float16", "bfloat16", "float32")
T = 0.5  # every bound, strength and threshold


def specials(dtype: str) -> np.ndarray:
    """Zeros, a subnormal, the ends of the range, Inf, NaN and ordinary numbers; of complex ones all pairs."""
    info = jnp.finfo(dtype)
    tiny, largest = float(info.smallest_normal), float(info.max)
    numbers = [0.0, -0.0, tiny / 2, tiny, 1.0, -0.25, -2.0, largest, -largest, np.inf, -np.inf, np.nan]
    if dtype != "complex64":
        return np.array(numbers).astype(jnp.dtype(dtype))
    pairs = np.array([[complex(re, im) for im in numbers] for re in numbers], np.complex128)
    pairs.real, pairs.imag = np.meshgrid(numbers, numbers, indexing="ij")
    return pairs.ravel().astype(np.complex64)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def direction(x: np.ndarray) -> np.ndarray:
    """x / |x| from the angle, which is right for infinite parts."""
    if not np.iscomplexobj(x):
        return np.sign(x)
    angle = np.arctan2(x.imag, x.real)
    unit = np.where(x == 0, 0, np.cos(angle) + 1j * np.sin(angle))
    return np.where(np.isnan(x), complex(np.nan, np.nan), unit)


def times(factor: float, x: np.ndarray) -> np.ndarray:
    """Part by part: NumPy's complex product makes NaN of Inf times 0."""
    if not np.iscomplexobj(x):
        return factor * x
    product = x.copy()
    product.real, product.imag = factor * x.real, factor * x.imag
    return product


def clipped(bound: float) -> Any:
    def expected(g: np.ndarray, w: np.ndarray, largest: float) -> np.ndarray:
        limit = min(bound, largest) if np.isfinite(bound) else bound
        return np.where(np.abs(g) > limit, direction(g) * (limit if np.isfinite(limit) else 1), g)

    return expected


def pulled(force: Any) -> Any:
    return lambda g, w, _: g + force(w)


def shrunk(kind: str) -> Any:
    def expected(g: np.ndarray, w: np.ndarray, largest: float) -> np.ndarray:
        size = np.abs(g)
        less = np.minimum(T, size) if kind == "soft" else T * size / np.where(size > 0, size + T, 1)
        return np.where(np.isfinite(size), g - direction(g) * less, g)

    return expected


def unchanged(g: np.ndarray, w: np.ndarray, largest: float) -> np.ndarray:
    return g


def huber(w: np.ndarray) -> np.ndarray:
    finite = np.where(np.isinf(w), 0, w)
    return T * np.where(np.isinf(w), direction(w), finite / np.sqrt(1 + np.abs(finite) ** 2))


# What must come out, of the gradient g and the weight w in float64; "unchanged" is meant bit for bit.
ELEMENTWISE: dict[str, tuple[optax.GradientTransformation, Any]] = {
    "clip_by_value": (og.clip_by_value(T), clipped(T)),
    "clip_by_value, 1e5": (og.clip_by_value(1e5), clipped(1e5)),
    "clip_by_value, Inf": (og.clip_by_value(np.inf), unchanged),
    "clip_by_value, zero": (og.clip_by_value(0.0), clipped(0.0)),
    "l1_penalty": (og.l1_penalty(T), pulled(lambda w: times(T, direction(w)))),
    "l1_penalty, zero": (og.l1_penalty(0.0), unchanged),
    "dense_penalty": (og.dense_penalty(T), pulled(lambda w: times(T, w))),
    "dense_penalty, zero": (og.dense_penalty(0.0), unchanged),
    "dense_penalty, pseudo_huber": (og.dense_penalty(T, "pseudo_huber"), pulled(huber)),
    "dense_penalty, pseudo_huber, zero": (og.dense_penalty(0.0, "pseudo_huber"), unchanged),
    "elastic_net_penalty": (og.elastic_net_penalty(T, T), pulled(lambda w: times(T, direction(w)) + times(T, w))),
    "elastic_net_penalty, l1": (og.elastic_net_penalty(T, 0.0), pulled(lambda w: times(T, direction(w)))),
    "elastic_net_penalty, zero": (og.elastic_net_penalty(0.0, 0.0), unchanged),
    "shrink_gradients": (og.shrink_gradients(T), shrunk("soft")),
    "shrink_gradients, dense": (og.shrink_gradients(T, "dense"), shrunk("dense")),
    "shrink_gradients, zero": (og.shrink_gradients(0.0), unchanged),
    "noise_injection, zero": (og.noise_injection(0.0), unchanged),
    "anticorrelated_noise, zero": (og.anticorrelated_noise(0.0), unchanged),
    "langevin_noise, zero": (og.langevin_noise(0.0), unchanged),
    "langevin_noise, both negative": (og.langevin_noise(np.float32(0.0) * jnp.ones(()), -jnp.ones(())), unchanged),
}


@quick_jit
def all_of_them(g: jax.Array, w: jax.Array) -> dict[str, Any]:
    return {name: tx.update(g, tx.init(w), w)[0] for name, (tx, _) in ELEMENTWISE.items()}


def assert_equal_to_rounding(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """NaN where NaN is expected, Inf where Inf; a number to a few roundings, and a subnormal may be 0."""
    info = jnp.finfo(dtype)
    expected = wide(expected.astype(jnp.dtype(dtype)))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    known = ~np.isnan(expected)
    for part in (np.real, np.imag):
        a, b = part(got)[known], part(expected)[known]
        np.testing.assert_array_equal(np.where(np.isinf(b), a, 0), np.where(np.isinf(b), b, 0))
        rest = np.isfinite(b)
        size = np.abs(np.where(np.isfinite(expected[known][rest]), expected[known][rest], b[rest]))
        slack = 8 * float(info.eps) * size + 1e-15 * np.iscomplexobj(got) + float(info.smallest_normal)
        assert np.all(np.abs(a[rest] - b[rest]) <= slack)


@pytest.mark.parametrize("dtype", [*REAL, "complex64"])
def test_special_numbers_come_out_of_every_elementwise_transformation_as_its_table_says(dtype: str) -> None:
    values = specials(dtype)
    weights = values[np.abs(wide(values)) != float(jnp.finfo(dtype).smallest_normal) / 2][:: len(values) // 12]
    g, w = (np.ascontiguousarray(part) for part in np.broadcast_arrays(values[:, None], weights[None, :]))
    with np.errstate(all="ignore"):
        for name, got in all_of_them(jnp.asarray(g), jnp.asarray(w)).items():
            got, expected = np.asarray(got), ELEMENTWISE[name][1]
            assert got.dtype == g.dtype, name
            if expected is unchanged:
                assert got.tobytes() == g.tobytes(), name
                continue
            try:
                assert_equal_to_rounding(wide(got), expected(wide(g), wide(w), float(jnp.finfo(dtype).max)), dtype)
            except AssertionError as error:
                error.add_note(f"{name}, {dtype}")
                raise
            if "penalty" in name:  # where nothing pulls, not a bit changes
                still = np.broadcast_to(w == 0, g.shape)
                assert got[still].tobytes() == g[still].tobytes(), name


@pytest.mark.parametrize("make", [og.clip_by_global_norm, og.clip_by_leaf_norm, og.adaptive_grad_clip])
def test_a_norm_beyond_the_largest_number_is_clipped_to_the_bound_also_where_xla_fuses_divisions(make: Any) -> None:
    tx, grads = make(1e38), jnp.full(4, 3e38)  # the norm is 6e38
    params = jnp.full(4, 0.5)
    got = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])(grads, params)
    np.testing.assert_allclose(got, 0.5e38, rtol=1e-6)


def test_a_unit_with_a_number_that_is_not_finite_is_nan_and_no_other_is() -> None:
    tx, params = og.adaptive_grad_clip(0.1), jnp.ones((2, 4))
    for dtype in (*REAL, "complex64"):
        grads = jnp.array([[np.inf, np.nan, 1, 1e-3], [1, 1, 2, 0]]).astype(dtype)
        got = np.asarray(quick_jit(lambda g, w: tx.update(g, tx.init(w), w)[0])(grads, params.astype(dtype)))
        assert np.isnan(got.astype(np.complex64)[:, :2]).all()
        np.testing.assert_allclose(
            np.abs(got.astype(np.complex64)[:, 2]), 0.1 * np.sqrt(2) * np.array([1, 2]) / np.sqrt(5), rtol=1e-2
        )
        assert got[:, 3].tobytes() == np.asarray(grads)[:, 3].tobytes()


def test_no_element_shrinks_by_more_than_the_threshold_and_a_rounding() -> None:
    grads = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 10.0 ** np.arange(-3, 5).repeat(500)
    for kind, units in (("soft", 0.5), ("dense", 2.0)):
        for dtype in REAL:
            g = jnp.asarray(grads.astype(np.float32)).astype(dtype)
            tx = og.shrink_gradients(0.1, kind)
            got, before = (np.asarray(x).astype(np.float64) for x in (tx.update(g, tx.init(g))[0], g))
            finite = np.isfinite(before)
            unit = float(jnp.finfo(dtype).eps) * np.maximum(np.abs(got), 1e-30)
            assert np.all((np.abs(before - got) <= np.float32(0.1) + units * unit)[finite])
            assert np.all((np.abs(got) <= np.abs(before))[finite] & (np.sign(got) * np.sign(before) >= 0)[finite])


def test_a_schedule_that_gives_nan_is_seen_at_the_first_step() -> None:
    def all_of_them(nan: jax.Array) -> list[Any]:
        ones = jnp.ones((2, 2))
        return [tx.update(ones, tx.init(ones), ones)[0] for tx in scheduled(nan)]

    for got in quick_jit(all_of_them)(jnp.asarray(np.nan)):
        assert np.isnan(np.asarray(got)).all()


def scheduled(nan: jax.Array) -> tuple[optax.GradientTransformation, ...]:
    return (
        og.noise_injection(0.01, nan),
        og.noise_injection(nan),
        og.noise_injection(0.01, max_norm=nan),
        og.anticorrelated_noise(nan),
        og.langevin_noise(nan),
        og.langevin_noise(0.1, nan),
        og.clip_by_value(nan),
        og.shrink_gradients(nan),
        og.l1_penalty(nan),
        og.dense_penalty(nan),
        og.limit_step(nan),
        og.adaptive_grad_clip(nan),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_noise_on_the_largest_numbers_stays_finite_and_an_inf_stays_inf(dtype: str) -> None:
    largest = float(jnp.finfo(dtype).max)
    grads = jnp.array([largest, -largest] * 50 + [np.inf, -np.inf]).astype(dtype)
    for tx in (og.noise_injection(min(largest, 1e30)), og.anticorrelated_noise(largest / 1e3), og.langevin_noise(1e4)):
        got = np.asarray(tx.update(grads, tx.init(grads))[0]).astype(np.float64)
        assert np.isfinite(got[:-2]).all()
        assert got[-2:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("inner", [optax.adam(0.01), optax.sgd(0.1, momentum=0.9)], ids=["adam", "momentum"])
def test_cycles_of_one_give_the_updates_of_the_inner_optimizer_bit_for_bit(
    inner: optax.GradientTransformation, standard_promotion: None
) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 32)).astype(np.float32))}
    stepped = []
    for tx in (inner, og.accumulate(inner, 1), og.accumulate(og.guard(inner), 1)):
        rng, state, update = np.random.default_rng(1), tx.init(params), jax.jit(tx.update)
        updates = []
        for _ in range(3):
            grads = {"w": jnp.asarray(rng.normal(size=(64, 32)).astype(np.float32))}
            moved, state = update(grads, state, params)
            updates.append(np.asarray(moved["w"]).tobytes())
        stepped.append(updates)
    assert stepped[0] == stepped[1] == stepped[2]


# Bursts


def test_seven_spikes_hardly_raise_the_limit_on_updates_of_a_full_window() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 0.1, 200)).astype(np.float32)
    tx, burst = og.clip_by_update_norm(), np.full(7, 1e15, np.float32)

    @quick_jit
    def passed(norms: jax.Array) -> jax.Array:
        state = tx.init(norms[:1])
        return jax.lax.scan(lambda s, x: tx.update(x[None], s)[::-1], state, norms)[1][:, 0]

    limits = np.asarray(passed(jnp.asarray(np.concatenate([norms, burst]))))[-7:]
    assert limits[-1] <= 1.02 * limits[0]
    assert limits[0] < 3


def test_what_stable_spam_passes_on_has_a_norm_of_at_most_its_stated_bound() -> None:
    """The worst history by Cauchy-Schwarz, norms that fall as (gamma1 / gamma2)^age; a burst; a rise."""
    tx = og.stable_spam(optax.identity(), restart_every=None)

    @quick_jit
    def sizes(norms: jax.Array) -> jax.Array:
        def step(state: Any, norm: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = tx.update(jnp.full(4, norm / 2), state)
            return state, og.global_norm(updates)

        return jax.lax.scan(step, tx.init(jnp.zeros(4)), norms)[1]

    bound = 0.3 / np.sqrt(0.1 * (1 - 0.49 / 0.9))
    silence = np.full(200, 1e-6)
    for history in ((0.7 / 0.9) ** np.arange(30.0)[::-1], np.full(30, 1.0), np.geomspace(1e-3, 1.0, 30)):
        got = np.asarray(sizes(jnp.asarray(np.concatenate([silence, history]).astype(np.float32))))
        assert got.max() <= bound * 1.0001
    assert bound == pytest.approx(1.405, abs=1e-3)


# Rules that judge by history

HISTORY = {
    "clip_by_norm_history": og.clip_by_norm_history(),
    "clip_by_norm_history, leaf": og.clip_by_norm_history(scope="leaf"),
    "clip_by_median_norm": og.clip_by_median_norm(window=12),
    "clip_by_median_norm, leaf": og.clip_by_median_norm(window=12, scope="leaf"),
    "zclip": og.zclip(),
    "zclip, mean": og.zclip(mode="mean"),
    "zclip, percentile": og.zclip(mode="percentile"),
    "published.zclip": og.published.zclip(warmup=2),
    "autoclip": og.autoclip(window=12),
    "published.autoclip": og.published.autoclip(window=12),
    "adagc": og.adagc(),
    "adagc, tree": og.adagc(scope="tree"),
    "published.adagc": og.published.adagc(warmup=2),
    "skip_spikes": og.skip_spikes(on="norm", window=8),
    "published.skip_spikes": og.published.skip_spikes(on="norm", window=8),
}
LEAF = [name for name in HISTORY if "leaf" in name or name in ("adagc", "published.adagc")]


@quick_jit
def after_histories(history: jax.Array, last: Any) -> dict[str, Any]:
    """Of every rule: the states before and after the last gradient, and what became of it, after a history of it."""

    def one(rule: og.Rule) -> Any:
        def step(state: Any, norm: jax.Array) -> tuple[Any, jax.Array]:
            grads = [jnp.full(4, norm / 2), jnp.full(1, norm)]
            updates, state = rule.update(grads, state)
            return state, jnp.stack([updates[0][0] * 2, updates[1][0]])

        before, passed = jax.lax.scan(step, rule.init([jnp.zeros(4), jnp.zeros(1)]), history)
        got, after = rule.update(last, before)
        return before, got, after, passed

    return {name: one(rule) for name, rule in HISTORY.items()}


def after(history: Any, first: Any, second: Any) -> dict[str, Any]:
    leaves = [np.asarray(leaf, np.float32) for leaf in (history, first, second)]
    return after_histories(jnp.asarray(leaves[0]), [jnp.asarray(leaf) for leaf in leaves[1:]])


def all_are_finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


NOISE = np.exp(np.random.default_rng(0).normal(0, 0.1, 40)).astype(np.float32)


@pytest.mark.parametrize("history", [NOISE, 0 * NOISE], ids=["noise", "zeros"])
def test_zeros_and_steps_that_are_not_finite_are_no_history(history: np.ndarray) -> None:
    for name, (before, got, new, _) in after(history, [0.0, -0.0, 0, 0], [-0.0]).items():
        assert bits(got) == bits([np.float32([0.0, -0.0, 0, 0]), np.float32([-0.0])]), name
        if name != "published.skip_spikes":  # remembers what was, as published
            assert bits(new) == bits(before), name
    for leaves in (([np.nan, 1, 1, 1], [1.0]), ([1, 1, 1, 1], [-np.inf]), ([0, 0, 0, 0], [np.nan])):
        for name, (before, got, new, _) in after(history, *leaves).items():
            assert not any(np.asarray(leaf).any() for leaf in got), name
            assert all_are_finite(new), name
            if name != "published.skip_spikes":
                assert bits(new) == bits(before), name


def test_a_zero_leaf_is_no_history_of_that_leaf() -> None:
    for name, (before, _, new, _) in after(NOISE, [0.5] * 4, [0.0]).items():
        if name in LEAF:
            same = [
                [bits(old[leaf]) == bits(now[leaf]) for old, now in zip(before, new, strict=True)] for leaf in (0, 1)
            ]
            assert all(same[1]), name
            assert not all(same[0]), name


@pytest.mark.parametrize("size", [1e-37, 3e-7, 0.5, 3.0, 1e15, 3e18, 1e19, 1e37])
def test_constant_norms_are_never_touched(size: float) -> None:
    bare = np.stack([np.full(40, np.float32(np.float32(size) / 2) * 2), np.full(40, np.float32(size))], 1)
    for name, (_, _, new, passed) in after(np.full(40, size), [size / 2] * 4, [size]).items():
        assert all_are_finite(new), name
        norm = np.sqrt(2) * size
        if name == "published.autoclip":
            np.testing.assert_allclose(passed, bare * (norm / (norm + 1e-6)), rtol=1e-5, atol=2e-38)
        elif name in ("published.zclip", "published.adagc") and norm > 1:
            assert np.all(np.abs(passed) < bare), name  # the authors' fixed bound
            np.testing.assert_allclose(np.linalg.norm(np.asarray(passed)[:2], axis=1), 1.0, rtol=1e-5)  # the warm-up
        else:
            np.testing.assert_array_equal(passed, bare, err_msg=name)


@pytest.mark.parametrize("unit", [1.0, 1e-30])
def test_a_spike_of_any_size_passes_as_what_the_history_allows(unit: float) -> None:
    for size in (1e3, 1e15, 1e20, 1e30, 3e38):
        for name, (before, got, new, _) in after(NOISE * np.float32(unit), [size / 2] * 4, [size]).items():
            assert all_are_finite((got, new)), name
            norms = [float(np.linalg.norm(np.asarray(leaf, np.float64))) for leaf in got]
            if name == "clip_by_norm_history":
                assert np.hypot(norms[0], norms[1]) <= np.exp(float(before.log_threshold)) * (1 + 1e-5) + 1e-38
            if size / unit > 1e60 and name.startswith("clip_by_norm_history"):
                assert norms == [0.0, 0.0]  # the factor is below the smallest number
            if name != "published.zclip" or unit == 1:  # there 1e-6 is added to a deviation of 1e-31
                assert max(norms) <= 30 * unit, name


@quick_jit
def median_passes(norms: jax.Array) -> jax.Array:
    rule = og.clip_by_median_norm()
    return jax.lax.scan(lambda s, x: rule.update(x[None], s)[::-1], rule.init(norms[:1]), norms)[1][:, 0]


@quick_jit
def history_passes(norms: jax.Array) -> jax.Array:
    rule = og.clip_by_norm_history()
    return jax.lax.scan(lambda s, x: rule.update(x[None], s)[::-1], rule.init(norms[:1]), norms)[1][:, 0]


@pytest.mark.parametrize(("spikes", "usual"), [(1, 1), (5, 1), (6, 6), (8, 8)])
def test_spikes_at_the_start_are_forgotten_by_the_median(spikes: int, usual: int) -> None:
    norms = np.ones(40, np.float32)
    norms[:spikes], norms[spikes + usual] = 1e4, 1e4
    assert float(median_passes(jnp.asarray(norms))[spikes + usual]) == pytest.approx(8.0, rel=1e-4)
    if usual > 1:
        norms[spikes + 1] = 1e4
        assert float(median_passes(jnp.asarray(norms))[spikes + 1]) > 100


def test_how_long_a_first_norm_that_was_too_low_holds_steps_back() -> None:
    touched: dict[Any, list[int]] = {}
    for seed in range(24):
        norms = np.exp(np.random.default_rng(seed).normal(0, (0.1, 0.3, 0.5, 0.7)[seed % 4], 120)).astype(np.float32)
        for low in (1e-2, 1e-4):
            norms[0] = low
            for name, passes in (("median", median_passes), ("history", history_passes)):
                less = np.asarray(passes(jnp.asarray(norms))) < 0.999 * norms
                free = next(i for i in range(1, 110) if not less[i : i + 3].any())
                touched.setdefault((name, low), []).append(free - 1)
    assert {case: np.median(steps) for case, steps in touched.items()} == {
        ("median", 1e-2): pytest.approx(6, abs=1),
        ("median", 1e-4): pytest.approx(6, abs=1),
        ("history", 1e-2): pytest.approx(9, abs=1),
        ("history", 1e-4): pytest.approx(68, abs=2),
    }
    most = {("median", 1e-2): 9, ("median", 1e-4): 9, ("history", 1e-2): 13, ("history", 1e-4): 75}
    assert all(max(steps) <= most[case] for case, steps in touched.items())


# Recovery


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_back_off_alone_answers_a_bad_update_and_a_bad_loss_alike(bad: float) -> None:
    tx, zeros = og.back_off(recover_after=2, diverged=2.0), jnp.array([0.0, -0.0])
    whole = jnp.array([1.0, -0.0])
    for update, extra in ((whole.at[0].set(bad), {}), (whole, {"value": jnp.float32(bad)})):
        state = tx.init(whole)
        assert bits(tx.update(whole, state)[0]) == bits(whole)
        got, state = tx.update(update, state, **extra)
        assert not got.any()
        assert (float(state.update_scale), int(state.back_off_total)) == (0.5, 1)
        assert bits(tx.update(zeros, state)[0]) == bits(zeros)
        for _ in range(2):
            got, state = tx.update(whole, state)
            assert 0.5 <= float(got[0]) < 1
        assert bits(tx.update(whole, state)[0]) == bits(whole)
    assert tx.update((), tx.init(()))[0] == ()


def test_back_off_owes_no_more_steps_than_can_be_counted() -> None:
    for wrong in ({"recover_after": 2**31 - 1}, {"factor": 1 - 1e-7}, {"recover_after": 2**20, "factor": 0.9999}):
        with pytest.raises(ValueError, match=r"back_off: `recover_after` .* more than an int32 can count"):
            og.back_off(**wrong)
    for most in ({"recover_after": 2**28}, {"factor": 1 - 1e-5}, {"factor": 1e-30}, {"lowest": 1e-30}):
        tx = og.back_off(**most)
        state = tx.init(jnp.zeros(1))
        for _ in range(12):
            _, state = tx.update(jnp.full(1, np.nan), state)
        assert state.healthy_steps_owed > 0
        assert most.get("lowest", 0.01) <= float(state.update_scale) * (1 + 1e-6)


LADDER_TX = og.guard(
    optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.5),
    og.skip_large(2.0),
    recovery=(og.reset_moments(after=2), og.back_off(0.5, recover_after=4, after=3), og.rewind(every=1, after=4)),
    patience=100,
    recorder_rows=32,
)


@quick_jit
def climbed(sizes: jax.Array, losses: jax.Array) -> Any:
    def step(carry: Any, given: Any) -> Any:
        params, state = carry
        new, after_it = og.apply_gradients(LADDER_TX, jnp.full(1, given[0]), state, params, value=given[1])
        return (new, after_it), (new, og.metrics(after_it))

    return jax.lax.scan(step, (jnp.ones(1), LADDER_TX.init(jnp.ones(1))), (sizes, losses))[::-1]


def climb(sizes: list[float], losses: list[float]) -> Any:
    (params, numbers), (_, state) = climbed(jnp.asarray(sizes, jnp.float32), jnp.asarray(losses, jnp.float32))
    return np.asarray(params)[:, 0], {name: np.asarray(x) for name, x in numbers.items()}, og.flight_log(state)


def test_each_rung_acts_once_a_row_of_trouble_and_again_after_a_healthy_step() -> None:
    sizes = [1.0] + [9.0] * 8 + [1.0] + [9.0] * 8
    _, numbers, log = climb(sizes, [1.0] * 18)
    resets, steps_down = numbers["guard/reset_total"], numbers["guard/back_off_total"]
    assert resets.tolist() == [0, 0] + [1] * 9 + [2] * 7, log
    assert np.diff(steps_down).sum() >= 2
    assert numbers["guard/rewind_total"][-1] >= 2  # counted anew after each rewind


def test_losses_that_are_zero_or_not_finite_are_not_averaged_and_without_a_snapshot_nothing_goes_back() -> None:
    sizes, losses = [np.nan] * 6 + [1.0] * 5, [1.0] * 6 + [0.0, np.nan, np.inf, 3.0, 3.0]
    params, numbers, log = climb(sizes, losses)
    assert numbers["guard/rewind_total"][:6].tolist() == [0] * 6
    assert params[:6].tolist() == [1.0] * 6
    assert log["event"][6:9].tolist() == ["applied", "nonfinite", "nonfinite"]
    assert params[6] == params[7] == params[8]  # held
    assert numbers["guard/smoothed_loss"][6:9].tolist() == [0.0] * 3
    assert numbers["guard/smoothed_loss"][9] == 3.0


# Proximal steps

INNERS = {"sgd": optax.sgd(0.125), "adam": optax.adam(0.125)}
PROXIMAL: dict[str, Any] = {
    "proximal_l1": lambda inner, s: og.proximal_l1(inner, s, learning_rate=0.125),
    "proximal_elastic_net, l1": lambda inner, s: og.proximal_elastic_net(inner, s, 0.0, learning_rate=0.125),
    "proximal_elastic_net, l2": lambda inner, s: og.proximal_elastic_net(inner, 0.0, s, learning_rate=0.125),
    "proximal_group_lasso": lambda inner, s: og.proximal_group_lasso(inner, s, learning_rate=0.125),
}


@quick_jit
def proximal_steps(p: jax.Array, g: jax.Array, strength: jax.Array) -> dict[tuple[str, str], Any]:
    """The parameters after one step, the fast way and by `update`, and those of the inner optimizer alone."""
    results = {}
    for kind, inner in INNERS.items():
        bare = optax.apply_updates(p, inner.update(g, inner.init(p), p)[0])
        for name, make in PROXIMAL.items():
            tx = make(inner, strength)
            fast = og.apply_gradients(tx, g, tx.init(p), p)[0]
            results[name, kind] = fast, optax.apply_updates(p, tx.update(g, tx.init(p), p)[0]), bare
    return results


def proximal(p: Any, g: Any, strength: float, dtype: str) -> dict[tuple[str, str], list[np.ndarray]]:
    leaves = (jnp.asarray(np.asarray(leaf)).astype(dtype) for leaf in (p, g))
    results = proximal_steps(*leaves, jnp.float32(strength))
    return {case: [wide(np.asarray(leaf)) for leaf in trees] for case, trees in results.items()}


W = np.array([[1.0, 0.0, -0.25], [0.01, -2.0, 5e-3]])
G = np.array([[0.125, 0.0, 0.0], [0.25, 0.5, -0.125]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_the_tables_of_the_proximal_steps(dtype: str, standard_promotion: None) -> None:
    rounding = 4 * float(jnp.finfo(dtype).eps)
    for case, (fast, slow, bare) in proximal(W, G, 0.0, dtype).items():  # a strength of 0: the inner optimizer alone
        for got in (fast, slow):
            np.testing.assert_allclose(got, bare, rtol=rounding, atol=rounding * 0.125, err_msg=str(case))
    for case, (fast, slow, _) in proximal(0 * W, 0 * G, 0.5, dtype).items():  # nothing stays nothing
        assert not fast.any(), case
        assert not slow.any(), case
    for case, (fast, slow, _) in proximal(W, 0 * G, 1e30, dtype).items():
        for got in (fast, slow):
            if case[1] == "adam":  # a second moment of 0: not shrunk
                np.testing.assert_array_equal(got, wide(W.astype(jnp.dtype(dtype))), err_msg=str(case))
            elif "l2" in case[0]:
                assert np.abs(got).max() < 1e-28, case
            else:
                assert not got.any(), case
    for bad in (np.nan, np.inf, -np.inf):  # stays visible, and where it is
        for case, (fast, slow, bare) in proximal(W, np.where(np.arange(3) == 1, [[bad], [0.5]], G), 0.5, dtype).items():
            for got in (fast, slow):
                assert np.isnan(bare[0, 1]) or np.isinf(bare[0, 1])
                assert not np.isfinite(got[0, 1]), case
                assert np.isfinite(got[:, ::2]).all(), case
    for case, (fast, slow, _) in proximal(W, G, np.nan, dtype).items():
        for got in (fast, slow):
            assert np.isnan(got[0, 0]), case  # a strength that is NaN is seen at the first step
    first, second = (proximal(W, G, 0.5, dtype)[name, "adam"] for name in list(PROXIMAL)[:2])
    np.testing.assert_array_equal(first, second)  # l2 = 0
    ones = (W[:1], G[:1])  # groups of one element
    few = proximal(*ones, 0.5, dtype)
    for kind in INNERS:
        group, plain = few["proximal_group_lasso", kind], few["proximal_l1", kind]
        np.testing.assert_allclose(group, plain, rtol=rounding, atol=rounding * 0.125)
