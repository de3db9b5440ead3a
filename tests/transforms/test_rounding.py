"""Stochastic rounding against the definition in float64, and inside everything else: it comes last."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from compiling import in_place, quick_jit, users_jit
from helpers import bits
from jax.sharding import NamedSharding, PartitionSpec
from test_proximal import DESIGN, LASSO, START, STRENGTH, TARGET, objective

import optax_guard as og
from optax_guard._common.prng import Words, leaf_words, rounded_stochastically, rounding_bits, step_words

NARROW = {"bfloat16": (8, -126), "float16": (11, -14)}  # digits of the significand, exponent of the smallest normal


def neighbours(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of the dtype that is not above x, and the next one, from the definition of the format."""
    digits, smallest = NARROW[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-1000)))
    unit = 2.0 ** (np.maximum(exponent, smallest) - digits + 1)
    down = np.floor(x / unit) * unit
    return down, np.where(down == x, x, down + unit)


def numbers(dtype: str) -> np.ndarray:
    """Float32 numbers of all sizes that the dtype has, exact ones and the borders of binades among them."""
    rng = np.random.default_rng(0)
    lowest, highest = (-120, 120) if dtype == "bfloat16" else (-26, 15)
    sizes = 2.0 ** rng.uniform(lowest, highest, 200) * rng.choice([-1, 1], 200)
    special = np.array([0.0, 1.0, -1.0, 1.001, 0.999, -1.998, 2.0**-14 * 0.9999, 2.0**-24 * 0.3, 3.0, 1.0078125])
    return np.concatenate([sizes, special]).astype(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_becomes_a_neighbour_and_their_mean_is_the_number(dtype: str) -> None:
    draws, x = 20_000, numbers(dtype)
    words = np.random.default_rng(1).integers(0, 2**32, (draws, x.size), dtype=np.uint32)
    rounded = np.asarray(jax.vmap(lambda word: rounded_stochastically(jnp.asarray(x), jnp.dtype(dtype), word))(words))
    rounded = rounded.astype(np.float64)
    down, up = neighbours(x.astype(np.float64), dtype)
    assert np.all((rounded == down) | (rounded == up))
    gap = np.where(up > down, up - down, 1)
    share = (x - down) / gap
    deviation = ((rounded - down) / gap).mean(0) - share
    assert np.all(np.abs(deviation) <= 5 * np.sqrt(share * (1 - share) / draws) + 1e-12)
    exact = down == up
    assert exact.sum() > 3
    np.testing.assert_array_equal(np.signbit(rounded[0][exact]), np.signbit(x[exact]))


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_not_finite_or_beyond_the_range(dtype: str) -> None:
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([np.inf, -np.inf, np.nan, largest, -largest, np.float32(largest * 1.0005), -0.0], jnp.float32)
    for word in (0, 2**32 - 1):
        rounded = rounded_stochastically(x, jnp.dtype(dtype), jnp.full(x.shape, word, jnp.uint32)).astype(jnp.float32)
        expected = np.array([np.inf, -np.inf, np.nan, largest, -largest, largest, -0.0], np.float32)
        assert bits(jnp.isnan(rounded)) == bits(np.isnan(expected))
        np.testing.assert_array_equal(rounded[jnp.array([0, 1, 3, 4, 5, 6])], expected[[0, 1, 3, 4, 5, 6]])
        assert np.signbit(rounded[6])


# The transformation

SIZE, U = 128, 2.0**-11  # 1 - U is an eighth of the way from 1 to the next smaller bfloat16


def sgd(rate: float = U) -> optax.GradientTransformation:
    return optax.sgd(rate)


def rounding(key: Any = 5) -> optax.GradientTransformationExtraArgs:
    return og.stochastic_rounding(key)


def tree(dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    return {
        "full": jnp.linspace(0.3, 0.7, 16, dtype=jnp.float32),
        "narrow": jnp.ones((SIZE, SIZE), dtype),
        "small": {"a": jnp.ones((2, 64), dtype), "b": jnp.ones((2, 64), dtype)},  # leaves that share their hashing
    }


GRADS = {**jax.tree.map(jnp.ones_like, tree()), "full": jnp.full(16, 0.3, jnp.float32)}


def both_ways(tx: Any, grads: Any = GRADS, params: Any = None, steps: int = 1, state: Any = None) -> list[Any]:
    """(params, state) after `steps` by `apply_gradients` and by `update`."""
    params = tree() if params is None else params

    def fast(params: Any, state: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, value=jnp.float32(1.0))

    def slow(params: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    @quick_jit
    def run(params: Any, state: Any) -> Any:
        state = tx.init(params) if state is None else state
        results = []
        for way in (fast, slow):
            at = params, state
            for _ in range(steps):
                at = way(*at)
            results.append(at)
        return results

    return run(params, state)


def check_mean(narrow: jax.Array, step: float) -> None:
    """The mean of ones after one step, within five standard errors, and no other values than the two neighbours."""
    values = np.asarray(narrow).astype(np.float64)
    gap = 2.0**-8
    assert set(np.unique(values)) <= {1.0, 1.0 - gap}
    share = step / gap
    assert abs(values.mean() - (1 - step)) < 5 * gap * np.sqrt(share * (1 - share) / values.size)


ORDERS: dict[str, tuple[Callable[[Any], Any], float]] = {  # what a person writes around the link, and the step it takes
    "chain": (lambda link: optax.chain(sgd(), link), U),
    "guard": (lambda link: og.guard(optax.chain(sgd(), link)), U),
    "guard, checked": (lambda link: og.guard(optax.chain(sgd(), link), check_updates=True), U),
    "stabilize": (lambda link: og.stabilize(optax.chain(sgd(0.25), link), max_change=U), U),
    "limit_step behind": (lambda link: og.guard(optax.chain(sgd(0.25), link, og.limit_step(U, scope="leaf"))), U),
    "limit_step before": (lambda link: og.guard(optax.chain(sgd(0.25), og.limit_step(U, scope="leaf"), link)), U),
    "scale behind": (lambda link: og.guard(optax.chain(sgd(), link, optax.scale(0.5))), U / 2),
    "recovery": (lambda link: og.guard(optax.chain(sgd(), link), recovery=(og.reset_moments(), og.rewind())), U),
    "accumulate": (lambda link: og.accumulate(optax.chain(sgd(), link), 1), U),
    "accumulate, guard": (lambda link: og.accumulate(og.guard(optax.chain(sgd(), link)), 1), U),
    "loss_scaling": (lambda link: og.loss_scaling(og.guard(optax.chain(sgd(), link)), init=1.0), U),
    "proximal": (lambda link: og.guard(og.proximal_l1(optax.chain(sgd(), link), 1.0, learning_rate=U)), 2 * U),
    "MultiSteps": (lambda link: optax.MultiSteps(optax.chain(sgd(), link), 1).gradient_transformation(), U),
    "MultiSteps in guard": (lambda link: og.guard(optax.MultiSteps(optax.chain(sgd(), link), 1)), U),
    "apply_if_finite": (lambda link: optax.apply_if_finite(optax.chain(sgd(), link), 3), U),
    "masked": (lambda link: og.guard(optax.chain(sgd(), optax.masked(link, dict.fromkeys(GRADS, True)))), U),
    "partition": (
        lambda link: og.guard(
            optax.partition({"a": optax.chain(sgd(), link), "b": sgd()}, {"full": "b", "narrow": "a", "small": "a"})
        ),
        U,
    ),
    "named_chain": (lambda link: optax.named_chain(("step", sgd()), ("rounding", link)), U),
}
QUICK = ("chain", "guard", "scale behind", "proximal")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "order", [order if order in QUICK else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS]
)
def test_the_mean_is_right_and_float32_is_untouched(order: str) -> None:
    """Whatever stands around or behind it: steps of an eighth of the gap move bfloat16 on average, both ways."""
    make, step = ORDERS[order]
    without = both_ways(make(optax.identity()))
    for (params, _), (plain, _) in zip(both_ways(make(rounding())), without, strict=True):
        check_mean(params["narrow"], step)
        small = [np.asarray(leaf).astype(np.float32) for leaf in params["small"].values()]
        assert [len(np.unique(leaf)) for leaf in small] == [2, 2]
        assert not np.array_equal(*small)
        assert np.all(np.asarray(plain["narrow"]) == 1)  # to nearest, nothing moves
        assert bits(params["full"]) == bits(plain["full"])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_back_off_scales_the_update_and_not_what_was_rounded() -> None:
    tx = og.guard(optax.chain(sgd(), rounding()), recovery=(og.back_off(factor=0.5, after=1),))
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), GRADS)
    for params, state in both_ways(tx, GRADS, state=both_ways(tx, bad)[0][1]):
        assert float(og.metrics(state)["guard/update_scale"]) == 0.5
        check_mean(params["narrow"], U / 2)


