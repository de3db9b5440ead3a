"""In `shard_map`, a tree of sharded and replicated leaves counts every leaf once: by JAX's types, or by `leaf_axes`.

Every registry entry that takes `axis_name` runs on one mesh of 2 x 2 devices, on a tree with a leaf sharded over one
axis, one over the other, one over both and one over none, and equals the run without a mesh.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import ENTRIES, Entry, momentum

import optax_guard as og

RNG = np.random.default_rng(0)
SPECS = {"both": P("x", "y"), "one": P("x"), "other": P(None, "y"), "whole": P()}
SHAPES = {"both": (4, 2), "one": (2,), "other": (1, 2), "whole": (3,)}
WITH_AXIS = [entry for entry in ENTRIES if entry.takes_axis_name]
TYPED = {"check_vma": True, "axis_name": ("x", "y")}
DECLARED = {"check_vma": False, "axis_name": og.leaf_axes(SPECS)}
MODES = {"types": TYPED, "leaf_axes": DECLARED, "both": {"check_vma": True, "axis_name": og.leaf_axes(SPECS)}}


def draw(size: float) -> dict[str, np.ndarray]:
    return {name: RNG.normal(0, size, shape).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS = draw(1.0)
GRADS = [draw(size) for size in (1, 5, 1)]
BAD = {**GRADS[0], "both": np.where(np.arange(8).reshape(4, 2) == 5, np.nan, GRADS[0]["both"])}  # on one device of four
LOSSES = np.array([0.25, 0.75], np.float32)  # one for each place along x


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


def mapped(function: Callable, in_specs: Any, out_specs: Any, check_vma: bool) -> Callable:
    return jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def specs_of(tx: Any, state: Any) -> Any:
    return optax.tree.map_params(tx, lambda _, spec: spec, state, SPECS, transform_non_params=lambda _: P())


def take_step(tx: Any, check_vma: bool | None) -> Callable:
    """(grads, params, state, losses) -> (params, state), on the mesh or, with None, without."""

    def step(grads: Any, params: Any, state: Any, losses: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, value=jnp.mean(losses))

    if check_vma is None:
        return step
    specs = specs_of(tx, jax.eval_shape(tx.init, PARAMS))
    return mapped(step, (SPECS, SPECS, specs, P("x")), (SPECS, specs), check_vma)


def run(txs: list[Any], check_vma: bool | None, gradients: list[Any]) -> list[Any]:
    """The parameters and states of several transformations after some steps, all in one compiled program."""
    steps = [take_step(tx, check_vma) for tx in txs]

    @quick_jit
    def step_all(grads: Any, pairs: Any, losses: Any) -> Any:
        return [step(grads, params, state, losses) for step, (params, state) in zip(steps, pairs, strict=True)]

    pairs = [(PARAMS, tx.init(PARAMS)) for tx in txs]
    for grads in gradients:
        pairs = step_all(grads, pairs, LOSSES)
    return jax.device_get(pairs)


def assert_close(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


# The numbers


def test_a_norm_counts_every_leaf_once_whatever_its_size() -> None:
    """In float64: sums of squares of ordinary numbers, and the second look at those that overflow or vanish."""

    def norms(tree: Any, axis_name: Any) -> Any:
        sizes = (1.0, 1e25, 1e-25)
        return [og.gradient_statistics(jax.tree.map(lambda x, s=s: x * s, tree), axis_name=axis_name) for s in sizes]

    for mode in (TYPED, DECLARED):
        step = mapped(functools.partial(norms, axis_name=mode["axis_name"]), (SPECS,), P(), mode["check_vma"])
        for seen, size in zip(quick_jit(step)(GRADS[0]), (1.0, 1e25, 1e-25), strict=True):
            expected = [np.linalg.norm(GRADS[0][name].astype(np.float64)) * size for name in SHAPES]
            np.testing.assert_allclose(seen.leaf_norms, expected, rtol=1e-5)
            np.testing.assert_allclose(seen.norm, np.linalg.norm(expected), rtol=1e-5)


def stack(rules: list[og.Rule], rungs: tuple[Any, ...], axis_name: Any) -> list[Any]:
    """These rules in a guard around every bound on the update, under loss scaling; and accumulation around a guard."""
    bounds = optax.chain(
        momentum(0.1),
        og.limit_step(0.05, axis_name=axis_name),
        og.limit_step(0.05, scope="leaf", axis_name=axis_name),
        og.limit_step_growth(0.05, axis_name=axis_name),
        og.clippy(absolute=0.01, axis_name=axis_name),
    )
    guarded = og.guard(bounds, *rules, recovery=rungs, check_updates=True, recorder_rows=4, axis_name=axis_name)
    accumulated = og.accumulate(og.guard(momentum(0.1), recorder_rows=4, axis_name=axis_name), 2, axis_name=axis_name)
    return [og.loss_scaling(guarded, init=4.0, axis_name=axis_name), accumulated]


def small_stack(axis_name: Any) -> list[Any]:
    rules = [og.clip_by_global_norm(1.0, axis_name=axis_name), og.clip_by_leaf_norm(0.7, axis_name=axis_name)]
    return stack(rules, (), axis_name)


def all_rules(axis_name: Any) -> list[Any]:
    rules = [entry.make(axis_name=axis_name) for entry in WITH_AXIS if entry.is_rule]
    return stack(rules, (og.reset_moments(after=2, check_every=2), og.rewind(every=2, after=3)), axis_name)


@functools.cache
def without_mesh(make: Callable[[Any], list[Any]]) -> Any:
    return run(make(None), None, [*GRADS, BAD])


@pytest.mark.parametrize(
    "make", [small_stack, pytest.param(all_rules, marks=pytest.mark.slow)], ids=["small", "all_rules"]
)
@pytest.mark.parametrize("mode", ["types", "leaf_axes"])
def test_a_stack_equals_the_run_without_a_mesh(mode: str, make: Callable[[Any], list[Any]]) -> None:
    """One NaN on one device of four holds the step on all: that states come out as `P()` proves that they agree."""
    got = run(make(MODES[mode]["axis_name"]), MODES[mode]["check_vma"], [*GRADS, BAD])
    assert_close(got, without_mesh(make))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", WITH_AXIS, ids=str)
def test_every_entry_equals_the_run_without_a_mesh(entry: Entry, mode: str) -> None:
    with entry.promotion():
        got = run([entry.make(axis_name=MODES[mode]["axis_name"])], MODES[mode]["check_vma"], [*GRADS, BAD])
        assert_close(got, run([entry.make()], None, [*GRADS, BAD]))


# What is communicated


def reductions(jaxpr: Any) -> int:
    """How many reductions between devices there are, in any depth."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name.startswith(("psum", "pmax", "pmin", "all_gather"))
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inside = getattr(inside, "jaxpr", inside)
            found += reductions(inside) if hasattr(inside, "eqns") else 0
    return found


