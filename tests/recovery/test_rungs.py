"""The ladder: what it does, when, in which order, and that nothing else changes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import in_place, quick_jit
from helpers import bits, filled

import optax_guard as og
from optax_guard.recovery._loss_watch import empty_watch, loss_above, watch_loss

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3) - 2.5, "scale": jnp.asarray(1.5)}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def optimizer() -> optax.GradientTransformation:
    """Moments, their age, a schedule's counter, and a key."""
    return optax.chain(og.noise_injection(1e-4, key=3), optax.adamw(optax.cosine_decay_schedule(0.1, 100)))


class Run:
    """A guarded run, step by step, through one jitted step."""

    def __init__(self, tx: Any, params: Any = PARAMS, fast: bool = True) -> None:
        def step(params: Any, state: Any, grads: Any, value: Any) -> Any:
            if fast:
                return og.apply_gradients(tx, grads, state, params, value=value)
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        self.tx, self.step = tx, quick_jit(step)
        self.params, self.state = params, tx.init(params)

    def go(self, *sizes: float, loss: float = 1.0) -> "Run":
        for size in sizes:
            grads = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), self.params)
            self.params, self.state = self.step(self.params, self.state, grads, jnp.float32(loss))
        return self

    @property
    def metrics(self) -> dict[str, Any]:
        return jax.device_get(og.metrics(self.state))

    @property
    def log(self) -> Any:
        return og.flight_log(self.state)


NAN, LARGE = float("nan"), 1e3


def guarded(*recovery: Any, inner: Any = None, **options: Any) -> Any:
    return og.guard(optimizer() if inner is None else inner, og.skip_large(100.0), recovery=recovery, **options)


# reset_moments


def test_a_reset_starts_moments_and_their_age_anew_and_keeps_all_else() -> None:
    run = Run(guarded(og.reset_moments(after=2))).go(0.5, 0.7, LARGE)
    before = run.params, run.state.guarded_state
    run.go(NAN)  # a refused step and a non-finite one are both trouble
    fresh, get = run.tx.init(PARAMS).guarded_state, optax.tree.get
    assert bits(run.params) == bits(before[0])
    for name in ("mu", "nu"):
        assert bits(get(run.state.guarded_state, name)) == bits(get(fresh, name))
    counts = dict(optax.tree.get_all_with_path(run.state.guarded_state, "count"))
    assert sorted(int(x) for x in counts.values()) == [0, 2]  # Adam's age and the schedule's counter
    assert int(get(run.state, "noise_step")) == 2
    assert bits(get(run.state, "noise_key")) == bits(get(before[1], "noise_key"))
    assert (run.log["event"][-1], run.log["recovery"][-1]) == ("nonfinite", "reset_refused")
    assert run.metrics["guard/reset_total"] == 1
    run.go(NAN, NAN, NAN)
    assert run.metrics["guard/reset_total"] == 1  # once a row
    run.go(0.5, LARGE, LARGE)
    assert run.metrics["guard/reset_total"] == 2


def test_the_first_update_after_a_reset_is_that_of_a_new_optimizer() -> None:
    """With the old count, Adam's bias correction would make it 3 times, and ten steps on 6.5 times as large."""
    adam = optax.adam(0.1)
    run = Run(guarded(og.reset_moments(after=1), inner=adam)).go(*[0.5] * 30, LARGE)
    before = run.params
    run.go(0.5)
    updates, _ = adam.update(filled(PARAMS, 0.5), adam.init(before), before)
    chex.assert_trees_all_close(run.params, optax.apply_updates(before, updates), rtol=1e-6)


def test_what_a_moment_is_by_optimizer() -> None:
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=0.25)
    for inner, kept in (
        (injected, {"learning_rate": 0.25}),
        (optax.chain(optax.flatten(optax.scale_by_adam()), optax.scale(-0.1)), {}),
        (optax.adafactor(0.1, min_dim_size_to_factor=2), {}),
        (optax.masked(optax.lion(0.1), {"kernel": True, "scale": False}), {}),
        (optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"kernel": "a", "scale": "b"}), {}),
        (og.guard(optax.adam(0.1), og.skip_large(1e9)), {}),
        (optax.sgd(0.1), {}),
    ):
        run = Run(guarded(og.reset_moments(after=1), inner=inner)).go(0.5, 0.7, LARGE)
        fresh = jax.tree.leaves(run.tx.init(PARAMS).guarded_state)
        for (path, leaf), new in zip(jax.tree_util.tree_leaves_with_path(run.state.guarded_state), fresh, strict=True):
            if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact) and "recorder" not in str(path):
                np.testing.assert_array_equal(leaf, new, err_msg=str(path))
        for name, number in kept.items():
            assert optax.tree.get(run.state, name) == number


