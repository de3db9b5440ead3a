"""Transformations for the chain inside a guard: bounds, penalties, exact zeros, noise, stochastic rounding.

They are not rules, since they treat single elements differently or read the parameters or the optimizer's state.

=======================================  ==============================================================================
You want                                 Use
=======================================  ==============================================================================
a bound on elements, or relative to      `clip_by_value`, `adaptive_grad_clip`
weights
a bound on the finished update           `limit_step`, `limit_step_growth`, `clippy`, `clip_by_update_norm`
a clip by the optimizer's second moment  `clip_by_update_rms`, `spam_clip`, `stable_spam`
small or sparse weights                  `l1_penalty`, `elastic_net_penalty`, `dense_penalty`, `shrink_gradients`
weights that are exactly zero            `proximal_l1`, `proximal_elastic_net`, `proximal_group_lasso`, `sparsity`
noise                                    `noise_injection`, `anticorrelated_noise`, `langevin_noise`, `perturb_weights`
16-bit parameters that keep moving       `stochastic_rounding`
=======================================  ==============================================================================

The functions are also in `optax_guard` itself; the types of their states are only here.
"""

from optax_guard._common.new_params import StochasticRoundingState
from optax_guard.transforms._elementwise import adaptive_grad_clip, clip_by_value
from optax_guard.transforms._moment_clips import clip_by_update_rms, spam_clip, stable_spam
from optax_guard.transforms._noise import (
    NoiseState,
    anticorrelated_noise,
    langevin_noise,
    noise_injection,
    perturb_weights,
)
from optax_guard.transforms._penalties import (
    PenaltyState,
    dense_penalty,
    elastic_net_penalty,
    l1_penalty,
    shrink_gradients,
)
from optax_guard.transforms._proximal import (
    ProximalState,
    Sparsity,
    proximal_elastic_net,
    proximal_group_lasso,
    proximal_l1,
    sparsity,
)
from optax_guard.transforms._rounding import stochastic_rounding
from optax_guard.transforms._spam import SpamState, StableSpamState
from optax_guard.transforms._step_growth import StepGrowthState, limit_step_growth
from optax_guard.transforms._update_bounds import (
    ClippyState,
    LimitStepState,
    UpdateNormState,
    clip_by_update_norm,
    clippy,
    limit_step,
)

__all__ = [
    "ClippyState",
    "LimitStepState",
    "NoiseState",
    "PenaltyState",
    "ProximalState",
    "SpamState",
    "Sparsity",
    "StableSpamState",
    "StepGrowthState",
    "StochasticRoundingState",
    "UpdateNormState",
    "adaptive_grad_clip",
    "anticorrelated_noise",
    "clip_by_update_norm",
    "clip_by_update_rms",
    "clip_by_value",
    "clippy",
    "dense_penalty",
    "elastic_net_penalty",
    "l1_penalty",
    "langevin_noise",
    "limit_step",
    "limit_step_growth",
    "noise_injection",
    "perturb_weights",
    "proximal_elastic_net",
    "proximal_group_lasso",
    "proximal_l1",
    "shrink_gradients",
    "spam_clip",
    "sparsity",
    "stable_spam",
    "stochastic_rounding",
]
