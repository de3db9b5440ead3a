# pyright: standard, reportUnnecessaryTypeIgnoreComment=true
"""What a type checker must refuse, one call a line: an ignore of what is no error is an error in turn."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_guard as og
from optax_guard.flax import dot_product_attention
from optax_guard.models import Transformer

adam = optax.adam(1e-3)
x = jnp.ones((3, 2, 1))


def words_that_no_option_knows() -> None:
    og.accumulate(adam, 2, on_nonfinite="drop")  # pyright: ignore[reportArgumentType]
    og.accumulate(adam, 2, reduction="meen")  # pyright: ignore[reportArgumentType]
    og.accumulate_gradients(jnp.mean, 2, on_nonfinite="drop")  # pyright: ignore[reportArgumentType]
    og.accumulate_gradients(jnp.mean, 2, remainder="drop")  # pyright: ignore[reportArgumentType]
    og.adagc(scope="layer")  # pyright: ignore[reportArgumentType]
    og.attention_with_max_logits(x, x, x, implementation="gpu")  # pyright: ignore[reportArgumentType]
    og.clip_by_median_norm(scope="layer")  # pyright: ignore[reportArgumentType]
    og.clip_by_norm_history(scope="layer")  # pyright: ignore[reportArgumentType]
    og.dense_penalty(0.1, penalty="l1")  # pyright: ignore[reportArgumentType]
    og.limit_step(0.1, scope="layer")  # pyright: ignore[reportArgumentType]
    og.noise_injection(distribution="normal")  # pyright: ignore[reportArgumentType]
    og.noise_injection(relative_to="weights")  # pyright: ignore[reportArgumentType]
    og.perturb_weights(jnp.mean, 0.1, relative_to="gradient")  # pyright: ignore[reportArgumentType]
    og.proximal_elastic_net(adam, 0.1, 0.1, metric="adam")  # pyright: ignore[reportArgumentType]
    og.proximal_group_lasso(adam, 0.1, metric="adam")  # pyright: ignore[reportArgumentType]
    og.proximal_l1(adam, 0.1, metric="adam")  # pyright: ignore[reportArgumentType]
    og.rewind(memory="disk")  # pyright: ignore[reportArgumentType]
    og.shrink_gradients(0.1, shrinkage="hard")  # pyright: ignore[reportArgumentType]
    og.skip_spikes(on="losss")  # pyright: ignore[reportArgumentType]
    og.zclip(mode="median")  # pyright: ignore[reportArgumentType]
    dot_product_attention(x, x, x, implementation="gpu")  # pyright: ignore[reportArgumentType]
    Transformer(2, 2, init="zero", rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]


def what_is_no_rule_and_no_rung() -> None:
    og.guard(adam, og.clip_by_value(1.0))  # pyright: ignore[reportArgumentType]
    og.guard(adam, og.skip_spikes)  # pyright: ignore[reportArgumentType]
    og.guard(adam, recovery=(og.rewind,))  # pyright: ignore[reportArgumentType]
    og.guard(adam, recovery=og.rewind())  # pyright: ignore[reportArgumentType]
    og.stabilize(adam, max_change="steep")  # pyright: ignore[reportArgumentType]
    og.stabilize(adam, recovery=(og.reset_moments,))  # pyright: ignore[reportArgumentType]
    og.rule(lambda params: params, lambda statistics: statistics)  # pyright: ignore[reportArgumentType]


def a_step_returns_the_type_of_the_parameters(params: dict[str, jax.Array], grads: dict[str, jax.Array]) -> None:
    state = adam.init(params)
    params, state = og.apply_gradients(adam, grads, state, params)
    assert_type(og.apply_gradients(adam, grads, state, params), tuple[dict[str, jax.Array], optax.OptState])
    missing = params.missing  # pyright: ignore[reportAttributeAccessIssue]
    taken: list[jax.Array] = og.apply_gradients(adam, grads, state, params)[0]  # pyright: ignore[reportAssignmentType]
    kept: int = og.keep_if_held(state, params, params)  # pyright: ignore[reportAssignmentType]
    flushed: int = og.flush(adam, state, params)[0]  # pyright: ignore[reportAssignmentType]
    cleared: int = og.clear_halt(og.rules.ClipState(jnp.zeros(())))  # pyright: ignore[reportAssignmentType]
    del missing, taken, kept, flushed, cleared