def poisoned(state: Any, number: float) -> Any:
    """A state whose second moment holds `number`, as a checkpoint of an unguarded run may."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    spoilt = [jnp.full_like(x, number) if ".nu[" in jax.tree_util.keystr(path) else x for path, x in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), spoilt)


@pytest.mark.parametrize(("number", "reason"), [(np.inf, "reset_nonfinite"), (1e30, "reset_frozen")])
def test_silent_death_is_found_told_and_ended(number: float, reason: str) -> None:
    adam = optax.adam(0.1)
    bare_params, bare_state = PARAMS, poisoned(adam.init(PARAMS), number)
    bare_step = quick_jit(lambda p, s: adam.update(filled(PARAMS, 0.5), s, p))
    for _ in range(50):
        updates, bare_state = bare_step(bare_params, bare_state)
        bare_params = optax.apply_updates(bare_params, updates)
    assert bits(bare_params) == bits(PARAMS)  # the illness: no number is wrong, and nothing moves

    run = Run(guarded(og.reset_moments(check_every=5), inner=adam)).go(*[0.5] * 12)
    moved = run.params
    run.state = poisoned(run.state, number)
    run.go(*[0.5] * 12)
    assert bits(run.params) != bits(moved)
    assert reason in run.log["recovery"]
    assert run.metrics["guard/silent_death_total"] == 1
    assert run.metrics["guard/moments_finite"]
    chex.assert_tree_all_finite(run.state)
    healthy = run.params
    run.go(0.5)
    chex.assert_trees_all_close(run.params, jax.tree.map(lambda x: x - 0.1, healthy), rtol=1e-4, atol=1e-5)
    run.go(*[0.5] * 20)
    assert run.metrics["guard/silent_death_total"] == 1


def test_dead_moments_of_a_checkpoint_are_found_at_the_first_step() -> None:
    run = Run(guarded(og.reset_moments(), inner=optax.adam(0.1)))
    run.state = poisoned(run.state, np.inf)
    run.go(0.5)
    assert not run.metrics["guard/moments_finite"]
    run.go(0.5)
    assert (run.log["event"][-1], run.log["recovery"][-1]) == ("recovery", "reset_nonfinite")


def test_frozen_layers_zero_gradients_held_steps_and_zero_rates_are_no_silent_death() -> None:
    frozen = optax.partition({"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"kernel": "b", "scale": "a"})
    run = Run(guarded(og.reset_moments(after=50, check_every=2), inner=frozen)).go(*[0.5] * 9)
    assert run.metrics["guard/frozen_leaves"] == 0
    run = Run(guarded(og.reset_moments(after=50, check_every=2), inner=optax.sgd(0.1))).go(0.5, 0.5, 0.5, *[0.0] * 6)
    run.go(0.5, *[NAN] * 6, 0.5)
    assert run.metrics["guard/silent_death_total"] == 0
    warm_up = optax.adam(lambda step: jnp.where(step < 6, 0.0, 0.1))
    run = Run(guarded(og.reset_moments(check_every=2), inner=warm_up)).go(*[0.5] * 12)
    assert run.metrics["guard/silent_death_total"] == 0


# back_off


def test_back_off_steps_down_once_a_row_and_comes_back_exactly() -> None:
    run = Run(guarded(og.back_off(0.5, recover_after=4), inner=optax.sgd(1.0)))
    plain = Run(guarded(inner=optax.sgd(1.0)))
    scales, params = [], []
    for size in (0.5, LARGE, NAN, NAN, 0.5, 0.5, 0.5, 0.5, 0.5):
        run.go(size)
        plain.go(size)
        scales.append(float(run.metrics["guard/update_scale"]))
        params.append(float(run.params["scale"]))
    np.testing.assert_allclose(scales, [1, 0.5, 0.5, 0.5, 0.5, 0.5**0.75, 0.5**0.5, 0.5**0.25, 1], rtol=1e-6)
    np.testing.assert_allclose(np.diff(params)[3:], -0.5 * np.array(scales[4:]), rtol=1e-5)
    assert scales[-1] == 1.0
    assert list(run.log["recovery"]) == ["", "back_off"] + [""] * 7


def test_back_off_never_falls_below_its_lowest() -> None:
    run = Run(guarded(og.back_off(0.5, recover_after=10, lowest=0.2), inner=optax.sgd(1.0)))
    run.go(*[LARGE, 0.5] * 9)
    assert 0.2 <= run.metrics["guard/update_scale"] <= 0.25


def test_back_off_alone_scales_zeroes_what_is_not_finite_and_asks_for_no_loss() -> None:
    tx = optax.chain(optax.sgd(1.0), og.back_off(0.5, recover_after=2, diverged=2.0))
    state, one = tx.init(PARAMS), filled(PARAMS, 1.0)
    step = quick_jit(tx.update)
    updates, state = step(filled(PARAMS, NAN), state)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates))
    updates, state = step(one, state)
    np.testing.assert_array_equal(updates["kernel"], -0.5)
    for _ in range(30):
        updates, state = step(one, state, value=jnp.float32(1.0))
    np.testing.assert_array_equal(updates["kernel"], -1.0)
    seen = []
    for _ in range(40):
        updates, state = step(one, state, value=jnp.float32(10.0))
        seen.append(float(updates["scale"]))
    assert seen.count(-0.5) == 2  # the step at which the loss comes to exceed twice its best, and the next
    _, state = step(one, state, value=jnp.float32(NAN))
    assert float(state[1].update_scale) == 0.5
    chex.assert_tree_all_finite(state)


# rewind


def test_after_a_rewind_training_is_bit_identical_to_the_snapshot() -> None:
    healthy = [0.5, 0.3, 0.7, 0.2, 0.9]
    run = Run(guarded(og.rewind(every=5, after=3))).go(0.5)  # the first healthy step takes a snapshot
    snapshot, later = (run.params, run.state.guarded_state), (0.4, 0.6)
    run.go(*healthy[:3], LARGE, NAN)
    assert bits(run.params) != bits(snapshot[0])
    run.go(LARGE)
    assert bits((run.params, run.state.guarded_state)) == bits(snapshot)
    assert (run.log["event"][-1], run.log["recovery"][-1]) == ("skipped", "rewind_refused")
    assert run.metrics["guard/rewind_total"] == 1
    # and so is what follows: the run goes on as one that was never led astray
    other = Run(guarded(og.rewind(every=5, after=3))).go(0.5)
    assert bits(run.go(*later).params) == bits(other.go(*later).params)
    assert bits(run.state.guarded_state) == bits(other.state.guarded_state)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.float32, "memory": "host"}], ids=["device", "host"])
def test_a_diverged_loss_leads_back_to_the_newest_snapshot_and_then_to_the_one_before(options: dict) -> None:
    run = Run(guarded(og.rewind(every=40, keep=2, **options))).go(*[0.1] * 81)
    seen = {}

    def diverge() -> int:
        before = run.metrics["guard/rewind_total"]
        for _ in range(60):
            run.go(0.3, loss=5.0)
            if run.metrics["guard/rewind_total"] > before:
                return int(run.metrics["guard/snapshot_step"])
        raise AssertionError("no rewind")

    steps = {1: None, 41: None, 81: None}
    for when in (diverge(), diverge()):
        seen[when] = run.params
    assert list(seen) == [81, 41]
    assert set(seen) < set(steps)
    assert int(run.metrics["guard/best_loss"]) == 1
    assert run.log["recovery"][-1] == "rewind_diverged"
    assert run.log["event"][-1] == "recovery"
    reference = Run(guarded(og.rewind(every=40, keep=2))).go(*[0.1] * 41)
    assert bits(run.params) == bits(reference.params)
    run.go(*[0.1] * 40)  # healthy again: a new snapshot, rewinds are counted anew
    assert int(optax.tree.get(run.state, "rewinds_in_row")) == 0


def test_when_rewinds_do_not_help_the_guard_halts_and_says_why() -> None:
    run = Run(guarded(og.rewind(every=500, attempts=2))).go(*[0.1] * 40)
    for _ in range(90):
        run.go(0.1, loss=8.0)
    assert run.metrics["guard/rewind_total"] == 2
    assert "gave_up" in run.log["recovery"]
    with pytest.raises(og.TrainingHalted, match="diverged again after every rewind"):
        og.raise_if_halted(run.state, run.params)
    held = run.params
    assert bits(run.go(0.1).params) == bits(held)
    run.state = og.clear_halt(run.state)
    run.go(*[0.1] * 60, loss=8.0)  # the new level is taken for what it is
    og.raise_if_halted(run.state)
    assert run.metrics["guard/rewind_total"] == 2


def test_spikes_noise_and_a_missing_loss_lead_nowhere() -> None:
    rng = np.random.default_rng(0)
    watch, above = empty_watch(), []
    step = quick_jit(lambda w, v: watch_loss(w, v, jnp.ones((), bool)))
    for i in range(600):
        loss = 2.0 / (1 + 0.05 * i) * np.exp(0.3 * rng.standard_normal()) + 0.05
        loss = 1e6 if i % 97 < 5 and i > 60 else NAN if i % 50 == 7 else loss
        watch = step(watch, jnp.float32(loss))
        above.append(bool(loss_above(watch, 2.0)))
    assert not any(above)
    chex.assert_tree_all_finite(watch)
    tx = guarded(og.rewind(), og.back_off(diverged=2.0))
    _, state = og.apply_gradients(tx, filled(PARAMS, 0.1), tx.init(PARAMS), PARAMS)
    assert og.metrics(state)["guard/rewind_total"] == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("factor", "within"), [(8.0, 12), (3.0, 36)])
def test_the_watch_follows_its_equations_and_notices_in_the_stated_time(
    sign: float, factor: float, within: int
) -> None:
    """s, b and the verdict in NumPy float64; a loss of level -1 rises by the same amount."""
    losses = [sign] * 60 + [sign + (factor - 1)] * within
    s = b = first = 0.0
    watch, verdict = empty_watch(), False
    for n, loss in enumerate(losses):
        first = loss if n == 0 else first
        c = max(abs(s), abs(first) / 100)
        s += max(1 / (n + 1), 1 / 50) * ((loss if n == 0 else min(loss, s + 3 * c)) - s)
        b = s if n < 10 else min(b, s)
        verdict = n >= 24 and s - b > max(abs(b), abs(first) / 100)
        watch = watch_loss(watch, jnp.float32(loss), jnp.ones((), bool))
        assert bool(loss_above(watch, 2.0)) == verdict or abs(s - b - abs(b)) < 1e-4
        np.testing.assert_allclose([watch.smoothed_loss, watch.best_loss], [s, b], rtol=1e-4, atol=1e-5)
    assert verdict or sign < 0


def test_a_copy_in_bfloat16_comes_back_in_the_parameters_dtype() -> None:
    run = Run(guarded(og.rewind(every=5, after=2, dtype=jnp.bfloat16))).go(0.5)
    snapshot = run.params
    run.go(0.3, 0.3, LARGE, LARGE)
    chex.assert_trees_all_equal_shapes_and_dtypes(run.params, snapshot)
    chex.assert_trees_all_close(run.params, snapshot, rtol=4e-3)
    stored = jax.tree.leaves(optax.tree.get(run.state, "snapshots"))
    assert {x.dtype.name for x in stored if jnp.issubdtype(x.dtype, jnp.inexact)} == {"bfloat16"}


def test_through_update_the_rewind_is_right_to_rounding() -> None:
    recovery = (og.rewind(every=5, after=2), og.reset_moments(after=1), og.back_off())
    sizes = (0.5, 0.3, 0.3, LARGE, LARGE, 0.4, 0.2)
    one = Run(guarded(*recovery)).go(*sizes)
    two = Run(guarded(*recovery), fast=False).go(*sizes)
    assert one.metrics["guard/rewind_total"] == 1
    chex.assert_trees_all_close((one.params, one.state), (two.params, two.state), rtol=2e-6)


# The ladder


def test_rungs_act_in_the_ladders_order_whatever_the_order_of_the_arguments() -> None:
    rungs = og.rewind(every=3, after=2), og.back_off(after=2), og.reset_moments(after=2)
    for order in (rungs, rungs[::-1]):
        run = Run(guarded(*order)).go(0.5, 0.5, LARGE, LARGE)
        assert run.log["recovery"][-1] == "back_off+rewind_refused"  # the rewind brings the moments with it
        assert run.metrics["guard/reset_total"] == 0


def test_a_halted_guard_climbs_no_further() -> None:
    run = Run(guarded(og.reset_moments(after=3), og.rewind(after=3), og.back_off(), halt_after=3)).go(0.5, *[NAN] * 3)
    before = run.state.recovery_state, run.params
    run.go(NAN, LARGE, 0.5, NAN, NAN)
    assert bits((run.state.recovery_state, run.params)) == bits(before)


def test_an_update_that_is_not_finite_is_trouble_at_the_next_step() -> None:
    half = {"w": jnp.ones(3, jnp.float16)}
    tx = og.guard(optax.adam(1e-3), check_updates=True, recovery=(og.back_off(), og.reset_moments(after=2)))
    run = Run(tx, half).go(1e-6, 1e-6, 1e-6)  # its square is 0 in float16, and Adam divides by it
    assert list(run.log["event"]) == ["nonfinite_update"] * 2 + ["recovery"]
    assert list(run.log["recovery"]) == ["", "back_off", "reset_refused"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_and_losses_of_zero_are_no_trouble(dtype: str) -> None:
    """Batches with nothing in them; float16 Adam makes NaN of their zeros, which is held and calls for no rung."""
    rungs = og.reset_moments(after=5, check_every=4), og.back_off(diverged=1.5), og.rewind(every=8, diverged=1.5)
    rules = og.skip_spikes(window=8), og.clip_by_norm_history()
    tx = og.guard(optax.adam(0.01), *rules, recovery=rungs, check_updates=True)
    run = Run(tx, jax.tree.map(lambda x: x.astype(dtype), PARAMS))
    for losses in (0.0, 1.0, 0.0, 1.0):
        run.go(*[losses] * 25, loss=losses)
    assert set(run.log["recovery"]) == {""}
    assert run.metrics["guard/trouble_in_row"] == 0
    assert set(run.log["event"]) <= {"applied", "nonfinite_update"}


@in_place
def test_without_recovery_there_is_no_state_and_with_it_the_step_copies_nothing() -> None:
    assert og.guard(optax.sgd(1.0)).init(PARAMS).recovery_state == ()
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(4)}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    tx = og.guard(optax.adamw(1e-3), recovery=(og.reset_moments(), og.back_off(), og.rewind(keep=2)))
    step = jax.jit(lambda p, s, g, v: og.apply_gradients(tx, g, s, p, value=v), donate_argnums=(0, 1))
    analysis = step.lower(params, tx.init(params), params, jnp.float32(1.0)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 0.05 * size


SGD = optax.sgd(0.1)
WRONG = {
    "after": (lambda: og.reset_moments(after=0), "reset_moments: `after` 0 >= 1"),
    "check_every": (lambda: og.reset_moments(check_every=0), "reset_moments: `check_every` 0 >= 1"),
    "factor of 1": (lambda: og.back_off(1.0), "back_off: `factor` 1.0 (0, 1)"),
    "factor of 0": (lambda: og.back_off(0), "back_off: `factor` 0 (0,"),
    "array as factor": (lambda: og.back_off(jnp.ones(2)), "back_off: `factor` (0, 1)"),
    "recover_after": (lambda: og.back_off(recover_after=0), "back_off: `recover_after` 0 >= 1"),
    "lowest": (lambda: og.back_off(lowest=-0.1), "back_off: `lowest` -0.1 (0,"),
    "diverged of back_off": (lambda: og.back_off(diverged=1.0), "back_off: `diverged` 1.0 (1,"),
    "lowest of 1": (lambda: og.back_off(lowest=1.0), "back_off: `lowest` 1.0 1)"),
    "traced factor": (lambda: jax.jit(og.back_off)(0.5), "back_off: `factor` (0, 1)"),
    "traced bar of back_off": (lambda: jax.jit(lambda x: og.back_off(diverged=x))(2.0), "back_off: `diverged` (1,"),
    "traced bar of rewind": (lambda: jax.jit(lambda x: og.rewind(diverged=x))(2.0), "rewind: `diverged` (1,"),
    "every": (lambda: og.rewind(every=0), "rewind: `every` 0 >= 1"),
    "keep": (lambda: og.rewind(keep=0), "rewind: `keep` 0 >= 1"),
    "diverged": (lambda: og.rewind(diverged=0.5), "rewind: `diverged` 0.5 (1,"),
    "attempts": (lambda: og.rewind(attempts=0), "rewind: `attempts` 0 >= 1"),
    "dtype": (lambda: og.rewind(dtype=jnp.float16), "rewind: `dtype` bfloat16 float16"),
    "memory": (lambda: og.rewind(memory="disk"), "rewind: `memory` 'disk' 'device' 'host'"),
    "one rung": (lambda: og.guard(SGD, recovery=og.back_off()), "guard: `recovery` tuple"),
    "no rung": (lambda: og.guard(SGD, recovery=(SGD,)), "guard: `recovery` tuple GradientTransformation"),
    "twice": (lambda: og.guard(SGD, recovery=(og.back_off(), og.back_off())), "guard: `recovery` `back_off` twice"),
    "halts first": (
        lambda: og.guard(SGD, recovery=(og.rewind(after=20),), halt_after=10),
        "guard: `rewind(after=20)` `halt_after` 10",
    ),
    "params": (
        lambda: guarded(og.rewind()).update(filled(PARAMS, 1.0), guarded(og.rewind()).init(PARAMS)),
        "guard: `recovery=(rewind(...),)` needs the parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_with_function_value_and_range(case: str) -> None:
    call, words = WRONG[case]
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    missing = [word for word in words.split(" ") if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
