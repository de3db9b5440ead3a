"""Every public transformation on every kind of tree: what matches is taken as it is, what does not is named.

Nearly all of it holds already while a function is traced. Two trees with the same arrays in the same order must give
the same program, whatever they are made of: that is read off the jaxpr, and compiles nothing.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parts import in_part
from registry import ENTRIES, Entry

import optax_guard as og
from optax_guard._common.tree import count_true

each = functools.partial(pytest.mark.parametrize, "entry", ids=str)
STRICT = [entry for entry in ENTRIES if entry.strict]
SPREAD = in_part(ENTRIES, every=4)  # a program is traced half a dozen times for each


def numbers(*shape: int) -> np.ndarray:
    return np.linspace(-1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)


class Layer(NamedTuple):
    bias: Any
    kernel: Any


class Net(eqx.Module):
    """A module that is a function too, as a network is."""

    bias: Any
    kernel: Any

    def __call__(self, x: Any, y: Any) -> Any:
        return self.kernel @ x + y


def take_steps(tx: Any, grads: Any, params: Any) -> Any:
    """Both ways of taking a step; with a loss, since some rules want one."""
    state = tx.init(params)
    fast = og.apply_gradients(tx, grads, state, params, value=jnp.ones(()))
    return fast, tx.update(grads, state, params, value=jnp.ones(()))


def program(entry: Entry, tree: Any) -> str:
    """What a step computes, on arrays without their tree."""
    leaves, structure = jax.tree.flatten(tree)

    def steps(*leaves: Any) -> list[Any]:
        params = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(take_steps(entry.make(), params, params))

    return str(jax.make_jaxpr(steps)(*leaves))


@functools.cache
def usual_program(entry: Entry) -> str:
    return program(entry, {"bias": numbers(3), "kernel": numbers(4, 3)})


# Parameters of every kind

SAME_ARRAYS = {
    "NamedTuple": Layer(numbers(3), numbers(4, 3)),
    "of the type of a state": optax.ScaleByRmsState(nu=[numbers(3), numbers(4, 3)]),
    "of the type of another": {"bias": optax.TraceState(numbers(3)), "kernel": optax.ScaleByRssState(numbers(4, 3))},
    "callable module": Net(numbers(3), numbers(4, 3)),
    "list of NamedTuples": [Layer(numbers(3), numbers(4, 3))],
    "one path name": {"a": {"b": numbers(3)}, "a/b": numbers(4, 3)},
}


@pytest.mark.parametrize("entry", SPREAD)
def test_a_tree_of_any_kind_gives_the_program_of_a_dict(entry: Entry) -> None:
    with entry.promotion():
        for kind, tree in SAME_ARRAYS.items():
            assert program(entry, tree) == usual_program(entry), kind


@pytest.mark.parametrize("entry", SPREAD)
def test_two_leaves_of_one_path_name_and_shape_are_two_leaves(entry: Entry) -> None:
    with entry.promotion():
        alike = {"a": {"b": numbers(4, 3)}, "a/b": numbers(4, 3)}
        assert program(entry, alike) == program(entry, {"one": numbers(4, 3), "two": numbers(4, 3)})


def test_leaves_of_one_path_name_have_names_noise_and_counts_of_their_own() -> None:
    tree = {"a": {"b": jnp.zeros(4)}, "a/b": jnp.zeros(4), "c": jnp.zeros(4)}
    assert og.leaf_names(tree) == ["['a']['b']", "['a/b']", "c"]
    assert og.sparsity(tree).zeros.keys() == {"['a']['b']", "['a/b']", "c"}
    noise: Any = og.noise_injection(1.0, key=3)
    updates, _ = noise.update(tree, noise.init(tree))
    assert not np.array_equal(updates["a"]["b"], updates["a/b"])
    alone, _ = noise.update({"c": tree["c"]}, noise.init({"c": tree["c"]}))
    np.testing.assert_array_equal(updates["c"], alone["c"])


@each(SPREAD)
def test_python_numbers_are_arrays_without_dimensions(entry: Entry) -> None:
    def types(tree: Any) -> Any:
        steps = jax.eval_shape(lambda: take_steps(entry.make(), tree, tree))
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(steps[0][1]))
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), steps)

    plain = {"number": 2.0, "kernel": numbers(4, 3)}
    with entry.promotion():
        assert types(plain) == types({**plain, "number": np.float32(2.0)})


@pytest.mark.usefixtures("standard_promotion")
def test_python_numbers_work_under_optax_alone_and_come_back_as_arrays() -> None:
    for tx in (optax.sgd(0.5), optax.adam(0.5), og.guard(optax.adam(0.5))):
        params, _ = og.apply_gradients(tx, {"w": 2.0}, tx.init({"w": 1.0}), {"w": 1.0})
        assert isinstance(params["w"], jax.Array)
        assert params["w"].dtype == jnp.float32
    assert float(og.global_norm({"a": 3.0, "b": 4})) == 3.0  # an integer has no gradient
    assert int(og.sparsity({"a": 0.0}).zeros["a"]) == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", pytest.param("float8_e5m2", marks=pytest.mark.slow)])
@each(STRICT)
def test_float8_leaves_keep_their_dtype_and_the_state_its_types(entry: Entry, dtype: str) -> None:
    tx = entry.make_strict()
    params = jax.ShapeDtypeStruct((4, 3), jnp.dtype(dtype))
    state = jax.eval_shape(tx.init, params)
    (new_params, after_fast), (updates, after) = jax.eval_shape(lambda p: take_steps(tx, p, p), params)
    assert new_params.dtype == params.dtype
    assert updates.dtype == params.dtype
    for steps in (after_fast, after):
        assert jax.tree.map(lambda leaf: leaf.dtype, steps) == jax.tree.map(lambda leaf: leaf.dtype, state)


# Masks and other trees of choices


CHOICES = {"mask": True, "weight_mask": True, "reduction": "mean", "axis": 0}


def takes_a_tree_of_choices() -> list[tuple[str, str]]:
    found = []
    for name in og.__all__:
        if callable(getattr(og, name)) and not isinstance(getattr(og, name), type):
            arguments = inspect.signature(getattr(og, name)).parameters
            if "query" not in arguments:  # the mask of an attention is one array of booleans
                found += [(name, argument) for argument in arguments if argument in CHOICES]
    return sorted(set(found) - {("proximal_group_lasso", "axis")})  # that one is a number


@pytest.mark.parametrize(("name", "argument"), takes_a_tree_of_choices())
def test_a_callable_module_of_choices_is_a_tree_and_no_function(name: str, argument: str) -> None:
    choice, function = CHOICES[argument], getattr(og, name)
    inner = og.clip_by_global_norm(0.1) if name == "masked_rule" else optax.sgd(0.1)
    needed = {
        "inner": inner,
        "optimizer": inner,
        "every": 2,
        "learning_rate": 0.1,
        "loss_fn": lambda p: jnp.sum(p.kernel),
    }
    known = inspect.signature(function).parameters
    given = {key: value for key, value in needed.items() if key in known}
    given |= {
        key: 0.1
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and key not in (*given, argument)
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    params = Net(numbers(3), numbers(4, 3))

    def run(chosen: Any) -> Any:
        made = function(**given, **{argument: chosen})
        if name == "perturb_weights":
            return made(params, noise_key=1)
        return take_steps(made, params, params)

    as_tree, as_function = (
        str(jax.make_jaxpr(run_of)())
        for run_of in (
            lambda: run(Net(choice, choice)),
            lambda: run(lambda tree: jax.tree.map(lambda _: choice, tree)),
        )
    )
    assert as_tree == as_function


# Gradients that do not match

PARAMS = {"dense": (numbers(3), numbers(4, 3))}
WRONG = {
    "broadcast": ({"dense": (numbers(3), numbers(1, 3))}, "`dense/1` (1, 3) (4, 3)"),
    "transposed": ({"dense": (numbers(3), numbers(3, 4))}, "`dense/1` (3, 4) (4, 3)"),
    "per example": ({"dense": (numbers(8, 3), numbers(8, 4, 3))}, "`dense/0` (8, 3) (3,) mean"),
    "a number": ({"dense": (numbers(3), 1.0)}, "`dense/1` () (4, 3)"),
    "list for tuple": ({"dense": [numbers(3), numbers(4, 3)]}, "`dense` list tuple"),
    "NamedTuple for tuple": ({"dense": Layer(numbers(3), numbers(4, 3))}, "`dense` Layer tuple"),
    "array for tuple": ({"dense": numbers(4, 3)}, "`dense` array (4, 3) tuple"),
    "tuple for array": ({"dense": (numbers(3), (numbers(4, 3),))}, "`dense/1` tuple array (4, 3)"),
    "one leaf less": ({"dense": (numbers(3),)}, "lacks `dense/1`"),
    "one leaf more": ({"dense": (numbers(3), numbers(4, 3), numbers(1))}, "`dense/2` not"),
    "nothing": (None, "None dict"),
    "empty dict": ({}, "lacks `dense/0`"),
    "nothing masked": ({"dense": (numbers(3), optax.MaskedNode())}, "`dense/1` MaskedNode array (4, 3)"),
}


def assert_raises(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        jax.eval_shape(call)
    missing = [word for word in words.split(" ") if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("entry", SPREAD)
def test_gradients_of_another_structure_or_shape_are_named_with_path_and_both(entry: Entry) -> None:
    with entry.promotion():
        tx = entry.make()
        state = jax.eval_shape(tx.init, PARAMS)
        for wrong, words in WRONG.values():
            assert_raises(lambda wrong=wrong: tx.update(wrong, state, PARAMS), f"`updates` `params` {words}")
            assert_raises(
                lambda wrong=wrong: og.apply_gradients(tx, wrong, state, PARAMS),
                f"apply_gradients: `grads` `params` {words}",
            )


@pytest.mark.parametrize("case", WRONG)
def test_apply_gradients_says_the_same_for_an_optax_optimizer(case: str) -> None:
    wrong, words = WRONG[case]
    for tx in (optax.sgd(0.1), optax.adam(0.1)):
        assert_raises(
            lambda tx=tx: og.apply_gradients(tx, wrong, tx.init(PARAMS), PARAMS), f"apply_gradients: `grads` {words}"
        )


def private(inner: Any) -> optax.GradientTransformation:
    return optax.chain(optax.contrib.differentially_private_aggregate(1.0, 0.0, 0), inner)


@pytest.mark.usefixtures("standard_promotion")
def test_one_gradient_per_example_goes_to_an_optimizer_that_reduces_them() -> None:
    per_example = jax.tree.map(lambda x: jnp.stack([0.1 * x, 0.3 * x]), PARAMS)
    spoiled = jax.tree.map(lambda x: x.at[0].set(jnp.nan), per_example)
    for tx in (private(optax.sgd(0.5)), private(og.guard(optax.sgd(0.5)))):
        params, state = og.apply_gradients(tx, per_example, tx.init(PARAMS), PARAMS)
        updates, _ = tx.update(per_example, tx.init(PARAMS), PARAMS)
        expected = optax.apply_updates(PARAMS, updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, expected)
    held, _ = og.apply_gradients(tx, spoiled, state, params)
    jax.tree.map(np.testing.assert_array_equal, held, params)
    assert_raises(
        lambda: og.guard(tx).update(per_example, og.guard(tx).init(PARAMS), PARAMS), "guard: aggregate before"
    )


@each([entry for entry in ENTRIES if entry.is_rule and entry.name != "rule"])
def test_a_rule_alone_is_called_by_its_own_name(entry: Entry) -> None:
    tx = entry.make()
    with pytest.raises(ValueError, match=rf"^{entry.name}: .*`w`"):
        tx.update({"w": "text"}, tx.init({"w": numbers(3)}), {"w": numbers(3)})


def test_apply_gradients_without_params_says_that_it_needs_them() -> None:
    for tx in (optax.sgd(0.1), og.guard(optax.sgd(0.1))):
        assert_raises(
            lambda tx=tx: og.apply_gradients(tx, PARAMS, tx.init(PARAMS), None), "apply_gradients: `params` None"
        )


def remembering(inner: Any) -> dict[str, optax.GradientTransformation]:
    return {
        "guard": og.guard(inner),
        "accumulate": og.accumulate(inner, 2),
        "loss_scaling": og.loss_scaling(inner),
        "stable_spam": og.stable_spam(inner),
    }


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adam", "momentum"])
def test_without_params_gradients_are_compared_with_what_the_state_remembers(inner: Any, case: str) -> None:
    wrong, words = WRONG[case]
    path = next((word for word in words.split(" ") if word.startswith("`")), words)  # the whole has no path
    for name, tx in remembering(inner).items():
        assert_raises(lambda tx=tx: tx.update(wrong, tx.init(PARAMS)), f"{name}: `updates` {path}")


def test_flush_compares_what_it_is_given_with_the_parameters() -> None:
    tx = og.accumulate(optax.sgd(0.1), 2)
    for wrong, words in (case for case in WRONG.values() if case[0] is not None):  # `like=None` means the parameters
        assert_raises(
            lambda wrong=wrong: og.flush(tx, tx.init(PARAMS), PARAMS, like=wrong), f"flush: `like` `params` {words}"
        )


# Lookahead, whose parameters are a pair


@pytest.mark.usefixtures("standard_promotion")
def test_a_guard_goes_inside_lookahead_and_apply_gradients_takes_that() -> None:
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    pair: Any = optax.LookaheadParams.init_synced(params)
    tx = optax.lookahead(og.guard(optax.sgd(0.1), og.clip_by_global_norm(1.0)), 2, 0.5)
    state = tx.init(pair)
    new, state = og.apply_gradients(tx, grads, state, pair)
    updates, _ = tx.update(grads, tx.init(pair), pair)
    expected = optax.apply_updates(pair, updates)
    np.testing.assert_allclose(new.fast["w"], 1 - 0.1 / np.sqrt(2), rtol=1e-6)
    assert jax.tree.all(jax.tree.map(np.array_equal, new, expected))
    held, state = og.apply_gradients(tx, {"w": jnp.full(2, jnp.nan)}, state, new)
    assert int(og.metrics(state)["guard/nonfinite_total"]) == 1
    assert np.array_equal(held.slow["w"], 0.5 * (new.fast["w"] + 1))  # this step synchronises, from the held weights
    assert_raises(lambda: og.apply_gradients(tx, {"w": jnp.ones(3)}, state, new), "apply_gradients: `w` (3,) (2,)")


@each([entry for entry in ENTRIES if entry.wraps])
def test_around_lookahead_a_wrapper_says_where_it_belongs(entry: Entry) -> None:
    pair = optax.LookaheadParams.init_synced(PARAMS)
    tx = entry.make(inner=lambda rate: optax.lookahead(optax.sgd(rate), 2, 0.5))
    assert_raises(lambda: tx.init(pair), "optax.lookahead( inside")


@pytest.mark.usefixtures("standard_promotion")
@each([entry for entry in ENTRIES if not entry.wraps])
def test_beside_lookahead_a_transformation_works_or_says_where_it_belongs(entry: Entry) -> None:
    pair = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.chain(entry.make(), optax.lookahead(optax.sgd(0.1), 2, 0.5))

    def step() -> Any:
        return tx.update(PARAMS, tx.init(pair), pair)

    if entry.needs_params:
        assert_raises(step, "optax.lookahead( inside")
    elif entry.variant == "leaf" or entry.name in (
        "adagc",
        "published.adagc",
        "masked_rule",
        "record_leaves",
    ):  # one number a leaf, of both of the pair
        assert_raises(step, f"{entry.name}: init 4 leaves gradient 2")
    else:
        assert jax.tree.structure(jax.eval_shape(step)[0]) == jax.tree.structure(pair)


# Counts of more elements than an int32 holds

LARGE = (2**16, 2**15 + 8)
ADDS_UP = {"reduce_sum", "cumsum", "reduce_window_sum", "dot_general", "scatter-add"}


def integer_sums(jaxpr: Any) -> list[Any]:
    """Every sum of integers over 2^31 elements or more, in any branch."""
    found = []
    for equation in jaxpr.eqns:
        sizes = [variable.aval.size for variable in equation.invars if hasattr(variable.aval, "size")]
        summed = equation.primitive.name in ADDS_UP and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer)
        if summed and max(sizes, default=0) >= 2**31:
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += integer_sums(getattr(inner, "jaxpr", inner))
    return found


def traced(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.make_jaxpr(function)(*arguments).jaxpr


@pytest.mark.parametrize("entry", SPREAD)
def test_no_step_adds_up_integers_over_more_elements_than_they_can_count(entry: Entry) -> None:
    large = {"w": jax.ShapeDtypeStruct(LARGE, jnp.float32)}
    with entry.promotion():
        assert integer_sums(traced(lambda w: take_steps(entry.make(), w, w), large)) == []


@pytest.mark.parametrize("shape", [LARGE, (2**31 + 8,), (2, 2**31), (2**33,)], ids=str)
def test_functions_of_large_trees_count_without_overflow(shape: tuple[int, ...]) -> None:
    large = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    for function in (og.sparsity, og.global_norm):
        assert integer_sums(traced(function, large)) == []
    assert jax.eval_shape(og.sparsity, large).zeros["w"].dtype == jnp.float32


def test_a_count_in_pieces_is_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_true(np.arange(6) > 1).dtype == jnp.int32
    flags = jnp.arange(5 * 7 * 3).reshape(5, 7, 3) % 4 == 0
    monkeypatch.setattr("optax_guard._common.tree._COUNTABLE", 8)
    count = count_true(flags)
    assert count.dtype == jnp.float32
    assert float(count) == np.sum(np.asarray(flags))


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.wraps], ids=str)
def test_the_gradient_of_an_integer_is_named_where_the_optimizer_cannot_take_it(
    entry: Entry, standard_promotion: None
) -> None:
    params = {"kernel": jnp.ones((2, 3)), "table": jnp.arange(3)}
    grads = {"kernel": jnp.ones((2, 3)), "table": np.zeros(3, jax.dtypes.float0)}

    def step(make_inner: Any) -> Any:
        tx = entry.make(inner=make_inner)
        return jax.eval_shape(lambda: og.apply_gradients(tx, grads, tx.init(params), params, value=jnp.ones(())))

    with pytest.raises(ValueError, match="cannot take the gradient of leaf `table`, the `float0`"):
        step(optax.sgd)
    step(lambda rate: optax.masked(optax.sgd(rate), {"kernel": True, "table": False}))
