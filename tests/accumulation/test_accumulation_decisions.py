"""What `accumulate` makes of random streams of micro-batches, call by call, against its rules in plain Python.

One compilation for each setting: all streams at once, under `vmap`, and `scan` over their calls.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

STREAMS, CALLS = 16, 20
SQUARABLE = float(np.sqrt(np.finfo(np.float32).max))
REDUCTION = {"a": "mean", "b": "sum", "c": "max", "d": "last"}
FACTORS = {"a": 1.0, "b": 1.2e4, "c": -1.5, "d": 0.5}  # of the call's number, leaf by leaf
NARROW = ("a", "b")  # in float16
pytestmark = pytest.mark.usefixtures("standard_promotion")


class Setting(NamedTuple):
    every: Any
    on_nonfinite: str
    guarded: bool
    weighted: bool
    valued: bool


SETTINGS = {
    "drop_micro": Setting(3, "drop_micro", True, True, True),
    "drop_cycle": Setting(2, "drop_cycle", True, False, True),
    "propagate": Setting(3, "propagate", True, True, True),
    "alone": Setting(1, "drop_micro", True, False, True),
    "alone, weighted": Setting(1, "drop_cycle", True, True, False),
    "schedule": Setting(lambda emitted: emitted % 3, "drop_micro", False, True, False),
}


def remembering() -> optax.GradientTransformationExtraArgs:
    """Counts its calls and keeps what the last one brought."""

    def init(params: Any) -> Any:
        return {
            "step": jnp.zeros((), jnp.int32),
            "value": jnp.full((), -1.0),
            "gradient": jax.tree.map(jnp.zeros_like, params),
        }

    def update(updates: Any, state: Any, params: Any = None, *, value: Any = -1.0, **extra: Any) -> Any:
        new = {"step": state["step"] + 1, "value": jnp.asarray(value, jnp.float32), "gradient": updates}
        return jax.tree.map(jnp.negative, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def gradient(size: Any) -> dict[str, Any]:
    return {k: (size * f * jnp.ones(2)).astype(jnp.float16 if k in NARROW else jnp.float32) for k, f in FACTORS.items()}


def streams(setting: Setting, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def drawn(numbers: dict[float, float]) -> Any:
        shares = np.array(list(numbers.values()))
        return rng.choice(list(numbers), (STREAMS, CALLS), p=shares / shares.sum()).astype(np.float32)

    size = drawn({0.0: 1, 1e-25: 1.5, 0.5: 3, 1.0: 3, -2.0: 2, np.nan: 0.6, np.inf: 0.2})
    calls = {"size": size, "spoilt": rng.random((STREAMS, CALLS)) < 0.1}  # a NaN in the leaf `c` alone
    if setting.weighted:
        calls["weight"] = drawn(
            {0.0: 2, 0.25: 2, 1.0: 3, 3.0: 3, 5e37: 0.5, 3e38: 0.3, 1e19: 0.3, -1.0: 0.5, np.nan: 0.3}
        )
    if setting.valued:
        calls["value"] = drawn({1.5: 3, 4.0: 3, -1.0: 1, 0.0: 1, np.nan: 0.3, np.inf: 0.2})
    return calls


class Oracle:
    """A cycle as a list of what it kept."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.log = setting, []
        self.counts = dict.fromkeys(("emitted_total", "dropped_total", "empty_total"), 0)
        self.inner = {"step": 0, "value": -1.0, "gradient": {k: np.zeros(2) for k in FACTORS}}
        self.begin()

    def begin(self) -> None:
        """A cycle."""
        self.kept, self.micro_step, self.dropped = [], 0, 0

    def call(self, gradient: dict[str, Any], weight: float, loss: float | None) -> None:
        s = self.setting
        norms = [np.linalg.norm(np.where(np.abs(g) < 1e-15, 0, g).astype(float)) for g in gradient.values()]
        usable = bool(np.float32(weight + self.weight) <= 2.0**126 and weight >= 0)  # its inverse is a normal number
        good = usable and all(norm * (weight or 1) <= SQUARABLE and norm <= SQUARABLE for norm in norms)
        good = good and (loss is None or np.isfinite(loss))
        good = usable if s.on_nonfinite == "propagate" else good
        self.dropped += not good
        self.counts["dropped_total"] += not good
        if good and weight > 0:
            self.kept.append((gradient, weight, loss))
        self.micro_step += 1
        length = max(s.every(self.counts["emitted_total"]), 1) if callable(s.every) else s.every
        self.rests(not good)
        if self.micro_step >= length:
            self.close(norms, loss)

    def rests(self, lost: bool) -> None:
        """What a call leaves that ends no cycle."""
        self.emitted, self.lost, self.moved = False, lost, {k: np.zeros(2) for k in FACTORS}

    @property
    def weight(self) -> float:
        return sum(weight for _, weight, _ in self.kept)

    @property
    def loss(self) -> float:
        weights = [weight for _, weight, _ in self.kept]
        return float(np.average([loss for *_, loss in self.kept], weights=weights))

    def total(self) -> dict[str, Any]:
        kept = [(g, np.float32(w)) for g, w, _ in self.kept]
        return {
            "a": sum(g["a"].astype(np.float32) * w for g, w in kept),
            "b": sum(g["b"].astype(np.float32) * w for g, w in kept),
            "c": np.max([g["c"] for g, _ in kept], axis=0),
            "d": kept[-1][0]["d"],
        }

    def close(self, norms: list[float] | None, loss: float | None) -> None:
        """`norms` and `loss` are of the call that closes; a flush has neither."""
        told = self.dropped > 0
        emits = bool(self.kept) and not (told and self.setting.on_nonfinite == "drop_cycle")
        total = self.total() if self.kept else {}
        if emits and np.any(np.abs(total["b"]) > 65504):
            emits, told = False, True
        self.counts["emitted_total"] += emits
        self.counts["empty_total"] += not emits
        self.emitted, self.lost = emits, self.lost or not emits
        if emits:
            value = -1.0 if loss is None else self.loss
            sizes = [np.linalg.norm(x.astype(float)) for x in total.values()]
            held = self.setting.guarded and not (np.all(np.array(sizes) <= SQUARABLE) and np.isfinite(value))
            bad = [k for k, size in enumerate(sizes) if not size <= SQUARABLE]
            logged = np.nan if loss is None else value
            self.log.append(("nonfinite" if held else "applied", logged, bad[0] if bad else None))
            if not held:
                total["a"] = total["a"] / self.weight
                self.inner = {"step": self.inner["step"] + 1, "value": value, "gradient": total}
                self.moved = {k: -x for k, x in total.items()}
        elif told and self.setting.guarded:
            bad = [k for k, norm in enumerate(norms or []) if not norm <= SQUARABLE]
            seen = norms is not None and self.setting.on_nonfinite != "propagate"
            worst = int(np.argmax(np.asarray(norms))) if seen and not np.isfinite(loss or 0) else 0
            leaf = bad[0] if bad and seen else worst
            self.log.append(("nonfinite", np.nan if loss is None else loss, leaf))
        self.begin()

    def flush(self) -> None:
        self.rests(False)
        if self.micro_step > 0:
            self.close(None, None)


