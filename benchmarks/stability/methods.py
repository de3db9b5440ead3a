"""The methods that StabilityBench compares. To add one, write a function decorated with `@method`.

The function takes the optimizer to protect and one setting, and returns a transformation. `settings` are the values
tried: the first is the published default (ours: the library's), the others the grid. Settings arrive as traced numbers,
so that all of them share one compiled program.

A method that is an optimizer itself, or that changes the learning rate over time, is decorated with
`@method(..., takes_rate=True)`. It takes the optimizer as a function of a rate or a schedule, the rate, and the
setting; an optimizer of its own goes through `probed`, which the measurements need.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks.stability.train import Base, probed

Transformation = optax.GradientTransformation
Make = Callable[..., Transformation]  # of (optimizer, setting), or of (optimizer of a rate, rate, setting)

OPTAX, PUBLISHED, OURS = "Optax", "published", "ours"
WARM_UP = 40  # steps, a tenth of the usual task
EVERY = 4  # micro-batches in a step, where a fault hits one of them
_FOREVER = 2**30


class Method(NamedTuple):
    """One way to protect an optimizer."""

    title: str
    group: str  # OPTAX, PUBLISHED or OURS
    make: Make
    setting: str  # what the setting is; "" where there is none
    settings: tuple[float, ...]
    second_moment: bool  # needs an optimizer that keeps one
    takes_rate: bool

    def build(self, base: Base, rate: Any, setting: Any) -> Transformation:
        """The method around the optimizer at a rate."""
        return self.make(base, rate, setting) if self.takes_rate else self.make(base(rate), setting)

    def accumulated(self, base: Base, rate: Any, setting: Any) -> Transformation:
        """The method over micro-batches: with `og.accumulate` for ours, else with `optax.MultiSteps`."""
        built = self.build(base, rate, setting)
        if self.group == OURS:
            return og.accumulate(built, EVERY)
        multi = optax.MultiSteps(built, EVERY)  # whose `gradient_transformation()` would not pass on the loss
        return optax.GradientTransformationExtraArgs(multi.init, multi.update)


METHODS: dict[str, Method] = {}


def method(
    title: str,
    group: str,
    setting: str = "",
    settings: tuple[float, ...] = (0.0,),
    second_moment: bool = False,
    takes_rate: bool = False,
) -> Callable[[Make], Make]:
    """Registers a method under the name of its function."""

    def register(make: Make) -> Make:
        METHODS[make.__name__] = Method(title, group, make, setting, settings, second_moment, takes_rate)
        return make

    return register


def as_published(rule: og.Rule) -> Transformation:
    """A rule as its authors' code runs it: a non-finite gradient passes through.

    The library's published forms return zeros there. Such a step still does not enter the rule's history, which is in
    the authors' favour.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        finite = jnp.all(og.gradient_statistics(updates).finite)
        scaled, state = rule.update(updates, state, params, **extra)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), scaled, updates), state

    return optax.GradientTransformationExtraArgs(rule.init, update)


NORMS = (1.0, 0.1, 0.3, 3.0, 10.0)
SIGMAS = (6.0, 3.0, 4.0, 8.0, 12.0)
SCORES = (2.5, 1.5, 2.0, 4.0, 6.0)
THRESHOLDS = (5000.0, 50.0, 500.0, 50000.0, 500000.0)
MOMENTS = (0.7, 0.5, 0.8, 0.9, 0.95)
CHANGES = (1e-2, 1e-3, 3e-3, 3e-2, 1e-1)


@method("none", OPTAX)
def none(optimizer: Transformation, setting: Any) -> Transformation:
    """The optimizer itself."""
    del setting
    return optimizer


@method("clip_by_global_norm", OPTAX, "max_norm", NORMS)
def clip(optimizer: Transformation, setting: Any) -> Transformation:
    """The usual clip."""
    return optax.chain(optax.clip_by_global_norm(setting), optimizer)


@method("apply_if_finite(clip)", OPTAX, "max_norm", NORMS)
def finite(optimizer: Transformation, setting: Any) -> Transformation:
    """Optax's wrapper for NaN, with the limit from its documentation's example."""
    return optax.apply_if_finite(clip(optimizer, setting), 5)


