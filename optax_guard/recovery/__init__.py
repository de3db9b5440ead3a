"""Recovery: what a guard does if clipping and holding steps are not enough.

The ladder, in the order in which its rungs act if several are due in one step (whatever the order of the arguments):
clip and skip (the rules), reset the moments, back off, rewind, halt.

==================  ==============================================================  =================================
Function            Use it against                                                  Its state
==================  ==============================================================  =================================
`reset_moments`     corrupted moments, or moments that stop the parameters          9 bytes per leaf
`back_off`          trouble that smaller steps survive; also works in a chain       12 bytes
`rewind`            a loss that rose and does not fall, in an unattended run        `keep` copies of params and state
==================  ==============================================================  =================================

Recovery is opt-in: `guard(optimizer, rules..., recovery=(reset_moments(), back_off(), rewind()))`. A rung that resets
or rewinds acts *in place of* the step, whose gradient is not applied.

A step of trouble is one that is not finite or that a rule refuses, even if the guard's `patience` lets it through. A
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