def check(got: Any, moved: Any, oracle: Oracle, where: Any) -> None:
    numbers = {**oracle.counts, "added": len(oracle.kept), "micro_step": oracle.micro_step, "emitted": oracle.emitted}
    numbers |= {"dropped_in_cycle": oracle.dropped, "micro_batch_lost": oracle.lost}
    for name, number in numbers.items():
        assert getattr(got, name) == number, (where, name, getattr(got, name), number)
    setting, weight = oracle.setting, oracle.weight
    inner = got.accumulated_state.guarded_state if setting.guarded else got.accumulated_state
    pairs = [(got.accumulated_weight, weight), (got.value_weight, weight if setting.valued else 0)]
    pairs += [
        (got.value_mean, oracle.loss if setting.valued and oracle.kept else 0),
        (inner["value"], oracle.inner["value"]),
    ]
    trees = [(inner["gradient"], oracle.inner["gradient"]), (moved, oracle.moved)]
    if setting.every == 1:
        assert not any(x.any() for x in got.gradient_sum.values())  # never used
    elif oracle.kept:
        trees.append((got.gradient_sum, oracle.total()))
    pairs += [(ours[k], theirs[k]) for ours, theirs in trees for k in FACTORS]
    ours, theirs = (np.concatenate([np.ravel(x) for x in column]) for column in zip(*pairs, strict=True))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-2, err_msg=str(where))
    assert inner["step"] == oracle.inner["step"], where


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stream_of_micro_batches_is_summed_and_counted_by_the_rules(name: str) -> None:
    setting = SETTINGS[name]
    inner = og.guard(remembering(), recorder_rows=CALLS) if setting.guarded else remembering()
    tx = og.accumulate(inner, setting.every, on_nonfinite=setting.on_nonfinite, reduction=REDUCTION)
    params, like = {k: jnp.ones(2) for k in FACTORS}, gradient(0.0)

    def step(carry: Any, call: Any) -> Any:
        grads = gradient(call["size"])
        grads["c"] = jnp.where(call["spoilt"], jnp.nan, grads["c"])
        extra = {k: call[k] for k in ("weight", "value") if k in call}
        after = og.apply_gradients(tx, grads, carry[1], carry[0], **extra)
        return after, (grads, after[1], jax.tree.map(jnp.subtract, after[0], carry[0]))

    def run(calls: Any) -> Any:
        end, each = jax.lax.scan(step, (params, tx.init(params)), calls)
        after = og.flush(tx, end[1], end[0], like=like)
        return each, (after[1], jax.tree.map(jnp.subtract, after[0], end[0]))

    calls = streams(setting, seed=len(name))
    (grads, *each), flushed = jax.device_get(quick_jit(jax.vmap(run))(calls))
    for i in range(STREAMS):
        oracle = Oracle(setting)
        with np.errstate(all="ignore"):
            for j in range(CALLS):
                here, parts = jax.tree.map(lambda x, i=i, j=j: x[i, j], (calls, grads))
                loss = float(here["value"]) if setting.valued else None
                oracle.call(parts, float(here.get("weight", 1.0)), loss)
                got, moved = jax.tree.map(lambda x, i=i, j=j: x[i, j], each)
                check(got, moved, oracle, (i, j))
            oracle.flush()
            after, moved = jax.tree.map(lambda x, i=i: x[i], flushed)
            check(after, moved, oracle, (i, "flushed"))
        if setting.guarded:
            log = og.flight_log(after)
            assert list(log["event"]) == [event for event, *_ in oracle.log]
            for row, (_, value, leaf) in zip(log, oracle.log, strict=True):
                assert np.isclose(row["value"], value, 1e-3, 1e-5, equal_nan=True), (row, value)
                assert leaf is None or row["worst_leaf"] == leaf, (row, leaf)