@method("adaptive_grad_clip", OPTAX, "clipping", (0.01, 0.003, 0.03, 0.1, 0.3))
def agc(optimizer: Transformation, setting: Any) -> Transformation:
    """Brock et al. 2021."""
    return optax.chain(optax.adaptive_grad_clip(setting), optimizer)


@method("zero_nans", OPTAX)
def zero_nans(optimizer: Transformation, setting: Any) -> Transformation:
    """NaN becomes 0; Inf stays."""
    del setting
    return optax.chain(optax.zero_nans(), optimizer)


@method("clip + linear warm-up", OPTAX, "max_norm", NORMS, takes_rate=True)
def clip_and_warm_up(base: Base, rate: Any, setting: Any) -> Transformation:
    """The cure that most people use: over a tenth of the steps."""
    return clip(base(lambda count: rate * jnp.minimum((count + 1) / WARM_UP, 1.0)), setting)


@method("normalize_by_update_norm", OPTAX, "scale_factor", NORMS)
def normalized(optimizer: Transformation, setting: Any) -> Transformation:
    """The direction of the gradient alone."""
    return optax.chain(optax.normalize_by_update_norm(setting), optimizer)


@method("reduce_on_plateau", OPTAX, "patience", (10.0, 5.0, 20.0, 50.0, 100.0))
def plateau(optimizer: Transformation, setting: Any) -> Transformation:
    """A tenth of the rate whenever the loss has not improved for some steps."""
    return optax.chain(optimizer, optax.contrib.reduce_on_plateau(patience=setting))


@method("LARS", OPTAX, "trust_coefficient", (0.001, 0.0001, 0.01, 0.1, 1.0), takes_rate=True)
def lars(base: Base, rate: Any, setting: Any) -> Transformation:
    """You et al. 2017: the step of every leaf relative to its norm; with SGD's momentum."""
    del base
    return probed(lambda r: optax.lars(r, trust_coefficient=setting))(rate)


@method("LAMB", OPTAX, second_moment=True, takes_rate=True)
def lamb(base: Base, rate: Any, setting: Any) -> Transformation:
    """You et al. 2019: the same with Adam."""
    del base, setting
    return probed(optax.lamb)(rate)


@method("MoMo", OPTAX, takes_rate=True)
def momo(base: Base, rate: Any, setting: Any) -> Transformation:
    """Schaipp et al. 2023: momentum with a Polyak step size, capped at the rate; 0 as the lower bound of the loss."""
    del base, setting
    return probed(optax.contrib.momo)(rate)


@method("MoMo-Adam", OPTAX, second_moment=True, takes_rate=True)
def momo_adam(base: Base, rate: Any, setting: Any) -> Transformation:
    """The same with Adam."""
    del base, setting
    return probed(optax.contrib.momo_adam)(rate)


@method("Prodigy", OPTAX, "estim_lr_coef", (1.0, 0.1, 0.5, 2.0, 10.0), takes_rate=True)
def prodigy(base: Base, rate: Any, setting: Any) -> Transformation:
    """Mishchenko and Defazio 2023: finds the rate itself, so that ours is not used."""
    del base, rate
    return probed(lambda r: optax.contrib.prodigy(r, estim_lr_coef=setting))(1.0)


@method("D-Adaptation", OPTAX, "estim_lr0", (1e-6, 1e-8, 1e-7, 1e-5, 1e-4), takes_rate=True)
def dadapt(base: Base, rate: Any, setting: Any) -> Transformation:
    """Defazio and Mishchenko 2023, AdamW: likewise."""
    del base, rate
    return probed(lambda r: optax.contrib.dadapt_adamw(r, estim_lr0=setting))(1.0)


@method("schedule-free", OPTAX, "b1", (0.9, 0.5, 0.8, 0.95, 0.98), takes_rate=True)
def schedule_free(base: Base, rate: Any, setting: Any) -> Transformation:
    """Defazio et al. 2024, around SGD: averages in place of a schedule, with warm-up."""
    del base
    return probed(lambda r: optax.contrib.schedule_free_sgd(r, warmup_steps=WARM_UP, b1=setting))(rate)


