"""optax_guard: a training step that cannot blow up, for any Optax optimizer.

>>> import optax
>>> import optax_guard as og
>>> tx = og.guard(optax.adamw(3e-4), og.clip_by_global_norm(1.0))

Wrap the optimizer in `guard`, take the step with `apply_gradients`, read what happened with `metrics` and `flight_log`.
"""

from importlib.metadata import PackageNotFoundError, version

# Guard a training step
from optax_guard._accumulation import AccumulateState, accumulate, flush, has_updated
from optax_guard._apply import FastTransformation, apply_gradients

# Bound the gradient by its history, as published
from optax_guard._adaptive import AdaGCState, AutoClipState, ZClipState, adagc, autoclip, zclip

# Count every leaf once on many devices
from optax_guard._axes import LeafAxes, leaf_axes

# Bound the gradient by a number
from optax_guard._clipping import (
    ClipState,
    adaptive_grad_clip,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
)
from optax_guard._guard import GuardState, TrainingHalted, clear_halt, guard, raise_if_halted
from optax_guard._held import keep_if_held
from optax_guard._micro_batches import accumulate_gradients

# Train in float16
from optax_guard._precision import LossScalingState, loss_scaling, scale_loss

# Recover when holding steps is not enough
from optax_guard._ladder import RecoveryState
from optax_guard._recovery import BackOffState, ResetState, RewindState, back_off, reset_moments, rewind
from optax_guard._watch import LossWatch

# Add a guard to a run in flight
from optax_guard._migration import find_inner_state, inner_state, with_guard_state

# See what happened
from optax_guard._leaf_record import LeafLog, LeafRecordState, leaf_log, record_leaves
from optax_guard._metrics import flight_log, metrics

# Clip by an optimizer's second moment
from optax_guard._moments import SpamState, StableSpamState, clip_by_update_rms, spam_clip, stable_spam

# Bound the gradient by its own history
from optax_guard._norm_history import MedianNormState, NormHistoryState, clip_by_median_norm, clip_by_norm_history

# The one line that most people need
from optax_guard._presets import stabilize

# Change the gradient on purpose
from optax_guard._noise import NoiseState, anticorrelated_noise, langevin_noise, noise_injection, perturb_weights
from optax_guard._penalties import PenaltyState, dense_penalty, elastic_net_penalty, l1_penalty, shrink_gradients

# Make weights exactly zero
from optax_guard._proximal import (
    ProximalState,
    Sparsity,
    proximal_elastic_net,
    proximal_group_lasso,
    proximal_l1,
    sparsity,
)
from optax_guard._record import FlightRecorder

# Write a rule of one's own
from optax_guard._rule import Rule, Verdict, rule

# Judge some leaves and not others
from optax_guard._masked import MaskedRuleState, masked_rule

# Hold a step
from optax_guard._skipping import SpikeState, skip_large, skip_nonfinite, skip_spikes
from optax_guard._statistics import GradientStatistics, global_norm, gradient_statistics
from optax_guard._reading import leaf_names

# Bound the finished update
from optax_guard._updates import (
    ClippyState,
    LimitStepState,
    UpdateNormState,
    clip_by_update_norm,
    clippy,
    limit_step,
)

try:
    __version__ = version("optax-guard")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AccumulateState",
    "AdaGCState",
    "AutoClipState",
    "BackOffState",
    "ClipState",
    "ClippyState",
    "FastTransformation",
    "FlightRecorder",
    "GradientStatistics",
    "GuardState",
    "LeafAxes",
    "LeafLog",
    "LeafRecordState",
    "LimitStepState",
    "LossScalingState",
    "LossWatch",
    "MaskedRuleState",
    "MedianNormState",
    "NoiseState",
    "NormHistoryState",
    "PenaltyState",
    "ProximalState",
    "RecoveryState",
    "ResetState",
    "RewindState",
    "Rule",
    "SpamState",
    "Sparsity",
    "SpikeState",
    "StableSpamState",
    "TrainingHalted",
    "UpdateNormState",
    "Verdict",
    "ZClipState",
    "accumulate",
    "accumulate_gradients",
    "adagc",
    "adaptive_grad_clip",
    "anticorrelated_noise",
    "apply_gradients",
    "autoclip",
    "back_off",
    "clear_halt",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_median_norm",
    "clip_by_norm_history",
    "clip_by_update_norm",
    "clip_by_update_rms",
    "clip_by_value",
    "clippy",
    "dense_penalty",
    "elastic_net_penalty",
    "find_inner_state",
    "flight_log",
    "flush",
    "global_norm",
    "gradient_statistics",
    "guard",
    "has_updated",
    "inner_state",
    "keep_if_held",
    "l1_penalty",
    "langevin_noise",
    "leaf_axes",
    "leaf_log",
    "leaf_names",
    "limit_step",
    "loss_scaling",
    "masked_rule",
    "metrics",
    "noise_injection",
    "perturb_weights",
    "proximal_elastic_net",
    "proximal_group_lasso",
    "proximal_l1",
    "raise_if_halted",
    "record_leaves",
    "reset_moments",
    "rewind",
    "rule",
    "scale_loss",
    "shrink_gradients",
    "skip_large",
    "skip_nonfinite",
    "skip_spikes",
    "spam_clip",
    "sparsity",
    "stabilize",
    "stable_spam",
    "with_guard_state",
    "zclip",
]