@pytest.mark.usefixtures("standard_promotion")
def test_only_what_it_sees_is_rounded() -> None:
    """A mask or a partition around it: the other leaves are rounded to nearest."""
    seen = {"full": True, "narrow": False, "small": True}
    tx = og.guard(optax.chain(sgd(), optax.masked(rounding(), seen)))
    for params, _ in both_ways(tx):
        assert np.all(np.asarray(params["narrow"]) == 1)
        assert not np.all(np.asarray(params["small"]["a"]) == 1)


HOLDING = {"guard": og.guard, "accumulate": lambda inner: og.accumulate(inner, 1), "loss_scaling": og.loss_scaling}


@pytest.mark.parametrize(
    "wrapper", [name if name == "guard" else pytest.param(name, marks=pytest.mark.slow) for name in HOLDING]
)
def test_a_held_step_changes_no_bit_and_does_not_count(wrapper: str) -> None:
    params = {"w": jnp.asarray([1.0, -0.0, 3.0, 1e-30], jnp.bfloat16)}
    bad = {"w": params["w"].at[3].set(jnp.nan)}
    for after, state in both_ways(HOLDING[wrapper](optax.chain(sgd(), rounding())), bad, params):
        assert bits(after) == bits(params)
        assert int(optax.tree.get(state, "rounding_step")) == 0


