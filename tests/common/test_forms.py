"""A step that may or may not happen, in the form of each platform, on this CPU."""

import ast
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax import lax
from jax.sharding import PartitionSpec
from running import ROOT

import optax_guard as og
from optax_guard._common.forms import PLATFORMS, cond_or_select, form_of, lowered_for

FORMS = tuple(PLATFORMS)


def safe_root(x: jax.Array) -> jax.Array:
    """The root where it is real, and else x; the root of -1 is NaN, and so is its derivative."""
    return jnp.sum(cond_or_select(jnp.all(x >= 0), lambda: jnp.sqrt(x), lambda: x))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_selected_reaches_neither_the_result_nor_a_derivative(form: str) -> None:
    with form_of(form):
        both = quick_jit(jax.value_and_grad(lambda x: safe_root(x)))
        assert tuple(map(float, both(jnp.float32(-1)))) == (-1, 1)
        assert tuple(map(float, both(jnp.float32(4)))) == (2, 0.25)
        second = quick_jit(jax.grad(jax.grad(lambda x: safe_root(x))))
        assert float(second(jnp.float32(-1))) == 0
        assert jnp.array_equal(quick_jit(jax.vmap(lambda x: safe_root(x)))(jnp.float32([-1, 4])), jnp.float32([-1, 2]))


@pytest.mark.parametrize("form", FORMS)
def test_a_side_effect_happens_only_where_the_step_does(form: str) -> None:
    seen: list[float] = []

    def told(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda y: seen.append(float(y)), x)
        return 2 * x

    with form_of(form):
        step = quick_jit(lambda x: cond_or_select(x > 0, lambda: told(x), lambda: x))
        for x in (1.0, -1.0, 3.0):
            step(jnp.float32(x)).block_until_ready()
        jax.effects_barrier()
    assert seen == [1.0, 3.0]


@pytest.mark.parametrize("form", FORMS)
def test_keys_empty_and_integer_leaves(form: str) -> None:
    def step(on: jax.Array, key: jax.Array, n: jax.Array) -> tuple[Any, ...]:
        return cond_or_select(
            on,
            lambda: (jax.random.split(key)[0], n + 1, None, jnp.zeros((0, 2))),
            lambda: (key, n, None, jnp.ones((0, 2))),
        )

    with form_of(form):
        compiled, key = quick_jit(step), jax.random.key(1)
        for on in (True, False):
            found, n, nothing, empty = compiled(on, key, jnp.int32(3))
            assert jnp.array_equal(
                jax.random.key_data(found), jax.random.key_data(jax.random.split(key)[0] if on else key)
            )
            assert (int(n), nothing, empty.shape) == (3 + on, None, (0, 2))


@pytest.mark.parametrize("form", FORMS)
def test_inside_shard_map(form: str) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    def body(x: jax.Array) -> jax.Array:
        finite = jnp.isfinite(lax.psum(jnp.sum(x), "data"))
        return cond_or_select(finite, lambda: x + lax.psum(jnp.sum(x), "data"), lambda: x)

    with form_of(form):
        step = quick_jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
        assert jnp.array_equal(step(jnp.float32([1, 2])), jnp.float32([4, 5]))
        assert jnp.array_equal(step(jnp.float32([1, jnp.nan])), jnp.float32([1, jnp.nan]), equal_nan=True)


def test_branches_that_differ_are_refused() -> None:
    x = jnp.ones(2)
    with pytest.raises(TypeError):
        jax.eval_shape(lambda: cond_or_select(x[0] > 0, lambda: {"a": x}, lambda: {"b": x}))


@pytest.mark.parametrize("inside", [lambda f: f, jax.jit, jax.checkpoint])
def test_work_is_done_only_where_its_result_is_used(inside: Callable[..., Any]) -> None:
    def step(x: jax.Array) -> jax.Array:
        return cond_or_select(x[0, 0] > 0, lambda: inside(lambda y: y * (x @ x))(x), lambda: x)

    with form_of("gpu"):
        text = jax.jit(lambda x: step(x)).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert "conditional(" in text


def test_where_jit_is_disabled_only_the_branch_that_is_taken_runs() -> None:
    ran: list[str] = []
    with jax.disable_jit():
        for taken in (True, False):
            cond_or_select(jnp.array(taken), lambda: ran.append("act"), lambda: ran.append("hold"))
    assert ran == ["act", "hold"]


