"""A bound on the update's norm writes it out once: what it costs beyond the optimizer is one temporary copy."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    "bound",
    [
        og.limit_step(0.01),
        og.limit_step(0.01, scope="leaf"),
        og.clip_by_update_norm(),
        og.published.clip_by_update_norm(),
    ],
    ids=["limit_step", "leaf", "update_norm", "published"],
)
def test_the_update_is_written_out_once(bound: optax.GradientTransformationExtraArgs) -> None:
    params = {f"kernel_{i}": jax.ShapeDtypeStruct((128, 256), jnp.float32) for i in range(3)}
    size = sum(x.size * 4 for x in jax.tree.leaves(params))
    tx = optax.chain(optax.adamw(1e-3), bound)

    def step(grads: optax.Updates, params: optax.Params, state: optax.OptState) -> tuple[optax.Params, optax.OptState]:
        return og.apply_gradients(tx, grads, state, params)

    state = jax.eval_shape(tx.init, params)
    memory = jax.jit(step, donate_argnums=(1, 2)).lower(params, params, state).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.2 * size  # 2.0 if every reader computes the last product again
