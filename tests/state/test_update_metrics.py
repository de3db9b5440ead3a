"""Norms of an update and of the parameters, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_guard as og

RNG = np.random.default_rng(0)
BEFORE = {
    "a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "deep": {"b": jnp.asarray(RNG.normal(size=5), jnp.bfloat16), "c": jnp.asarray(RNG.normal(size=2), jnp.complex64)},
    "empty": jnp.zeros((0, 2)),
    "half": jnp.asarray(RNG.normal(size=3), jnp.float16),
    "index": jnp.arange(3),
    "large": jnp.full(4, 1e30),
    "none": None,
    "zero": jnp.zeros(2),
}
AFTER = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else (x * 1.01 + 0.02).astype(x.dtype), BEFORE)
LEAVES = ("a", "deep/b", "deep/c", "empty", "half", "large", "zero")


def leaf(tree: Any, path: str) -> np.ndarray:
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree).astype(np.complex128)


def norm(arrays: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in arrays)))


def oracle() -> dict[str, float]:
    """From the definitions, with the leaves that have a gradient."""
    numbers = {}
    for prefix, paths in [("update", LEAVES), *((f"update/{path}", (path,)) for path in LEAVES)]:
        moved = norm([leaf(AFTER, path) - leaf(BEFORE, path) for path in paths])
        size = norm([leaf(BEFORE, path) for path in paths])
        ratio = 0.0 if moved == 0 else np.inf if size == 0 else moved / size
        numbers |= {f"{prefix}/norm": moved, f"{prefix}/param_norm": size, f"{prefix}/ratio": ratio}
    return numbers


def assert_close(numbers: dict[str, Any], expected: dict[str, float]) -> None:
    assert set(numbers) == set(expected)
    for name, number in expected.items():
        np.testing.assert_allclose(numbers[name], number, rtol=3e-5, err_msg=name)
        assert numbers[name].dtype == jnp.float32


def test_every_number_is_that_of_its_definition() -> None:
    expected = oracle()
    assert_close(og.update_metrics(BEFORE, AFTER, leaves=True), expected)
    of_tree = {name: number for name, number in expected.items() if name.count("/") == 1}
    assert set(of_tree) == {"update/norm", "update/param_norm", "update/ratio"}
    assert_close(quick_jit(og.update_metrics)(BEFORE, AFTER), of_tree)


def test_a_16_bit_leaf_that_stands_still_has_moved_by_nothing_and_so_has_a_held_step() -> None:
    params = {"w": np.ones(3, np.float32), "half": jnp.ones(3, jnp.bfloat16)}
    moved = {"w": params["w"] + np.float32(1e-4), "half": params["half"] + jnp.bfloat16(1e-4)}
    numbers = og.update_metrics(params, moved, leaves=True)
    assert (float(numbers["update/half/norm"]), float(numbers["update/half/ratio"])) == (0, 0)
    np.testing.assert_allclose(numbers["update/w/ratio"], 1e-4, rtol=1e-2)
    held = og.update_metrics(params, params, leaves=True)
    assert not any(float(number) for name, number in held.items() if "param" not in name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_shown_where_it_is_and_in_the_tree(bad: float) -> None:
    ones = np.ones(2, np.float32)
    before, after = {"x": ones, "y": ones}, {"x": ones * np.float32(bad), "y": ones}
    numbers = og.update_metrics(before, after, leaves=True)
    assert not any(np.isfinite(numbers[f"update{leaf}/{name}"]) for leaf in ("", "/x") for name in ("norm", "ratio"))
    assert float(numbers["update/y/norm"]) == 0
    with jax.debug_nans(True), jax.debug_infs(True):
        og.update_metrics(before, after, leaves=True)


def test_variables_of_nnx_have_the_names_of_their_paths() -> None:
    before, after = ({"dense": {"kernel": nnx.Param(np.full(2, size, np.float32))}} for size in (1, 2))
    numbers = og.update_metrics(before, after, leaves=True)
    assert {name.rsplit("/", 1)[0] for name in numbers} == {"update", "update/dense/kernel"}
    assert float(numbers["update/ratio"]) == 1


def test_sharded_parameters_have_the_norm_of_the_whole() -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    before, after = {"w": jnp.arange(4.0)}, {"w": jnp.arange(4.0) + 0.5}
    whole = og.update_metrics(before, after)

    def here(old: Any, new: Any) -> Any:
        return og.update_metrics(old, new, axis_name="x")

    parts = jax.shard_map(here, mesh=mesh, in_specs=P("x"), out_specs=P())
    for name, number in quick_jit(parts)(before, after).items():
        np.testing.assert_allclose(number, whole[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"w": jnp.ones(2)}, "`b`"),
        ({"w": jnp.ones(3), "b": jnp.ones(1)}, "`w`"),
        ({"w": jnp.ones(2), "b": None}, "`b`"),
        ({"w": jnp.ones(2), "b": "1"}, "`b`"),
    ],
)
def test_trees_that_differ_are_named_by_leaf(after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"update_metrics: .*{message}"):
        og.update_metrics({"w": jnp.ones(2), "b": jnp.ones(1)}, after)


def test_parameters_that_were_donated_are_told_to_be_copied() -> None:
    before = {"w": jnp.ones(2)}
    before["w"].delete()
    with pytest.raises(ValueError, match=r"update_metrics: `before` was donated .* jax.tree.map\(jnp.copy, params\)"):
        og.update_metrics(before, {"w": jnp.ones(2)})
