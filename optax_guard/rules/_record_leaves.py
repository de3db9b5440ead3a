"""Records the norm of every leaf at each step, to find which layer went first.

=========================  ========================================================================
Function                   Use it for
=========================  ========================================================================
`record_leaves(window)`    a rule of `guard` that never acts and keeps the last `window` steps
`leaf_log(state)`          reading the record on the host
=========================  ========================================================================

The flight recorder names one leaf for each step. `record_leaves` keeps the norms of all leaves, so that
`optax_guard.report` can find the leaf whose norm left its usual range *before* the step that failed. The guard has
already computed the norms, so a row costs only one store for each leaf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common import validate
from optax_guard._common.counters import next_step
from optax_guard._common.tree import as_arrays, check_leaf_count, field_array, find_states, leaf_names, leaves_with_none
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard._step.reading import SeenLeaves, check_on_host, seen_names

__all__ = ["LeafLog", "LeafRecordState", "decoded_leaf_log", "leaf_log", "record_leaves"]

# A checkpoint must hold no NaN or Inf, and a norm is never negative, so a norm that is not finite is stored as a code.
_EMPTY, _NAN, _INF = -1.0, -2.0, -3.0


class LeafRecordState(NamedTuple):
    """A ring buffer of norms. The row of call t is at t % window."""

    recorded_norms: jax.Array  # f32[window, n_leaves]: -1 where nothing has been written, -2 for NaN, -3 for Inf
    recorded_steps: jax.Array  # i32[]: the number of calls so far


class LeafLog(NamedTuple):
    """The recorded norms on the host, oldest first."""

    steps: np.ndarray  # i64[rows], preceded by the axes of the members in a state of many runs
    norms: np.ndarray  # f32[rows, n_leaves], with the same axes; NaN and Inf included
    names: list[str]  # the names of the leaves; "leaf 0", ... if the parameters were not given


def record_leaves(window: int = 256, *, axis_name: AxisName | None = None) -> Rule:
    """Record the norm of every leaf of the last `window` gradients, without scaling or skipping.

    recorded[t % window, i] <- ||g_i||_2

    As a rule of `guard`, it sees the result of the rules before it, so put it first. Non-finite steps, which are its
    purpose, are recorded as codes, so that the state stays finite.

    Guarantees:
      - The gradient is returned bit for bit.
      - Under `guard` it causes no further read of the gradient.

    ====================================  =====================================================
    Case                                  Result
    ====================================  =====================================================
    NaN in a leaf                         recorded as NaN
    Inf, or squares that overflow         recorded as Inf (outside a guard, as the norm)
    integer, `float0`, `None` leaf        recorded as 0
    a step that a guard holds             recorded
    empty tree                            rows of length 0
    ====================================  =====================================================

    Args:
      window: the number of steps to keep (>= 1), in 4 bytes * window * leaves of memory. Set it to the guard's
        `recorder_rows` to cover the same steps. Under `optax.inject_hyperparams`, list it in `static_args`.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: `window` is not a whole number >= 1.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), og.record_leaves(window=8), og.clip_by_global_norm(1.0))
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> for b in (1.0, jnp.nan):
      ...     params, state = og.apply_gradients(tx, {"a": jnp.array([3.0, 4.0]), "b": jnp.full(1, b)}, state, params)
      >>> og.leaf_log(state, params).norms
      array([[ 5.,  1.],
             [ 5., nan]], dtype=float32)

    See Also:
      `flight_log`, which has one row for each step; `optax_guard.report`, which draws both. `optax.monitor` keeps the
      result of a function for the last step only.
    """
    name = "record_leaves"
    window = validate.integer(name, "window", window, low=1, high=validate.MILLION)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> LeafRecordState:
        params = as_arrays(name, params)
        leaves = len(leaves_with_none(params))
        return LeafRecordState(
            recorded_norms=jnp.full((window, leaves), _EMPTY, jnp.float32), recorded_steps=jnp.zeros((), jnp.int32)
        )

    def judge(
        statistics: GradientStatistics, state: LeafRecordState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, LeafRecordState]:
        del params, extra
        check_leaf_count(name, state.recorded_norms.shape[1], statistics.sum_squares.shape[0])
        norms = statistics.leaf_norms.astype(jnp.float32)
        coded = jnp.where(jnp.isnan(norms), _NAN, jnp.where(jnp.isinf(norms), _INF, norms))
        place = state.recorded_steps % window
        verdict = Verdict(scale=jnp.ones((), statistics.sum_squares.dtype), skip=jnp.zeros((), bool))
        return verdict, LeafRecordState(
            recorded_norms=jnp.asarray(state.recorded_norms).at[place].set(coded),
            recorded_steps=next_step(state.recorded_steps),
        )

    return rule(init, judge, axis_name=axis_name, sees_nonfinite=True)


def leaf_log(state: optax.OptState, params: PyTree | None = None) -> LeafLog:
    """Reads the recorded norms on the host, oldest first.

    Args:
      state: an optimizer state that holds one `record_leaves`.
      params: the parameters (or `jax.ShapeDtypeStruct`s), for the names of the leaves. If the guard sees only some of
        them (inside `masked`, `partition` or nnx's `wrt`), pass a state that contains the guard, which knows which.

    Returns:
      A `LeafLog` with at most `window` rows. For a state of many runs at once (`jax.vmap`, `jax.pmap`), the axes of the
      members come first in `steps` and `norms`.

    Raises:
      ValueError: `state` holds no `record_leaves` or more than one, or `params` has another number of leaves.

    Example:
      >>> import optax_guard as og
      >>> recorder = og.record_leaves(window=2)
      >>> state = recorder.init(jnp.zeros(2))
      >>> for size in (1.0, 2.0, 3.0):
      ...     _, state = recorder.update(jnp.array([size, 0.0]), state)
      >>> og.leaf_log(state).steps, og.leaf_log(state).norms[:, 0]
      (array([1, 2]), array([2., 3.], dtype=float32))
    """
    states = find_states(state, LeafRecordState)
    if len(states) != 1:
        raise ValueError(
            f"leaf_log: expected one `record_leaves` in this state, found {len(states)}. Pass it to the guard as a "
            "rule: og.guard(optimizer, og.record_leaves(256), ...)."
        )
    check_on_host("leaf_log", states[0])
    coded, calls = (np.asarray(x) for x in jax.device_get(tuple(map(field_array, states[0]))))
    names, guards = None, find_states(state, SeenLeaves)
    if params is not None:
        names = leaf_names(params)
        if len(guards) == 1 and len(names) > coded.shape[-1]:
            names = seen_names(guards[0], params)
    logs = [decoded_leaf_log(coded[index], int(calls[index]), names) for index in np.ndindex(*calls.shape)]
    if calls.ndim == 0:
        return logs[0]
    if len({len(log.steps) for log in logs}) > 1:
        raise ValueError(
            f"leaf_log: the members of this state made {calls.tolist()} calls: read one, `jax.tree.map(lambda x: x[0], "
            "state)`."
        )
    steps, norms = np.stack([log.steps for log in logs]), np.stack([log.norms for log in logs])
    shape = calls.shape
    return LeafLog(steps.reshape(*shape, -1), norms.reshape(*shape, *norms.shape[1:]), logs[0].names)


def decoded_leaf_log(coded: np.ndarray, calls: int, names: list[str] | None) -> LeafLog:
    """Makes a `LeafLog` from the ring buffer."""
    window, leaves = coded.shape
    if names is None:
        names = [f"leaf {i}" for i in range(leaves)]
    if len(names) != leaves:
        raise ValueError(
            f"leaf_log: the state has {leaves} leaves but `params` has {len(names)}: they do not belong together."
        )
    steps = np.arange(max(calls - window, 0), calls)
    rows = coded[steps % window]
    norms = np.select([rows == _NAN, rows == _INF, rows < 0], [np.nan, np.inf, np.nan], rows).astype(np.float32)
    return LeafLog(steps=steps, norms=norms, names=names)
