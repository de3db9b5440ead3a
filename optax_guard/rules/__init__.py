"""Rules of a guard: clip by a number, clip by the run's own history, skip, or write down every leaf.

A rule answers the statistics of a gradient with a factor for each leaf and whether to hold the step. All rules of a
guard share one read of the gradient, and each is an Optax transformation by itself.

===================================================  ==================================================================
You want                                             Take
===================================================  ==================================================================
a bound that you choose                              `clip_by_global_norm`, `clip_by_leaf_norm`
a bound that the run finds by itself                 `clip_by_norm_history`, `clip_by_median_norm`
an adaptive clip of the literature, repaired         `zclip`, `autoclip`, `adagc`
a step left out                                      `skip_nonfinite`, `skip_large`, `skip_spikes`
one rule for one group of leaves                     `masked_rule`
the norm of every leaf, step by step                 `record_leaves`
a rule of your own                                   `rule`
===================================================  ==================================================================

The functions are in `optax_guard` itself; here are the types of their states too.
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
