"""Escalation: what a guard does when clipping and holding steps are not enough.

The ladder, in the order in which its rungs act when several are due in one step (whatever the order of the arguments):
clip and skip (the rules), reset the moments, back off, rewind, halt.

==================  ==============================================================  =================================
Function            Take it against                                                 State it needs
==================  ==============================================================  =================================
`reset_moments`     moments that took in something bad, or stop the parameters      9 bytes per leaf
`back_off`          trouble that smaller steps survive; alone in a chain, too       12 bytes
`rewind`            a loss that rose and stays up, in a run that nobody watches     `keep` copies of params and state
==================  ==============================================================  =================================

All of it is opt-in: `guard(optimizer, rules..., recovery=(reset_moments(), back_off(), rewind()))`. A rung that resets
or rewinds does so *in place of* the step: nothing of that step's gradient is applied.

Trouble is a step that was not finite or that a rule refused, also one that the guard's `patience` lets through. A
step that is applied without trouble ends the row.
"""

from optax_guard.recovery._back_off import BackOffState, back_off
from optax_guard.recovery._ladder import RecoveryState
from optax_guard.recovery._loss_watch import LossWatch
from optax_guard.recovery._reset import ResetState, reset_moments
from optax_guard.recovery._rewind import RewindState, rewind

__all__ = [
    "BackOffState",
    "LossWatch",
    "RecoveryState",
    "ResetState",
    "RewindState",
    "back_off",
    "reset_moments",
    "rewind",
]
