"""Reads optimizer states that hold a guard, and adds guards to states or removes them.

=====================================================  ================================================================
You want                                               Use
=====================================================  ================================================================
counters, the last norm and scale, for a logger        `metrics`
norms of an update and the parameters, their ratio     `update_metrics`
each new event in words, and an error on a halt        `event_logger`
the last rows of the flight recorder                   `flight_log`
the norm of every leaf, with `record_leaves`           `leaf_log`
to add or remove the guard of a run in progress        `add_guard_state`, `remove_guard_state`, `find_inner_state`
running statistics kept unchanged on a held step       `keep_if_held`
=====================================================  ================================================================

The functions are also in `optax_guard` itself; the types of the states are only here.
"""

from optax_guard._guard import BoundedState, GuardState
from optax_guard._loss_scaling import LossScalingState
from optax_guard._step.record import FlightRecorder
from optax_guard.state._events import event_logger
from optax_guard.state._held import keep_if_held
from optax_guard.state._metrics import flight_log, metrics
from optax_guard.state._migration import add_guard_state, find_inner_state, remove_guard_state
from optax_guard.state._update_metrics import update_metrics

__all__ = [
    "BoundedState",
    "FlightRecorder",
    "GuardState",
    "LossScalingState",
    "add_guard_state",
    "event_logger",
    "find_inner_state",
    "flight_log",
    "keep_if_held",
    "metrics",
    "remove_guard_state",
    "update_metrics",
]