@method("schedule-free AdamW", OPTAX, "b1", (0.9, 0.5, 0.8, 0.95, 0.98), second_moment=True, takes_rate=True)
def schedule_free_adamw(base: Base, rate: Any, setting: Any) -> Transformation:
    """The same with AdamW."""
    del base
    return probed(lambda r: optax.contrib.schedule_free_adamw(r, warmup_steps=WARM_UP, b1=setting))(rate)


@method("Muon", OPTAX, "beta", (0.95, 0.8, 0.9, 0.98, 0.99), second_moment=True, takes_rate=True)
def muon(base: Base, rate: Any, setting: Any) -> Transformation:
    """Jordan et al. 2024, with its own scaling: matrices along their singular vectors, Adam for all else."""
    del base
    return probed(lambda r: optax.contrib.muon(r, beta=setting))(rate)


@method("ZClip", PUBLISHED, "z_threshold", SCORES)
def zclip(optimizer: Transformation, setting: Any) -> Transformation:
    """Kumar et al. 2025, with the fixed clip at 1 of the authors' code."""
    return optax.chain(as_published(og.published.zclip(setting)), optimizer)


@method("AutoClip", PUBLISHED, "percentile", (10.0, 25.0, 50.0, 75.0, 90.0))
def autoclip(optimizer: Transformation, setting: Any) -> Transformation:
    """Seetharaman et al. 2020; a history as long as the longest run here, because theirs is unbounded."""
    return optax.chain(as_published(og.published.autoclip(setting, 1024)), optimizer)


@method("AdaGC", PUBLISHED, "ratio", (1.04, 1.5, 2.0, 4.0, 8.0))
def adagc(optimizer: Transformation, setting: Any) -> Transformation:
    """Wang et al. 2025, with the settings of its authors' code: ratio 1.04, decay 0.99, 100 steps of clipping to 1."""
    return optax.chain(as_published(og.published.adagc(setting)), optimizer)


@method("SPAM", PUBLISHED, "threshold", THRESHOLDS, second_moment=True)
def spam(optimizer: Transformation, setting: Any) -> Transformation:
    """Huang et al. 2025: elements against the second moment, moments reset every 500 steps."""
    return og.published.spam_clip(optimizer, setting)


@method("Stable-SPAM", PUBLISHED, "gamma1", MOMENTS)
def stable_spam(optimizer: Transformation, setting: Any) -> Transformation:
    """Huang et al. 2025: elements against the largest of their leaf, norms normalised."""
    return og.published.stable_spam(optimizer, gamma1=setting)


@method("StableAdamW", PUBLISHED, "max_rms", NORMS, second_moment=True)
def stable_adamw(optimizer: Transformation, setting: Any) -> Transformation:
    """Wortsman et al. 2023: the update's RMS."""
    return og.clip_by_update_rms(optimizer, setting)


@method("spike skipping", PUBLISHED, "deviations", SIGMAS)
def skipping(optimizer: Transformation, setting: Any) -> Transformation:
    """OLMo-core, Levanter and MaxText; with MaxText's treatment of NaN: the step is skipped."""
    rule = og.published.skip_spikes(128, setting)
    return og.guard(optimizer, rule, patience=_FOREVER, halt_after=_FOREVER, recorder_rows=1)


@method("og.guard alone", OURS)
def guard(optimizer: Transformation, setting: Any) -> Transformation:
    """Holds non-finite steps, and does nothing else."""
    del setting
    return og.guard(optimizer, recorder_rows=1)


@method("og.clip_by_global_norm", OURS, "max_norm", NORMS)
def guard_clip(optimizer: Transformation, setting: Any) -> Transformation:
    """A fixed bound, inside the guard."""
    return og.guard(optimizer, og.clip_by_global_norm(setting), recorder_rows=1)


@method("og.clip_by_norm_history", OURS, "deviations", (5.0, 2.0, 3.0, 8.0, 12.0))
def norm_history(optimizer: Transformation, setting: Any) -> Transformation:
    """The library's own history of the norm."""
    return og.guard(optimizer, og.clip_by_norm_history(deviations=setting), recorder_rows=1)


@method("og.clip_by_median_norm", OURS, "factor", (8.0, 2.0, 4.0, 16.0, 32.0))
def median_norm(optimizer: Transformation, setting: Any) -> Transformation:
    """A multiple of the median norm."""
    return og.guard(optimizer, og.clip_by_median_norm(setting), recorder_rows=1)