def test_a_function_of_key_step_and_path_alone() -> None:
    ones = jnp.ones(200, jnp.bfloat16)
    tx = optax.chain(sgd(), rounding())

    @quick_jit
    def after(params: Any, state: Any) -> Any:
        return og.apply_gradients(tx, jax.tree.map(jnp.ones_like, params), state, params)[0]

    def state_of(params: Any, key: Any = 5, step: int = 0) -> Any:
        state: Any = optax.chain(sgd(), rounding(key)).init(params)
        before, own = state
        return before, own._replace(rounding_step=jnp.asarray(step, jnp.int32))

    small, large = {"m": {"w": ones}}, {"a": ones, "m": {"b": ones, "w": ones}}
    alone, among = after(small, state_of(small)), after(large, state_of(large))
    assert bits(alone["m"]["w"]) == bits(among["m"]["w"])
    assert len({*bits(among)}) == 3
    for key in (jax.random.key(5), jax.random.PRNGKey(5), np.int64(5)):
        assert bits(after(small, state_of(small, key))) == bits(alone)
    others = [after(small, state_of(small, key, step)) for key, step in ((6, 0), (5, 1), (5, 2))]
    assert len({*bits([alone, *others])}) == 4


def test_the_same_for_any_sharding() -> None:
    tx = og.guard(optax.chain(sgd(), rounding()))
    params = {"w": jnp.ones((64, 8), jnp.bfloat16)}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))

    @quick_jit
    def step(params: Any) -> Any:
        return og.apply_gradients(tx, jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]

    assert bits(step(sharded)) == bits(step(params))


@pytest.mark.parametrize("dtype", NARROW)
def test_edge_cases(dtype: str) -> None:
    """The table of the docstring: what is not finite, beyond the range, zero, exact, or without an update."""
    largest = float(jnp.finfo(dtype).max)
    w = [1.0, 1.0, np.inf, np.nan, largest, -largest, -0.0, 0.0, 1.0, -2.0]
    u = [np.nan, np.inf, 1.0, 1.0, largest, -largest, -0.0, 0.0, 0.5, 2.0]
    expected = [np.nan, largest, np.inf, np.nan, largest, -largest, -0.0, 0.0, 1.5, 0.0]
    params = {"w": jnp.asarray(w, dtype), "i": jnp.arange(3), "none": jnp.ones(2, dtype)}
    grads = {"w": jnp.asarray(u, dtype), "i": np.zeros(3, jax.dtypes.float0), "none": None}
    tx = optax.chain(optax.stateless(lambda updates, _: updates), rounding())
    state = tx.init(params)
    new, _ = og.apply_gradients(tx, grads, state, params)
    np.testing.assert_array_equal(
        np.asarray(new["w"], np.float32), np.asarray(jnp.asarray(expected, dtype), np.float32)
    )
    assert np.signbit(np.asarray(new["w"], np.float32)[6])
    assert (bits(new["i"]), bits(new["none"])) == (bits(params["i"]), bits(params["none"]))
    updates, _ = tx.update(grads, state, params)
    assert updates["none"] is None
    plain = np.asarray(params["w"] + grads["w"], np.float32)  # as Optax adds them
    np.testing.assert_array_equal(np.asarray(params["w"] + updates["w"], np.float32), plain)


@pytest.mark.usefixtures("standard_promotion")
def test_a_float32_gradient_gives_the_same_numbers_both_ways() -> None:
    """Steps from weights of all sizes, through zero too: the float32 update leads to the rounded sum itself."""
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=4000) * 10.0 ** rng.uniform(-3, 1, 4000), jnp.bfloat16)}
    grads = {"w": jnp.asarray(rng.normal(size=4000), jnp.float32)}
    fast, slow = both_ways(optax.chain(optax.sgd(1.0), rounding()), grads, params)
    assert bits(fast[0]) == bits(slow[0])


