"""`event_logger` tells each event once, whatever the cadence, and `tag` says which batch it was."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og
from optax_guard._common.extra import tag_in
from optax_guard.report import load_log, read_log, save_log, story
from optax_guard.state import _events
from optax_guard.state._counts import COUNTERS

ROWS = 32
TX = og.guard(optax.sgd(0.1), og.skip_large(10.0), og.clip_by_global_norm(1.0), halt_after=3, recorder_rows=ROWS)
PARAMS = {"dense": jnp.ones(2)}
NAN = float("nan")


@jax.jit
def train_step(params: Any, state: Any, size: jax.Array, tag: jax.Array) -> tuple[Any, Any]:
    return og.apply_gradients(TX, {"dense": jnp.stack([size, jnp.zeros(())])}, state, params, value=size, tag=tag)


def run(sizes: list[float], log_events: Callable[..., None], params: Any = PARAMS, state: Any = None) -> Any:
    state = TX.init(PARAMS) if state is None else state
    for i, size in enumerate(sizes):
        params, state = train_step(params, state, jnp.float32(size), jnp.int32(100 + i))
        log_events(state, params)
    return params, state


@pytest.mark.parametrize("every", [1, 3])
def test_each_event_is_told_once_at_any_cadence(every: int) -> None:
    sizes = [0.5] * 24
    sizes[1], sizes[3], sizes[4], sizes[10], sizes[14] = NAN, NAN, 50.0, float("inf"), 8.0
    told: list[str] = []
    log_events = og.event_logger(told.append, every=every)
    _, state = run(sizes, log_events)
    log_events(state, PARAMS, wait=True)
    assert told == [
        "step 1: held: the gradient of `dense` held NaN (batch 101)",
        "step 3: held: the gradient of `dense` held NaN (batch 103)",
        "step 4: held, rule 0 refused it: the gradient norm was 50, most of it in `dense`, loss 50 (batch 104)",
        "step 10: held: the gradient of `dense` held Inf, or numbers too large to square in float32 (above 1.8e19) "
        "(batch 110)",
        "step 14: clipped to 0.12 of the gradient: the gradient norm was 8, most of it in `dense`, loss 8 (batch 114)",
    ]


def test_routine_clipping_is_not_an_event() -> None:
    told: list[str] = []
    run([5.0] * 12 + [9.0, 5.0], og.event_logger(told.append))
    assert [line.split(":")[0] for line in told] == ["step 0"]  # to 0.2, where 1 is usual; afterwards 0.2 is


def test_a_halt_is_raised_after_its_events_were_told() -> None:
    told: list[str] = []
    with pytest.raises(og.TrainingHalted, match="dense"):
        run([0.5] + [NAN] * 12, og.event_logger(told.append))
    assert [line.split(":")[0] for line in told] == ["step 1", "step 2", "step 3"]


def test_a_restored_state_is_told_from_where_it_stands() -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append)
    params, state = run([0.5, NAN, 0.5, 0.5, 0.5], og.event_logger([].append))
    run([0.5] * 4, log_events, params, state)  # a new process does not tell the old NaN again
    assert told == []
    later = run([0.5] * 9, log_events, params, state)[1]
    run([NAN, NAN, 0.5, 0.5, 0.5], log_events, params, state)  # back to an earlier checkpoint
    assert [line.split(":")[0] for line in told] == ["step 5", "step 6"]
    assert int(later.guard_step) == 14


def test_members_and_several_guards_are_named() -> None:
    told: list[str] = []
    many = jax.vmap(lambda size, state: og.apply_gradients(TX, {"dense": jnp.stack([size, size])}, state, PARAMS)[1])
    state = jax.vmap(lambda _: TX.init(PARAMS))(jnp.arange(3))
    og.event_logger(told.append)(jax.jit(many)(jnp.array([0.5, NAN, 0.5]), state), PARAMS, wait=True)
    assert told == ["member 1, step 0: held: the gradient of `dense` held NaN"]
    held = train_step(PARAMS, TX.init(PARAMS), jnp.float32(NAN), jnp.int32(7))[1]
    told.clear()
    og.event_logger(told.append)((TX.init(PARAMS), held), wait=True)
    assert told == ["guard 1, step 0: held: the gradient of leaf 0 of 1 held NaN (batch 7)"]


def test_members_that_took_fewer_steps_are_told_of_too() -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append)
    many = quick_jit(
        jax.vmap(lambda size, state: og.apply_gradients(TX, {"dense": jnp.stack([size, size])}, state, PARAMS)[1])
    )
    older = TX.init(PARAMS)
    for _ in range(3):
        older = train_step(PARAMS, older, jnp.float32(0.5), jnp.int32(0))[1]
    younger = train_step(PARAMS, TX.init(PARAMS), jnp.float32(0.5), jnp.int32(0))[1]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), older, younger)
    for sizes in ([0.5, 0.5], [NAN, 0.5], [0.5, NAN], [0.5, 0.5], [0.5, NAN]):
        state = many(jnp.array(sizes), state)
        log_events(state, PARAMS, wait=True)
    assert [line.split(":")[0] for line in told] == ["member 0, step 4", "member 1, step 3", "member 1, step 5"]
    log_events(jax.tree.map(lambda x: x[0], state), PARAMS, wait=True)  # one of them alone is another run


def test_events_are_told_two_looks_later_and_once_where_steps_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "_is_ready", lambda _: False)
    told: list[str] = []
    log_events = og.event_logger(told.append)
    params, state = run([*[0.5] * 4, NAN, 0.5], log_events)
    assert told == []
    run([0.5, 0.5, 0.5, 0.5], log_events, params, state)
    assert [line.split(":")[0] for line in told] == ["step 4"]


# What is done outside the guard is not in its record: each counter is told of at every power of ten.


BOUNDED = og.stabilize(optax.sgd(1.0), recorder_rows=ROWS)
MATRIX = jnp.ones((2, 2))


@jax.jit
def bounded_step(state: Any, size: jax.Array) -> Any:
    return og.apply_gradients(BOUNDED, jnp.full((2, 2), size), state, MATRIX)[1]


def bounded_run(sizes: list[float], log_events: Callable[..., None], state: Any = None, **options: Any) -> Any:
    state = BOUNDED.init(MATRIX) if state is None else state
    for size in sizes:
        state = bounded_step(state, jnp.float32(size))
        log_events(state, MATRIX, **options)
    return state


def test_a_bound_is_told_of_the_first_time_and_at_each_power_of_ten() -> None:
    told: list[str] = []
    bounded_run([0.004, 0.02, *[0.04] * 10, 0.004, 0.04], og.event_logger(told.append), wait=True)
    assert told == [
        "after step 1: `limit_step_growth` scaled an update down (smallest factor 0.6)",
        "after step 10: `limit_step_growth` scaled 10 updates down so far (smallest factor of the last one: 0.3)",
    ]


@pytest.mark.parametrize("bounded", [1, 9, 10, 60])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_is_not_told_of_again(bounded: int, every: int) -> None:
    told: list[str] = []
    state = bounded_run([0.04] * bounded + [0.004], lambda *_: None)
    log_events = og.event_logger(told.append, every=every)
    state = bounded_run([0.004] * 6, log_events, state)
    log_events(state, MATRIX, wait=True)
    assert told == []
    bounded_run([0.04] * (100 - bounded), log_events, state, wait=True)  # but of what comes
    assert f"{100 if bounded >= 10 else 10} updates down so far" in told[0]


@pytest.mark.parametrize(
    ("every", "when"), [(2, ["after step 1", "after step 9"]), (7, ["after step 6", "after step 13"])]
)
def test_a_bound_is_told_of_at_any_cadence_with_events_and_at_the_end(every: int, when: list[str]) -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append, every=every)
    state = bounded_run([0.04] * 12 + [NAN, 0.04], log_events)
    log_events(state, MATRIX, wait=True)
    assert [line.split(":")[0] for line in told if "limit_step_growth" in line] == when
    assert [line for line in told if "held" in line] == ["step 12: held: the gradient of `(root)` held NaN"]


def test_where_steps_take_long_the_number_and_the_factor_are_of_one_look_and_a_halt_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_events, "_is_ready", lambda _: False)
    told: list[str] = []
    bounded_run([0.004, 0.02, 0.04, 0.08, 0.16], og.event_logger(told.append))
    assert told == ["after step 1: `limit_step_growth` scaled an update down (smallest factor 0.6)"]
    with pytest.raises(og.TrainingHalted, match="dense"):  # by the look at the first NaN, which has seen no halt yet
        run([NAN, NAN, NAN], og.event_logger(told.append))
    told.clear()
    log_events = og.event_logger(told.append)
    log_events(
        bounded_run([NAN, 0.04], log_events), MATRIX, wait=True
    )  # the bound is seen by a look behind the event's
    assert [line.split(":")[0] for line in told] == ["step 0", "after step 1"]


def test_another_run_of_the_same_logger_and_a_rewind() -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append)
    bounded_run([0.04] * 3, log_events, wait=True)
    bounded_run([0.04], log_events, wait=True)  # from the beginning
    assert [line.split(":")[0] for line in told] == ["after step 0", "after step 0"]
    told.clear()
    state = bounded_run([0.04] * 10, log_events, wait=True)
    back = state.guarded_state.bound_state._replace(step_growth_bound_total=jnp.int32(8))  # as a rewind does
    rewound = state._replace(guarded_state=state.guarded_state._replace(bound_state=back))
    bounded_run([0.004, 0.04, 0.04, 0.04], log_events, rewound, wait=True)
    assert [line.split(":")[0] for line in told] == ["after step 9"]


def test_an_earlier_state_is_not_told_of_again() -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append)
    earlier = bounded_run([0.04] * 20, log_events, wait=True)
    bounded_run([0.04] * 20, log_events, earlier, wait=True)
    bounded_run([0.004], log_events, earlier, wait=True)
    assert [line.split(":")[0] for line in told] == ["after step 0", "after step 9"]


def test_a_line_names_the_guard_by_whose_steps_it_is_dated() -> None:
    told: list[str] = []
    log_events = og.event_logger(told.append)
    body = bounded_run([0.04] * 15, lambda *_: None)  # resumed
    head = BOUNDED.init(MATRIX)
    for size in (0.004, 0.04):
        head = bounded_step(head, jnp.float32(size))
        log_events(
            {"body": body, "head": og.accumulate(BOUNDED, 2).init(MATRIX)._replace(accumulated_state=head)}, wait=True
        )
    assert [line.split(": ")[0] for line in told] == ["guard 1, after step 1"]
    log_events(head, wait=True)  # a state of other guards: what is on its way is dropped


def test_no_event_is_overwritten_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "_is_ready", lambda _: False)
    told: list[str] = []
    log_events = og.event_logger(told.append, every=ROWS)
    params, state = run([0.5, NAN, *[0.5] * (3 * ROWS)], log_events)
    assert [line.split(":")[0] for line in told] == ["step 1"]
    many = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    log_events(many, params, wait=True)


def test_a_quiet_look_compiles_nothing_and_reads_no_rows(caplog: pytest.LogCaptureFixture) -> None:
    log_events = og.event_logger(pytest.fail)
    params, state = run([0.5] * 3, log_events)
    held = bounded_run([0.004] * 3, log_events)
    with jax.log_compiles(), caplog.at_level("WARNING"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_events, "_tell", pytest.fail)
        run([0.5] * 3, log_events, params, state)
        bounded_run([0.004] * 3, log_events, held)
        assert not [record for record in caplog.records if "ompil" in record.message]
        jax.jit(lambda x: x * 3.25)(jnp.ones(3))
        assert [record for record in caplog.records if "ompil" in record.message]


def test_members_bounded_and_dropped_micro_batches_are_told_of() -> None:
    told: list[str] = []
    many = jax.vmap(lambda size, state: og.apply_gradients(BOUNDED, size * MATRIX, state, MATRIX)[1])
    state = jax.vmap(lambda _: BOUNDED.init(MATRIX))(jnp.arange(2))
    og.event_logger(told.append)(jax.jit(many)(jnp.array([0.004, 0.02]), state), MATRIX, wait=True)
    assert told == ["member 1, after step 0: `limit_step_growth` scaled an update down (smallest factor 0.5)"]
    told.clear()
    tx = og.accumulate(TX, 2)
    params, state, log_events = PARAMS, tx.init(PARAMS), og.event_logger(told.append)
    for size in (NAN, 0.5, NAN, 0.5):
        params, state = og.apply_gradients(tx, {"dense": jnp.full(2, size)}, state, params)
        log_events(state, params, wait=True)
    assert told == ["before the first step: `accumulate` dropped a micro-batch (not finite, or of invalid weight)"]


def test_whatever_counts_is_told_of_somewhere() -> None:
    told = {counter.total for counter in COUNTERS}
    for module in pkgutil.walk_packages(og.__path__, "optax_guard."):
        if "__main__" in module.name:
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            for field in getattr(kind, "_fields", ()):
                counts = field.endswith("_total") and "jax.Array" in str(kind.__annotations__.get(field))
                assert not counts or field in told | IN_THE_RECORD | PLACES, f"{name}.{field} is seen by nobody"


IN_THE_RECORD = {  # of the guard
    *("clipped_total", "skipped_total", "nonfinite_total", "let_through_total", "overflow_total", "emitted_total"),
    *("reset_total", "silent_death_total", "start_reset_total", "back_off_total", "rewind_total"),
}
PLACES = {  # in a ring
    *("update_norms_kept_total", "update_norms_recent_total", "published_update_norm_total", "published_spike_total"),
    *("spike_accepted_total", "spike_recent_total", "accepted_total", "recent_total", "values_total"),
}


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="no guard in this state"):
        og.event_logger()(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="recorder_rows"):
        og.event_logger(every=ROWS + 1)(TX.init(PARAMS))
    for wrong in (1.5, True, "a", 2**31, np.int64(2**40), jnp.ones(2, jnp.int32), np.float32(1)):
        with pytest.raises(ValueError, match="`tag` must be one integer"):
            og.apply_gradients(TX, PARAMS, TX.init(PARAMS), PARAMS, tag=wrong)


def test_a_number_that_can_be_no_tag_is_none() -> None:
    given = {np.uint32(2**31): -1, np.int8(-3): -1, np.uint8(200): 200, np.int32(7): 7}
    for tag, expected in given.items():
        told = tag_in("guard", {"tag": jnp.asarray(tag)})
        assert (int(told), told.dtype) == (expected, jnp.int32)


@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: og.accumulate(tx, 2), lambda tx: og.loss_scaling(tx)])
def test_the_tag_reaches_log_story_and_file(around: Callable[[Any], Any], tmp_path: Any) -> None:
    tx = around(TX)
    params, state = PARAMS, tx.init(PARAMS)
    for tag in (11, None, 2**31 - 1, np.int64(12)):
        size = NAN if tag == 12 and around(TX) is TX else 0.5
        params, state = og.apply_gradients(tx, {"dense": jnp.full(2, size)}, state, params, tag=tag)
    tags = og.flight_log(state)["tag"].tolist()
    assert tags == ([-1, 12] if isinstance(state, og.accumulation.AccumulateState) else [11, -1, 2**31 - 1, 12])
    read = load_log(save_log(tmp_path / "log", state, params))
    assert read.rows["tag"].tolist() == tags
    if around(TX) is TX:
        assert "batch 12" in " ".join(story(read_log(state, params)))
