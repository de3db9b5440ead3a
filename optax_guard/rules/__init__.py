"""Rules of a guard: clip by a number, clip by the run's own history, skip, or record every leaf.

A rule maps the statistics of a gradient to a factor for each leaf and a decision whether to hold the step. All rules of
a guard share one read of the gradient, and each is also an Optax transformation.

===================================================  ==================================================================
You want                                             Use
===================================================  ==================================================================
a bound that you choose                              `clip_by_global_norm`, `clip_by_leaf_norm`
a bound learned from the run                         `clip_by_norm_history`, `clip_by_median_norm`
a published adaptive clip, improved                  `zclip`, `autoclip`, `adagc`
to skip bad steps                                    `skip_nonfinite`, `skip_large`, `skip_spikes`
a rule for one group of leaves                       `masked_rule`
a record of the norm of every leaf                   `record_leaves`
a rule of your own                                   `rule`
===================================================  ==================================================================

The functions are also in `optax_guard` itself; the types of their states are only here.
"""

from optax_guard._common.bounds import ClipState
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.rules._adaptive import AdaGCState, AutoClipState, ZClipState, adagc, autoclip, zclip
from optax_guard.rules._clip import clip_by_global_norm, clip_by_leaf_norm
from optax_guard.rules._masked import MaskedRuleState, masked_rule
from optax_guard.rules._norm_history import (
    MedianNormState,
    NormHistoryState,
    clip_by_median_norm,
    clip_by_norm_history,
)
from optax_guard.rules._record_leaves import LeafLog, LeafRecordState, leaf_log, record_leaves
from optax_guard.rules._skip import SpikeState, skip_large, skip_nonfinite, skip_spikes

__all__ = [
    "AdaGCState",
    "AutoClipState",
    "ClipState",
    "GradientStatistics",
    "LeafLog",
    "LeafRecordState",
    "MaskedRuleState",
    "MedianNormState",
    "NormHistoryState",
    "Rule",
    "SpikeState",
    "Verdict",
    "ZClipState",
    "adagc",
    "autoclip",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_median_norm",
    "clip_by_norm_history",
    "leaf_log",
    "masked_rule",
    "record_leaves",
    "rule",
    "skip_large",
    "skip_nonfinite",
    "skip_spikes",
    "zclip",
]
