"""Reading an optimizer state that holds a guard, and moving guards in and out of one.

=====================================================  ================================================================
You want                                               Take
=====================================================  ================================================================
counters, the last norm and scale, for a logger        `metrics`
the last rows of the flight recorder                   `flight_log`
the norm of every leaf, where `record_leaves` is       `leaf_log`
a guard around a run in flight, or without it again    `add_guard_state`, `inner_state`, `find_inner_state`
what lives beside the optimizer kept with a held step  `keep_if_held`
=====================================================  ================================================================

The functions are in `optax_guard` itself; here are the types of the states of guards too.
"""

from optax_guard._guard import GuardState
from optax_guard._loss_scaling import LossScalingState
from optax_guard._step.record import FlightRecorder
from optax_guard.state._held import keep_if_held
from optax_guard.state._metrics import flight_log, metrics
from optax_guard.state._migration import add_guard_state, find_inner_state, remove_guard_state

__all__ = [
    "FlightRecorder",
    "GuardState",
    "LossScalingState",
    "add_guard_state",
    "find_inner_state",
    "flight_log",
    "keep_if_held",
    "metrics",
    "remove_guard_state",
]
