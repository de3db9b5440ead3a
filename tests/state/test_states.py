"""States as people have them: of many runs at once, of a part of the parameters, from elsewhere, with a NaN in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from registry import ENTRIES, Entry

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")  # stock Adam does not work under the strict one

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)
BAD = {"a": GRADS["a"], "b": jnp.full(3, jnp.nan)}


def step_of(tx: Any) -> Any:
    return quick_jit(lambda g, s, p: og.apply_gradients(tx, g, s, p, value=jnp.float32(1.0)))


def halted(state: Any, params: Any = None) -> str:
    with pytest.raises(og.TrainingHalted) as raised:
        og.raise_if_halted(state, params)
    return str(raised.value)


# Which leaf


def partitioned(guarded: Any) -> Any:
    return optax.partition({"in": guarded, "out": optax.sgd(0.1)}, {"a": "out", "b": "in"})


AROUND = {
    "masked": lambda guarded: optax.masked(guarded, {"a": False, "b": True}),
    "partition": partitioned,
}


@pytest.mark.parametrize("around", AROUND)
def test_a_guard_that_sees_some_of_the_leaves_names_the_right_one(around: str) -> None:
    tx = AROUND[around](og.guard(optax.sgd(0.1), og.record_leaves(4), halt_after=1, recorder_rows=4))
    params, state = step_of(tx)(BAD, tx.init(PARAMS), PARAMS)
    assert "the gradient of `b` held NaN" in halted(state, params)
    assert "the gradient of leaf 0 of 1 held NaN" in halted(state)
    assert og.leaf_names(params, state) == og.leaf_log(state, params).names == ["b"]
    assert og.leaf_names(params, state)[int(og.metrics(state)["guard/worst_leaf"])] == "b"


def test_parameters_other_than_those_of_the_guard_are_never_given_a_wrong_name() -> None:
    tx = og.guard(optax.sgd(0.1), halt_after=1, recorder_rows=4)
    _, state = step_of(tx)(BAD, tx.init(PARAMS), PARAMS)
    assert "the gradient of leaf 1 of 2 held NaN" in halted(state, {"a": PARAMS["a"]})
    assert "the gradient of `b` held NaN" in halted(state, {"0": PARAMS["a"], **PARAMS})
    assert og.leaf_names({"params": PARAMS}, state) == ["params/a", "params/b"]  # the same leaves under another root
    assert og.leaf_names({"x": 1, "y": 2, "b": 3}, state) == ["leaf 0 of 2", "b"]
    with pytest.raises(ValueError, match="leaf_names: expected one guard in this state, found 0"):
        og.leaf_names(PARAMS, optax.sgd(0.1).init(PARAMS))


# Many runs at once

MANY = og.accumulate(
    og.guard(
        optax.inject_hyperparams(optax.adam)(0.1),
        og.clip_by_norm_history(scope="leaf"),
        og.record_leaves(4),
        halt_after=1,
        recorder_rows=4,
        recovery=(og.reset_moments(after=1), og.back_off(after=1), og.rewind(after=1)),
    ),
    1,
)
MEMBERS = 3


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x] * MEMBERS), tree)


def test_a_state_of_many_runs_reads_as_those_of_its_members() -> None:
    grads = stacked(GRADS)
    grads["a"] = grads["a"].at[1].set(jnp.nan)
    params = stacked(PARAMS)
    state = quick_jit(jax.vmap(MANY.init))(params)
    step = quick_jit(jax.vmap(lambda g, s, p: og.apply_gradients(MANY, g, s, p, value=jnp.float32(1.0))))
    for _ in range(2):
        params, state = step(grads, state, params)
    alone = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(MEMBERS)]

    numbers = [jax.jit(og.metrics)(one) for one in alone]
    for name, number in og.metrics(state).items():
        np.testing.assert_array_equal(number, [each[name] for each in numbers], err_msg=name)
    rows = [og.flight_log(one) for one in alone]
    for column in rows[0].dtype.names:
        np.testing.assert_array_equal(og.flight_log(state)[column], [each[column] for each in rows], err_msg=column)
    assert og.flight_log(state).shape == (MEMBERS, 2)
    logs = [og.leaf_log(one, PARAMS) for one in alone]
    np.testing.assert_array_equal(og.leaf_log(state, PARAMS).norms, [log.norms for log in logs])
    np.testing.assert_array_equal(og.leaf_log(state).steps, [log.steps for log in logs])

    story = halted(state, params)
    assert story.startswith(
        "1 of 3 members of this state halted: 1. The first of them halted at step 0 after 1 non-finite step "
    )
    assert "the gradient of `a` held NaN" in story
    cleared = og.clear_halt(state)
    og.raise_if_halted(cleared)
    assert jax.tree.structure(cleared) == jax.tree.structure(state)
    assert og.has_updated(state).shape == (MEMBERS,)


def test_a_halt_is_not_cleared_in_silence_where_there_is_no_guard() -> None:
    state = og.guard(optax.sgd(0.1)).init(PARAMS)
    for other in (optax.adam(0.1).init(PARAMS), list(state), None):
        with pytest.raises(ValueError, match="clear_halt: there is no guard in this state"):
            og.clear_halt(other)


def test_members_of_different_age_are_read_too() -> None:
    tx = og.guard(optax.sgd(0.1), og.record_leaves(4), recorder_rows=4)
    step = step_of(tx)
    states = [tx.init(PARAMS), step(GRADS, tx.init(PARAMS), PARAMS)[1]]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    log = og.flight_log(state)
    assert log["step"].tolist() == [[-1], [0]]
    assert log["event"].tolist() == [[""], ["applied"]]
    with pytest.raises(ValueError, match=r"leaf_log: the members of this state made \[0, 1\] calls: read one"):
        og.leaf_log(state)


READERS = {
    "raise_if_halted": og.raise_if_halted,
    "flight_log": og.flight_log,
    "leaf_log": og.leaf_log,
    "leaf_names": lambda state: og.leaf_names(PARAMS, state),
    "event_logger": og.event_logger(),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_on_the_host_is_no_part_of_a_compiled_step(name: str) -> None:
    tx = og.guard(optax.sgd(0.1), og.record_leaves(4), recorder_rows=4)
    with pytest.raises(ValueError, match=f"{name}: `state` is traced: call it outside `jit`"):
        jax.eval_shape(lambda: READERS[name](tx.init(PARAMS)) and ())
    with pytest.raises(ValueError, match=f"{name}: `state` has shapes and no numbers: restore"):
        READERS[name](jax.eval_shape(tx.init, PARAMS))


def test_a_state_with_python_numbers_reads_like_one_of_arrays() -> None:
    state = MANY.init(PARAMS)
    numbers = jax.tree.map(lambda x: x.item() if jnp.ndim(x) == 0 else x, state)
    assert og.metrics(numbers) == og.metrics(state)
    assert og.flight_log(numbers).shape == (0,)
    assert not og.has_updated(numbers)
    og.raise_if_halted(numbers)


# Reading under JAX's own searches for NaN


@pytest.mark.parametrize("gradient", [GRADS, BAD], ids=["healthy", "bad"])
def test_metrics_can_be_read_where_jax_stops_at_nan_and_inf(gradient: Any) -> None:
    tx = og.loss_scaling(og.accumulate(og.guard(optax.sgd(0.1), og.clip_by_norm_history(), recorder_rows=4), 1))
    _, state = step_of(tx)(gradient, tx.init(PARAMS), PARAMS)
    with jax.debug_nans(True), jax.debug_infs(True):
        numbers = og.metrics(state)
        og.flight_log(state)
    finite = gradient is GRADS
    assert bool(jnp.isfinite(numbers["guard/grad_norm"])) == finite


# What a halt says of its cause


def test_a_nan_that_multi_steps_never_loses_is_called_so() -> None:
    multi = optax.MultiSteps(og.stabilize(optax.sgd(0.1), halt_after=2, recorder_rows=4), 2)
    step = quick_jit(lambda g, s: multi.update(g, s, PARAMS))
    state = multi.init(PARAMS)
    for i in range(6):
        _, state = step(BAD if i == 0 else GRADS, state)
    story = halted(state, PARAMS)
    assert "The cause is `optax.MultiSteps` around the guard" in story
    assert "Use `accumulate(guard(...), every)` instead" in story


def test_a_halt_looks_at_parameters_and_moments() -> None:
    tx = og.guard(optax.adam(0.1), halt_after=1, recorder_rows=4)
    bad_params = {"a": PARAMS["a"].at[0, 0].set(jnp.inf), "b": PARAMS["b"]}
    _, state = step_of(tx)(BAD, tx.init(PARAMS), bad_params)
    assert "The parameters are those before the first of them." in halted(state, PARAMS)
    assert "The parameters themselves hold Inf, the first in `a`: restore an earlier" in halted(state, bad_params)
    moments = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim else x, state.guarded_state)
    story = halted(state._replace(guarded_state=moments), PARAMS)
    assert "The optimizer's own state holds NaN, the first in `0/mu/a`" in story
    assert "`reset_moments" in story.replace("recovery=(", "`")


# Another optimizer's state put under a guard

ADAM = optax.adam(0.1)
GUARD = og.guard(ADAM, og.clip_by_global_norm(1.0), recorder_rows=4)


def numbered(tree: Any) -> Any:
    """The tree with numbers that tell its leaves apart."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.full_like(leaf, i) for i, leaf in enumerate(leaves, 1)])


