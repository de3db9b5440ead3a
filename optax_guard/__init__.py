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

# Bound the gradient by a number
from optax_guard._clipping import (
    ClipState,
    adaptive_grad_clip,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
)
from optax_guard._guard import GuardState, TrainingHalted, clear_halt, guard, raise_if_halted
from optax_guard._micro_batches import accumulate_gradients

# Train in float16
from optax_guard._precision import LossScalingState, loss_scaling, scale_loss

# See what happened
from optax_guard._metrics import flight_log, metrics

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

# Hold a step
from optax_guard._skipping import skip_large, skip_nonfinite
from optax_guard._statistics import GradientStatistics, global_norm, gradient_statistics
from optax_guard._tree import leaf_names

try:
    __version__ = version("optax-guard")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AccumulateState",
    "ClipState",
    "FastTransformation",
    "FlightRecorder",
    "GradientStatistics",
    "GuardState",
    "LossScalingState",
    "NoiseState",
    "PenaltyState",
    "ProximalState",
    "Rule",
    "Sparsity",
    "TrainingHalted",
    "Verdict",
    "accumulate",
    "accumulate_gradients",
    "adaptive_grad_clip",
    "anticorrelated_noise",
    "apply_gradients",
    "clear_halt",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "dense_penalty",
    "elastic_net_penalty",
    "flight_log",
    "flush",
    "global_norm",
    "gradient_statistics",
    "guard",
    "has_updated",
    "l1_penalty",
    "langevin_noise",
    "leaf_names",
    "loss_scaling",
    "metrics",
    "noise_injection",
    "perturb_weights",
    "proximal_elastic_net",
    "proximal_group_lasso",
    "proximal_l1",
    "raise_if_halted",
    "rule",
    "scale_loss",
    "shrink_gradients",
    "skip_large",
    "skip_nonfinite",
    "sparsity",
]