def test_the_platform_is_a_constant_of_the_lowered_program() -> None:
    traced = jax.jit(lambda: lowered_for(("gpu",))).trace()
    for platform, expected in (("cpu", "false"), ("tpu", "false"), ("cuda", "true"), ("rocm", "true")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{expected}> : tensor<i1>" in text
        assert f"dense<{'true' if expected == 'false' else 'false'}> : tensor<i1>" not in text


def test_the_form_of_a_gpu_has_no_conditional_and_that_of_a_cpu_no_selection() -> None:
    def step(params: jax.Array, ok: jax.Array) -> jax.Array:
        return cond_or_select(ok, lambda: params - jnp.sum(params), lambda: params)

    shapes = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((), bool)
    texts = {}
    for form in (*FORMS, None):
        with form_of(form):
            texts[form] = jax.jit(lambda *given: step(*given), donate_argnums=0).lower(*shapes).compile().as_text()
    assert "conditional(" not in texts["gpu"]
    assert "select(" in texts["gpu"]
    for form in ("cpu", "tpu", None):
        assert "conditional(" in texts[form]
        assert "select(" not in texts[form]


def test_an_optimizer_that_usually_runs_is_no_conditional_on_a_gpu(standard_promotion: None) -> None:
    found = {}
    for tx in (og.loss_scaling(optax.sgd(1.0)), og.accumulate(optax.sgd(1.0), 2)):
        params = jnp.ones(2)
        with form_of("gpu"):
            step = jax.jit(lambda p, s, tx=tx: og.apply_gradients(tx, p, s, p)).lower(params, tx.init(params))
        found[type(tx.init(params)).__name__] = "conditional(" in step.compile().as_text()
    assert found == {"LossScalingState": False, "AccumulateState": True}


# Why a conditional is one on every platform.
CONDITIONALS = {
    "_common/forms.py": "the form itself",
    "_step/act.py": "`accumulate`: its optimizer does not run between two cycles",
    "_step/observe.py": "the second look at a gradient without a guard: it would read everything twice",
    "recovery/_ladder.py": "an eventful step of a guard with `recovery`, which is rare",
    "recovery/_rewind.py": "snapshots in the host's memory",
}


def test_every_other_conditional_has_a_reason() -> None:
    found = set()
    for path in (ROOT / "optax_guard").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("cond", "switch"):
                found.add(path.relative_to(ROOT / "optax_guard").as_posix())
    assert found == set(CONDITIONALS)


PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.float32([0.5, -0.5])}


def _adam() -> optax.GradientTransformation:
    return optax.adam(0.1)


def _recovering() -> optax.GradientTransformation:
    rungs = og.reset_moments(after=2, check_every=3), og.back_off(), og.rewind(every=2, after=3)
    return og.guard(_adam(), og.clip_by_global_norm(1.0), og.skip_large(10.0), recovery=rungs)


def _several() -> optax.GradientTransformation:
    inner = optax.chain(optax.sgd(0.1, momentum=0.9), og.limit_step(0.01))
    return og.accumulate(og.guard(inner, og.skip_large(10.0), check_updates=True), 2)


STEPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "several": _several,
    "limit_step": lambda: og.guard(optax.chain(_adam(), og.limit_step(0.01)), og.skip_large(10.0)),
    "noise": lambda: og.guard(optax.chain(og.noise_injection(0.1, key=1), _adam()), og.clip_by_global_norm(1.0)),
    "check_updates": lambda: og.guard(_adam(), og.clip_by_global_norm(1.0), check_updates=True),
    "loss_scaling": lambda: og.loss_scaling(og.guard(_adam(), og.skip_large(10.0)), init=4.0),
    "accumulate": lambda: og.accumulate(og.guard(_adam(), og.clip_by_global_norm(1.0)), 2),
    "recovery": _recovering,
}


@pytest.mark.parametrize("name", ["several", *(pytest.param(x, marks=pytest.mark.slow) for x in [*STEPS][1:])])
def test_every_form_takes_the_same_steps(name: str, standard_promotion: None) -> None:
    """Through both ways of stepping, over ordinary, large and non-finite gradients."""
    tx = optax.with_extra_args_support(STEPS[name]())
    sizes = [0.1, 0.2, jnp.nan, 0.1, 50.0, 60.0, 70.0, 0.1, jnp.inf, 0.1, 0.1, 0.1]

    def run(params: Any, sizes: jax.Array) -> Any:
        def both(carry: Any, size: jax.Array) -> tuple[Any, Any]:
            (params, state), (others, other) = carry
            grads, value = jax.tree.map(lambda x: size * jnp.cos(3 * x), params), size * size
            params, state = og.apply_gradients(tx, grads, state, params, value=value)
            updates, other = tx.update(
                jax.tree.map(lambda x: size * jnp.cos(3 * x), others), other, others, value=value
            )
            carry = (params, state), (optax.apply_updates(others, updates), other)
            return carry, carry

        start = params, tx.init(params)
        return lax.scan(both, (start, start), sizes)[1]

    results = {}
    forms = FORMS if name == "recovery" else ("cpu", "gpu")
    for form in forms:
        with form_of(form):
            results[form] = quick_jit(lambda *given: run(*given))(PARAMS, jnp.float32(sizes))
    paths = jax.tree_util.tree_leaves_with_path(results["cpu"])
    for form in forms[1:]:
        for (path, expected), leaf in zip(paths, jax.tree.leaves(results[form]), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), path


@pytest.mark.parametrize("form", FORMS)
def test_numpy_arrays_that_vmap_maps_over_are_constants_like_others(form: str) -> None:
    rates = np.float32([0.1, 0.2])

    def step(rate: Any, params: jax.Array) -> jax.Array:
        return cond_or_select(params[0] > 0, lambda: params * rate, lambda: params)

    with form_of(form):
        assert jnp.array_equal(
            quick_jit(lambda c: jax.vmap(step)(rates, c))(jnp.ones((2, 3))), np.outer(rates, np.ones(3))
        )
        nested = quick_jit(lambda c: jax.vmap(jax.vmap(step, (0, None)), (None, 0))(rates, c))
        assert jnp.array_equal(nested(jnp.ones((2, 3)))[1], np.outer(rates, np.ones(3)))