def traced(entry: Entry, mode: str, names: tuple[str, ...]) -> int:
    """The reductions of a step with a tree of these leaves."""
    tx = entry.make(axis_name=MODES[mode]["axis_name"])
    specs = {name: SPECS[name] for name in names}
    params = {name: PARAMS[name] for name in names}
    state = jax.eval_shape(tx.init, params)
    states = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())

    def step(grads: Any, params: Any, state: Any, losses: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, value=jnp.mean(losses))

    step = mapped(step, (specs, specs, states, P("x")), (specs, states), MODES[mode]["check_vma"])
    return reductions(jax.make_jaxpr(step)(params, params, state, LOSSES).jaxpr)


# `qk_clip` reads no gradient; the reduction of its maxima is counted in tests/attention/test_composition.py.
READING = [e for e in WITH_AXIS if (not e.is_rule or "skip_spikes" in e.name) and e.name != "qk_clip"]


@pytest.mark.parametrize("entry", READING, ids=str)
def test_a_mixed_tree_is_reduced_no_more_often_than_one_sharded_leaf(entry: Entry) -> None:
    """One packed reduction a look, whatever lies where; rules have no reductions of their own but that of the loss."""
    with entry.promotion():
        for mode in ("types", "leaf_axes"):
            assert 0 < traced(entry, mode, tuple(SPECS)) <= traced(entry, mode, ("both",))


def test_with_types_what_is_replicated_throughout_is_not_reduced_at_all() -> None:
    entry = next(e for e in ENTRIES if str(e) == "guard-recovery")
    assert traced(entry, "types", ("whole",)) == 1  # the mean of the losses, which do differ


def test_only_one_module_reduces_over_axis_name() -> None:
    """Elsewhere a reduction over all of `axis_name` would count copies, or fail where types differ."""
    folder = Path(og.__file__).parent
    found = {path.name for path in folder.rglob("*.py") if re.search(r"lax\.p(sum|mean|max|min)\(", path.read_text())}
    assert found == {"axes.py", "_scan.py"}  # the latter has an axis of the batch, and no sharded leaves


# The argument


def test_leaf_axes_takes_specs_and_shardings_of_a_prefix_and_can_be_hashed_and_compared() -> None:
    specs = {"layers": P("x", None), "norm": P(), "table": P(("x", "y"), None)}
    axes = og.leaf_axes(specs)
    assert axes.names == ("x", "y")
    assert [names for _, names in axes.leaves] == [("x",), (), ("x", "y")]
    again = og.leaf_axes(jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs))
    assert axes == again
    assert hash(axes) == hash(again)
    og.guard(momentum(0.1), og.clip_by_global_norm(1.0, axis_name=axes), axis_name=again)
    with pytest.raises(ValueError, match="they must agree"):
        og.guard(momentum(0.1), og.clip_by_global_norm(1.0, axis_name="x"), axis_name=axes)


def test_a_prefix_spec_holds_for_all_below_it_and_none_for_what_it_lacks() -> None:
    tree = {"layers": [jnp.ones((2, 1)), jnp.ones(2)], "norm": jnp.ones(3), "step": jnp.ones((), jnp.int32)}

    def norm(specs: Any) -> Any:
        inside = {"layers": P("x"), "norm": P(), "step": P()}
        axes = og.leaf_axes(specs)
        return jax.eval_shape(mapped(lambda g: og.global_norm(g, axis_name=axes), (inside,), P(), False), tree)

    assert norm({"layers": P("x"), "norm": P()}).shape == ()
    with pytest.raises(ValueError, match="leaf_axes: the gradient has leaf `norm`, for which `specs` holds no"):
        norm({"layers": P("x")})


@pytest.mark.parametrize("wrong", [None, "x", 1.0, ("x",)], ids=repr)
def test_what_is_no_spec_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"leaf_axes: `specs` must hold PartitionSpecs or NamedShardings; at `a"):
        og.leaf_axes({"a": wrong})


def test_accumulate_gradients_takes_one_axis_over_which_no_parameter_is_sharded() -> None:
    with pytest.raises(ValueError, match="accumulate_gradients: `axis_name` must be one mesh axis"):
        og.accumulate_gradients(lambda p, b: jnp.sum(p * b), 2, axis_name=og.leaf_axes(SPECS))