@method("og.zclip", OURS, "z_threshold", SCORES)
def repaired_zclip(optimizer: Transformation, setting: Any) -> Transformation:
    """ZClip, repaired."""
    return og.guard(optimizer, og.zclip(setting), recorder_rows=1)


@method("og.autoclip", OURS, "percentile", (90.0, 10.0, 25.0, 50.0, 75.0))
def repaired_autoclip(optimizer: Transformation, setting: Any) -> Transformation:
    """AutoClip, repaired."""
    return og.guard(optimizer, og.autoclip(setting), recorder_rows=1)


@method("og.adagc", OURS, "ratio", (2.0, 1.05, 1.5, 4.0, 8.0))
def repaired_adagc(optimizer: Transformation, setting: Any) -> Transformation:
    """AdaGC, repaired."""
    return og.guard(optimizer, og.adagc(setting), recorder_rows=1)


@method("og.skip_spikes", OURS, "deviations", SIGMAS)
def repaired_skipping(optimizer: Transformation, setting: Any) -> Transformation:
    """Spike skipping, repaired."""
    return og.guard(optimizer, og.skip_spikes(128, setting), recorder_rows=1)


@method("og.spam_clip", OURS, "threshold", THRESHOLDS, second_moment=True)
def repaired_spam(optimizer: Transformation, setting: Any) -> Transformation:
    """SPAM, repaired."""
    return og.guard(og.spam_clip(optimizer, setting), recorder_rows=1)


@method("og.stable_spam", OURS, "gamma1", MOMENTS)
def repaired_stable_spam(optimizer: Transformation, setting: Any) -> Transformation:
    """Stable-SPAM, repaired."""
    return og.guard(og.stable_spam(optimizer, gamma1=setting), recorder_rows=1)


@method("og.clip_by_update_norm", OURS, "deviations", (3.0, 2.0, 4.0, 6.0, 12.0))
def update_norm(optimizer: Transformation, setting: Any) -> Transformation:
    """The update against its own history."""
    return og.guard(optax.chain(optimizer, og.clip_by_update_norm(128, setting)), recorder_rows=1)


@method("og.clippy", OURS, "relative", (0.1, 0.01, 0.03, 0.3, 1.0))
def clippy(optimizer: Transformation, setting: Any) -> Transformation:
    """The update against the weights, element by element."""
    return og.guard(optax.chain(optimizer, og.clippy(setting)), recorder_rows=1)


@method("og.limit_step", OURS, "max_change", CHANGES)
def limit_step(optimizer: Transformation, setting: Any) -> Transformation:
    """The update against the parameters."""
    return og.guard(optax.chain(optimizer, og.limit_step(setting)), recorder_rows=1)


@method("og.stabilize", OURS, "max_norm", (float("inf"), 0.1, 0.3, 1.0, 10.0))
def stabilize(optimizer: Transformation, setting: Any) -> Transformation:
    """The preset."""
    return og.stabilize(optimizer, max_norm=setting, recorder_rows=1)


@method("og.stabilize(max_change)", OURS, "max_change", CHANGES)
def stabilize_change(optimizer: Transformation, setting: Any) -> Transformation:
    """The preset with a hard bound on the step."""
    return og.stabilize(optimizer, max_change=setting, recorder_rows=1)


@method("og.stabilize(max_change=None)", OURS, "max_norm", (float("inf"), 0.1, 0.3, 1.0, 10.0))
def stabilize_unbounded(optimizer: Transformation, setting: Any) -> Transformation:
    """The preset without a bound on the step."""
    return og.stabilize(optimizer, max_norm=setting, max_change=None, recorder_rows=1)


@method("og.stabilize(None, recovery)", OURS)
def stabilize_recovery(optimizer: Transformation, setting: Any) -> Transformation:
    """Without a bound, and with the whole ladder: resets moments, backs off, rewinds where the loss diverges."""
    del setting
    ladder = og.reset_moments(), og.back_off(), og.rewind(every=50)
    return og.stabilize(optimizer, max_change=None, recovery=ladder, recorder_rows=1)