@pytest.mark.usefixtures("standard_promotion")
def test_other_trees_around_it_leave_it_to_the_chain() -> None:
    """`optax.lookahead` has pairs of parameters: what it wraps rounds as under plain Optax."""
    tx = optax.lookahead(og.guard(optax.chain(sgd(), rounding())), 5, 0.5)
    start = optax.LookaheadParams.init_synced(tree())
    params, _ = og.apply_gradients(tx, GRADS, tx.init(start), start)
    check_mean(params.fast["narrow"], U)


def test_wrong_input() -> None:
    for key in ("seed", 1.5, None, True, jnp.ones(2), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match="stochastic_rounding: `key` must be an int, a PRNG key or raw"):
            og.stochastic_rounding(key)
    tx = rounding()
    with pytest.raises(ValueError, match="stochastic_rounding: needs the parameters"):
        tx.update(GRADS, tx.init(tree()))


# What it is for


def test_the_bits_are_independent() -> None:
    """Neighbours in a row and in a column, leaves, steps and keys: correlation 0 within five standard errors."""
    size = 256
    like, streams = jnp.zeros((size, size)), []
    keys = [step_words(jnp.asarray([0, key], jnp.uint32), jnp.int32(step), 7) for key, step in ((0, 0), (0, 1), (1, 0))]
    for words in (*keys, leaf_words(keys[0], ["a", "b"])):
        word = rounding_bits(Words(jnp.ravel(words.first)[-1], jnp.ravel(words.second)[-1]), like)
        for each in (word & np.uint32(0xFFFF), word >> np.uint32(9)):  # what bfloat16 and float16 take
            uniform = np.asarray(each, np.float64) / float(np.max(each))
            assert abs(uniform.mean() - 0.5) < 5 / np.sqrt(12) / size
            assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-4
            streams += [np.roll(uniform, shift, axis).ravel() for shift, axis in ((0, 0), (1, 0), (1, 1), (2, 1))]
    correlation = np.corrcoef(streams)
    same = np.kron(np.eye(4), np.ones((8, 8))).astype(bool)  # of one key: overlapping bits, shifted against each other
    np.fill_diagonal(correlation, 0)
    assert np.all(np.abs(correlation[~same]) < 5 / size)
    for i in range(0, 32, 4):
        assert np.all(np.abs(correlation[i : i + 4, i : i + 4]) < 5 / size)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("moments", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_lasso_ends_at_its_optimum_with_bfloat16_weights(moments: str) -> None:
    """Adam under a cosine schedule, as in docs/guard/float16.md: to nearest, it ends 0.14 or 0.08 above the optimum."""
    rate = optax.cosine_decay_schedule(0.01, 4000)
    design, target = jnp.asarray(DESIGN, jnp.float32), jnp.asarray(TARGET, jnp.float32)

    def loss(params: Any) -> jax.Array:
        return 0.5 * jnp.mean(jnp.square(design @ params["w"].ravel().astype(jnp.float32) - target))

    def excess(inner: Any) -> tuple[float, int]:
        tx = og.proximal_l1(inner, STRENGTH, learning_rate=rate)

        def body(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            return og.apply_gradients(tx, jax.grad(loss)(params), state, params), None

        start = {"w": jnp.asarray(START, jnp.bfloat16)}
        run = quick_jit(lambda carry: jax.lax.scan(body, carry, length=4000)[0])
        params, _ = run((start, tx.init(optax.tree.cast(start, moments))))
        return objective(np.asarray(params["w"], np.float64)) - objective(LASSO), int(jnp.sum(params["w"] == 0))

    nearest, rounded = excess(optax.adam(rate)), excess(optax.chain(optax.adam(rate), rounding()))
    assert nearest[0] > 0.05
    assert nearest[1] < 45
    assert rounded[0] < 1e-3
    assert rounded[1] == 45


@in_place
@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_it_costs_no_further_pass_and_no_temporaries() -> None:
    params = {f"w{i}": jnp.ones((128, 512), jnp.bfloat16) for i in range(3)}
    size = sum(leaf.nbytes for leaf in params.values())

    def compiled(inner: Any) -> Any:
        tx = og.guard(inner)

        def step(params: Any, state: Any, grads: Any) -> Any:
            return og.apply_gradients(tx, grads, state, params)

        return users_jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()

    bare, rounded = (compiled(inner) for inner in (optax.adamw(1e-3), optax.chain(optax.adamw(1e-3), rounding())))
    moved = [program.cost_analysis()["bytes accessed"] / size for program in (bare, rounded)]
    assert moved[1] < moved[0] + 0.05, moved
    assert rounded.memory_analysis().temp_size_in_bytes < bare.memory_analysis().temp_size_in_bytes + 0.05 * size