def raw(node: Any) -> Any:
    """What a restore without a target makes of a state: dicts, lists, NumPy arrays, None for what is empty."""
    if hasattr(node, "_fields"):
        return {name: raw(part) for name, part in node._asdict().items()} or None
    if isinstance(node, dict):
        return {name: raw(part) for name, part in node.items()}
    return [raw(part) for part in node] if isinstance(node, (tuple, list)) else np.asarray(node)


OLD = numbered(ADAM.init(PARAMS))
SOURCES = {
    "the optimizer": (GUARD, OLD, ("(root)",)),
    "chain(clip, adam)": (GUARD, (optax.EmptyState(), OLD), ("1",)),
    "apply_if_finite": (GUARD, optax.apply_if_finite(ADAM, 5).init(PARAMS)._replace(inner_state=OLD), ("inner_state",)),
    "MultiSteps": (
        GUARD,
        optax.MultiSteps(ADAM, 4).init(PARAMS)._replace(inner_opt_state=OLD),
        ("inner_opt_state",),
    ),
    "inject_hyperparams": (
        GUARD,
        optax.inject_hyperparams(optax.adam)(0.1).init(PARAMS)._replace(inner_state=OLD),
        ("inner_state",),
    ),
    "a flat chain": (GUARD, (optax.EmptyState(), OLD[0], optax.EmptyState()), ("1",)),
    "a train state": (GUARD, {"step": 1, "params": PARAMS, "opt_state": OLD}, ("opt_state",)),
    "raw": (GUARD, raw(OLD), ("(root)",)),
    "raw MultiSteps": (
        GUARD,
        raw(optax.MultiSteps(ADAM, 4).init(PARAMS)._replace(inner_opt_state=OLD)),
        ("inner_opt_state",),
    ),
    "raw guard": (GUARD, raw(GUARD.init(PARAMS)._replace(guarded_state=OLD)), ("(root)",)),
    "another rule": (og.guard(ADAM), GUARD.init(PARAMS)._replace(guarded_state=OLD), ("(root)",)),
    "recovery": (
        og.guard(ADAM, og.clip_by_global_norm(1.0), recovery=(og.reset_moments(), og.rewind())),
        GUARD.init(PARAMS)._replace(guarded_state=OLD),
        ("(root)",),
    ),
    "no more rewind": (
        GUARD,
        og.guard(ADAM, recovery=(og.rewind(keep=2),)).init(PARAMS)._replace(guarded_state=OLD),
        ("(root)",),
    ),
    "max_change": (
        og.stabilize(ADAM, max_change=0.1),
        og.stabilize(ADAM, max_change=None).init(PARAMS)._replace(guarded_state=OLD),
        None,
    ),
    "no max_change": (
        og.stabilize(ADAM),
        og.stabilize(ADAM, max_change=0.1)
        .init(PARAMS)
        ._replace(guarded_state=og.state.BoundedState(OLD, og.limit_step(0.1).init(PARAMS))),
        ("(root)",),
    ),
    "a bound with a memory": (
        og.guard(optax.chain(ADAM, og.clip_by_update_norm(window=8))),
        GUARD.init(PARAMS)._replace(guarded_state=OLD),
        ("(root)",),
    ),
    "accumulate for MultiSteps": (
        og.accumulate(GUARD, 4),
        optax.MultiSteps(GUARD, 4)
        .init(PARAMS)
        ._replace(inner_opt_state=GUARD.init(PARAMS)._replace(guarded_state=OLD)),
        ("inner_opt_state",),
    ),
    "float16": (og.loss_scaling(GUARD), (optax.EmptyState(), OLD), ("1",)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_optimizers_state_is_found_in_what_people_have(source: str) -> None:
    tx, old, paths = SOURCES[source]
    fresh = jax.eval_shape(tx.init, PARAMS)
    state = og.add_guard_state(tx, PARAMS, old)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(fresh)]
    adam = next(each for each in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(each))
    for a, b in zip(jax.tree.leaves(adam), jax.tree.leaves(OLD), strict=True):
        np.testing.assert_array_equal(a, b)
        assert isinstance(a, jax.Array)
    assert int(og.metrics(state)["guard/step"]) == 0
    assert og.find_inner_state(tx, PARAMS, old) == (paths or ("(root)",))


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


class Other(NamedTuple):
    """Another state with the fields of Adam's."""

    count: Any
    mu: Any
    nu: Any


REFUSED = {
    "twice": (GUARD, {"one": OLD, "two": OLD}, "holds the optimizer's state 2 times, at `one`, `two`: pass the one"),
    "its own": (GUARD, GUARD.init(PARAMS), "`inner_state` already holds the guard of this `tx`"),
    "another optimizer": (GUARD, optax.lion(0.1).init(PARAMS), "it lacks leaf `0/nu/a`"),
    "alike by name only": (GUARD, Other(*OLD[0]), "it lacks leaf `0/count`"),
    "other parameters": (
        GUARD,
        (ADAM.init({"a": jnp.ones((4, 3)), "b": PARAMS["b"]}),),
        r"float32\[4, 3\]; .*\[2, 3\]",
    ),
    "nothing to take": (og.guard(optax.sgd(0.1)), OLD, "keeps no state"),
    "NaN in a moment": (GUARD, jax.tree.map(lambda x: x * jnp.nan if x.ndim else x, OLD), "holds NaN, .* in `0/mu/a`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_add_guard_state_says_why_it_refuses(case: str) -> None:
    tx, old, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"add_guard_state: .*{message}"):
        og.add_guard_state(tx, PARAMS, old)


def test_add_guard_state_refuses_parameters_that_hold_nan() -> None:
    with pytest.raises(ValueError, match="the parameters themselves hold NaN, the first in `b`: restore an earlier"):
        og.add_guard_state(GUARD, {"a": PARAMS["a"].at[0, 0].set(-jnp.inf), "b": jnp.full(3, jnp.nan)}, OLD)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reset_moments_starts_moments_anew_that_came_in_bad(bad: float) -> None:
    tx = og.guard(ADAM, recorder_rows=4, recovery=(og.reset_moments(),))
    old = jax.tree.map(lambda x: jnp.full_like(x, bad) if x.ndim else x, OLD)
    state = og.add_guard_state(tx, PARAMS, old)
    step = step_of(tx)
    params, state = step(GRADS, state, PARAMS)
    assert og.flight_log(state)["recovery"].tolist() == ["reset_nonfinite"]
    np.testing.assert_array_equal(params["a"], PARAMS["a"])
    params, state = step(GRADS, state, params)
    np.testing.assert_allclose(params["a"], PARAMS["a"] - 0.1, rtol=1e-5)  # Adam's first step


# A state that is not of this transformation

OWN = GUARD.init(PARAMS)
RECOVERING = og.guard(ADAM, og.clip_by_global_norm(1.0), recovery=(og.back_off(),), recorder_rows=4)
TWO_RULES = og.guard(ADAM, og.clip_by_global_norm(1.0), og.skip_spikes(), recorder_rows=4)
WRONG = {
    "bare": (GUARD, OWN.guarded_state, "it is a tuple, here a GuardState. There is no guard in it: `add_guard_state"),
    "list": (GUARD, list(OWN), "it is a list, here a GuardState"),
    "list inside": (
        GUARD,
        OWN._replace(guarded_state=list(OWN.guarded_state)),
        "`guarded_state` is a list, here a tuple. `add_guard_state.*`remove_guard_state",
    ),
    "a rule less": (TWO_RULES, OWN, "it has the states of 1 rules, here there are 2"),
    "a rule more": (og.guard(ADAM), OWN, "it has the states of 1 rules, here there are 0"),
    "recovery added": (RECOVERING, OWN, "from a guard without `recovery`, and this one is with"),
    "recovery removed": (GUARD, RECOVERING.init(PARAMS), "from a guard with `recovery`, and this one is without"),
    "a guard's in accumulate": (og.accumulate(GUARD, 2), OWN, "it is a GuardState, here an AccumulateState"),
    "a guard's in accumulate of none": (
        og.accumulate(ADAM, 2),
        og.accumulate(GUARD, 2).init(PARAMS),
        "There is a guard in it: `remove_guard_state",
    ),
    "a recorder of other columns": (
        GUARD,
        OWN._replace(recorder=OWN.recorder._replace(codes=OWN.recorder.codes[:, :5])),
        r"`recorder/codes` has the shape \(4, 5\), here \(rows, 9\), so another version.*`add_guard_state",
    ),
    "other: shapes alone": (
        GUARD,
        jax.eval_shape(GUARD.init, PARAMS),
        "is not an array but a ShapeDtypeStruct. Restore",
    ),
    "other: text": (GUARD, OWN._replace(guard_step="0"), "`guard_step` is not an array but a str"),
    "other: masked": (
        GUARD,
        OWN._replace(guard_step=np.ma.masked_array(0)),
        "`guard_step` is not an array but a Masked",
    ),
    "other parameters": (GUARD, GUARD.init({**PARAMS, "c": jnp.ones(1)}), "it has `guarded_state/0/mu/c`"),
    "other shapes": (
        GUARD,
        GUARD.init({**PARAMS, "b": jnp.ones(4)}),
        r"`guarded_state/0/mu/b` has the shape \(4,\), here \(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_of_another_transformation_is_refused_with_what_differs(case: str) -> None:
    tx, state, message = WRONG[case]
    for take in (tx.update, lambda *a: og.apply_gradients(tx, *a)):
        with pytest.raises(ValueError, match=f"`state` is not a state of this transformation: .*{message}"):
            take(GRADS, state, PARAMS)
    if not case.startswith("other"):  # gradients alone tell no shapes of parameters
        with pytest.raises(ValueError, match="is not a state of this transformation"):
            tx.update(GRADS, state)


def test_a_recorder_of_other_columns_is_not_read_and_its_optimizer_is_kept() -> None:
    old = WRONG["a recorder of other columns"][1]
    old = old._replace(halted=jnp.ones((), bool))
    for read in (og.flight_log, og.metrics, og.raise_if_halted):
        with pytest.raises(ValueError, match=r"5 and 5 columns, here 5 and 9.*add_guard_state"):
            read(old)
    moved = og.add_guard_state(GUARD, PARAMS, old)
    jax.tree.map(np.testing.assert_array_equal, moved.guarded_state, old.guarded_state)
    assert moved.recorder.codes.shape == OWN.recorder.codes.shape


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_transformation_refuses_states_that_are_not_its_own_and_takes_its_own(entry: Entry) -> None:
    tx = entry.make()
    state = jax.eval_shape(tx.init, PARAMS)

    def step(state: Any) -> Any:
        return jax.eval_shape(lambda s: og.apply_gradients(tx, GRADS, s, PARAMS, value=jnp.float32(1.0)), state)

    step(state)
    wrongs = [{"state": state}, jax.eval_shape(GUARD.init, {"c": jnp.ones(1)})]
    if jax.tree.leaves(state):
        wrongs += [jax.tree.leaves(state), jax.tree.leaves(state)[0], None, ()]
        wrongs += [list(state)] if isinstance(state, tuple) else []
    else:
        step(None)  # what keeps no numbers needs no state
    for wrong in wrongs:
        if entry.wraps or jax.tree.leaves(wrong):
            with pytest.raises(ValueError, match="is not a state of this transformation"):
                step(wrong)
    for shape in ((1, 3), (5, 2)):  # one would be broadcast, the other not
        wrong = jax.eval_shape(tx.init, {**PARAMS, "a": jnp.ones(shape)})
        if jax.tree.leaves(wrong) != jax.tree.leaves(state):
            with pytest.raises(
                ValueError, match=f"{entry.name}: `state` is .*/a` has the shape \\({shape[0]}, {shape[1]}"
            ):
                step(wrong)


def test_a_check_of_the_state_is_remembered_and_lets_pass_what_works() -> None:
    calls = []

    def init(params: Any) -> Any:
        calls.append(1)
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def peeks(params: Any) -> Any:
        assert all(float(jnp.sum(x)) > 0 for x in jax.tree.leaves(params))  # looks at values: cannot be traced
        return init(params)

    for start in (init, peeks):
        tx = og.guard(optax.GradientTransformation(start, lambda u, s, _=None: (u, s)), recorder_rows=4)
        state = tx.init(PARAMS)
        calls.clear()
        for _ in range(3):
            jax.eval_shape(tx.update, GRADS, state, PARAMS)
        assert len(calls) <= 1
    longer = og.guard(ADAM, og.clip_by_global_norm(1.0), recorder_rows=8).init(PARAMS)  # goes on with its own length
    jax.eval_shape(GUARD.update, GRADS, longer, PARAMS)


NUMPY = [
    entry
    for entry in ENTRIES
    if str(entry)
    in (
        "guard-check_updates",
        "stabilize-max_change",
        "loss_scaling-accumulate",
        "skip_spikes",
        "record_leaves",
        "clip_by_update_norm",
    )
]


@pytest.mark.parametrize(
    "entry", [*NUMPY, *(pytest.param(e, marks=pytest.mark.slow) for e in ENTRIES if e not in NUMPY)], ids=str
)
def test_a_state_of_numpy_arrays_is_stepped_like_one_of_jax(entry: Entry) -> None:
    tx = entry.make()
    state = tx.init(PARAMS)
    results = []
    for form in (lambda tree: tree, jax.device_get):
        grads, old, params = form((GRADS, state, PARAMS))
        updates, new = tx.update(grads, old, params, value=form(jnp.float32(1.0)))
        results.append(jax.tree.leaves((updates, tx.update(grads, form(new), params, value=form(jnp.float32(1.0))))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