def test_a_new_cycle_holds_nothing() -> None:
    state = og.accumulate(optax.sgd(1.0), 2).init(gradient(1.0))
    assert not any(x.any() for x in jax.tree.leaves(state))


def test_a_loss_of_weight_0_is_handed_on_where_no_other_was_given() -> None:
    tx = og.accumulate(remembering(), 2)
    params, state = og.apply_gradients(tx, gradient(1.0), tx.init(gradient(1.0)), gradient(1.0))
    _, state = og.apply_gradients(tx, gradient(1.0), state, params, weight=0.0, value=5.0)
    assert state.accumulated_state["value"] == 5


def test_what_unscaling_takes_too_far_is_dropped_at_weight_0_too() -> None:
    tx = og.loss_scaling(og.accumulate(optax.sgd(1.0), 2), init=2.0**-40, min_scale=2.0**-40)
    _, state = og.apply_gradients(tx, jnp.full(1, 1e15), tx.init(jnp.ones(1)), jnp.ones(1), weight=0.0)
    assert state.unscaled_state.dropped_total == 1


def test_accumulation_in_accumulation() -> None:
    tx = og.accumulate(og.accumulate(optax.sgd(1.0), 2), 1)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    for size in (1.0, 3.0):
        params, state = og.apply_gradients(tx, jnp.full(1, size), state, params)
    np.testing.assert_allclose(params, -2.0)


def test_a_guard_inside_sees_the_gradient_of_a_weighted_cycle_of_one_and_not_its_sum() -> None:
    tx = og.accumulate(og.guard(optax.sgd(1.0), recorder_rows=2), 1)
    state = tx.init(jnp.ones(1))
    assert state.cycle_max_logits == ()  # without `qk_clip` there is nothing to keep
    _, state = og.apply_gradients(tx, jnp.full(1, 3.0), state, jnp.ones(1), weight=4.0)
    assert og.flight_log(state)["grad_norm"].tolist() == [3.0]
