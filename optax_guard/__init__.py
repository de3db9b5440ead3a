"""optax_guard: a training step that cannot blow up, for any Optax optimizer.

>>> import optax
>>> import optax_guard as og
>>> tx = og.guard(optax.adamw(3e-4), og.clip_by_global_norm(1.0))

Wrap the optimizer in `guard` or `stabilize`, take the step with `apply_gradients`, and see what happened with `metrics`
and `flight_log`. All functions are in this namespace; the state types are in the folders, as in `og.rules.ZClipState`.
Published methods as their authors wrote them are in `og.published`.
"""

from importlib.metadata import PackageNotFoundError, version

# The step
from optax_guard._common.axes import leaf_axes
from optax_guard._guard import guard
from optax_guard._halt import TrainingHalted, clear_halt, raise_if_halted
from optax_guard._loss_scaling import loss_scaling, scale_loss
from optax_guard._stabilize import stabilize
from optax_guard._step.act import apply_gradients
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import global_norm, gradient_statistics
from optax_guard._step.reading import leaf_names

# The rooms
from optax_guard import accumulation, attention, published, recovery, rules, state, transforms
from optax_guard.accumulation import accumulate, accumulate_gradients, flush, has_updated
from optax_guard.attention import (
    attention_with_max_logits,
    collect_max_logits,
    equinox_attention,
    linen_attention,
    max_attention_logits,
    max_attention_logits_from_lse,
    nnx_attention,
    qk_clip,
    transformer_attention,
    z_loss,
)
from optax_guard.recovery import back_off, reset_moments, rewind
from optax_guard.rules import (
    adagc,
    autoclip,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_median_norm,
    clip_by_norm_history,
    leaf_log,
    masked_rule,
    record_leaves,
    skip_large,
    skip_nonfinite,
    skip_spikes,
    zclip,
)
from optax_guard.state import (
    event_logger,
    find_inner_state,
    flight_log,
    keep_if_held,
    metrics,
    remove_guard_state,
    add_guard_state,
    update_metrics,
)
from optax_guard.transforms import (
    adaptive_grad_clip,
    anticorrelated_noise,
    clip_by_update_norm,
    clip_by_update_rms,
    clip_by_value,
    clippy,
    dense_penalty,
    elastic_net_penalty,
    l1_penalty,
    langevin_noise,
    limit_step,
    limit_step_growth,
    noise_injection,
    perturb_weights,
    proximal_elastic_net,
    proximal_group_lasso,
    proximal_l1,
    shrink_gradients,
    spam_clip,
    sparsity,
    stable_spam,
    stochastic_rounding,
)

try:
    __version__ = version("optax-guard")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Rule",
    "TrainingHalted",
    "Verdict",
    "accumulate",
    "accumulate_gradients",
    "accumulation",
    "adagc",
    "adaptive_grad_clip",
    "add_guard_state",
    "anticorrelated_noise",
    "apply_gradients",
    "attention",
    "attention_with_max_logits",
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
    "collect_max_logits",
    "dense_penalty",
    "elastic_net_penalty",
    "equinox_attention",
    "event_logger",
    "find_inner_state",
    "flight_log",
    "flush",
    "global_norm",
    "gradient_statistics",
    "guard",
    "has_updated",
    "keep_if_held",
    "l1_penalty",
    "langevin_noise",
    "leaf_axes",
    "leaf_log",
    "leaf_names",
    "limit_step",
    "limit_step_growth",
    "linen_attention",
    "loss_scaling",
    "masked_rule",
    "max_attention_logits",
    "max_attention_logits_from_lse",
    "metrics",
    "nnx_attention",
    "noise_injection",
    "perturb_weights",
    "proximal_elastic_net",
    "proximal_group_lasso",
    "proximal_l1",
    "published",
    "qk_clip",
    "raise_if_halted",
    "record_leaves",
    "recovery",
    "remove_guard_state",
    "reset_moments",
    "rewind",
    "rule",
    "rules",
    "scale_loss",
    "shrink_gradients",
    "skip_large",
    "skip_nonfinite",
    "skip_spikes",
    "spam_clip",
    "sparsity",
    "stabilize",
    "stable_spam",
    "state",
    "stochastic_rounding",
    "transformer_attention",
    "transforms",
    "update_metrics",
    "z_loss",
    "zclip",
]
