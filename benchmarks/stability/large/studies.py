"""What is run: the methods on the two large tasks, and the study of whether a bound on the step is neutral.

A job is one method (or optimizer) on one net, with all its rates, seeds and bounds: one compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optax_guard as og
from benchmarks.stability.large.cartpole import STEPS, cartpole
from benchmarks.stability.large.training import character_model, schedule, training
from benchmarks.stability.large.trials import Lanes, Trial, grid
from benchmarks.stability.methods import METHODS, Transformation
from benchmarks.stability.tasks import TASKS

WARM_UP = 0.1  # of the steps
NO_BOUND, BOUND = float("inf"), 0.01
SEEDS, NEUTRAL_SEEDS = 3, 10


class Large(NamedTuple):
    """One large task, for the comparison of methods."""

    title: str
    steps: int  # of the optimizer
    rates: tuple[float, ...]
    seeds: int
    max_norm: float  # of the clip that people use there
    optimizer: Callable[[Any], Transformation]  # of a rate or schedule


LARGE = {
    "characters": Large(
        "character language model, 1.3 M parameters, AdamW",
        1500,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        3,
        1.0,
        lambda rate: optax.adamw(rate, b2=0.999),
    ),
    "cartpole": Large("PPO on CartPole, Adam", STEPS, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 5, 0.5, optax.adam),
}


def published(name: str, large: Large, rate: Any) -> Transformation:
    """A method of StabilityBench at its published setting, without warm-up."""
    method = METHODS[name]
    return method.make(large.optimizer(schedule(rate, large.steps, 0)), method.settings[0])


def clip_and_warm_up(large: Large, rate: Any) -> Transformation:
    """The cure that most people use."""
    warm = schedule(rate, large.steps, int(WARM_UP * large.steps))
    return optax.chain(optax.clip_by_global_norm(large.max_norm), large.optimizer(warm))


def momo_adam(large: Large, rate: Any) -> Transformation:
    """Schaipp et al. 2023: a Polyak step size, capped at the rate."""
    return optax.contrib.momo_adam(schedule(rate, large.steps, 0), b2=0.999)


def limited(large: Large, rate: Any) -> Transformation:
    """The preset with a hard bound on the step."""
    return og.stabilize(large.optimizer(schedule(rate, large.steps, 0)), max_change=BOUND, recorder_rows=1)


def unbounded(large: Large, rate: Any) -> Transformation:
    """The preset without a bound on the step."""
    return og.stabilize(large.optimizer(schedule(rate, large.steps, 0)), max_change=None, recorder_rows=1)


COMPARED: dict[str, tuple[str, Callable[[Large, Any], Transformation]]] = {
    "none": ("none", functools.partial(published, "none")),
    "clip_and_warm_up": ("clip + linear warm-up", clip_and_warm_up),
    "adagc": ("AdaGC", functools.partial(published, "adagc")),
    "stable_spam": ("Stable-SPAM", functools.partial(published, "stable_spam")),
    "momo_adam": ("MoMo-Adam", momo_adam),
    "stabilize": ("og.stabilize", functools.partial(published, "stabilize")),
    "stabilize_change": ("og.stabilize(max_change=0.01)", limited),
    "stabilize_unbounded": ("og.stabilize(max_change=None)", unbounded),
}


class Customary(NamedTuple):
    """An optimizer and the rates at which people run it."""

    title: str
    optimizer: Callable[[Any, int], Transformation]  # of the rate and the number of steps
    rates: tuple[float, ...]


def warmed(optimizer: Callable[[Any], Transformation]) -> Callable[[Any, int], Transformation]:
    """With linear warm-up and a cosine down to 0."""
    return lambda rate, steps: optimizer(schedule(rate, steps, int(WARM_UP * steps)))


def muon(rate: Callable[[Any], Any]) -> Transformation:
    """Its own rate for matrices; Adam at a tenth of it for all else."""
    return optax.contrib.muon(rate, adam_learning_rate=lambda count: 0.1 * rate(count))


CUSTOMARY = {
    "sgd": Customary("SGD, momentum 0.9", warmed(lambda rate: optax.sgd(rate, momentum=0.9)), (0.01, 0.03, 0.1)),
    "adamw": Customary("AdamW", warmed(optax.adamw), (3e-4, 1e-3, 3e-3)),
    "lion": Customary("Lion", warmed(optax.lion), (1e-4, 3e-4, 1e-3)),
    "adafactor": Customary(
        "Adafactor", warmed(lambda rate: optax.adafactor(rate, min_dim_size_to_factor=32)), (3e-3, 1e-2, 3e-2)
    ),
    "muon": Customary("Muon", warmed(muon), (0.007, 0.02, 0.06)),
    "schedule_free": Customary(
        "schedule-free AdamW",
        lambda rate, steps: optax.contrib.schedule_free_adamw(rate, warmup_steps=int(WARM_UP * steps)),
        (1e-3, 2.5e-3, 1e-2),
    ),
}

NETS = ["characters", "cartpole", *TASKS]


class Size(NamedTuple):
    """How much of a job to run."""

    seeds: int | None = None  # None: as many as the study has
    rates: int | None = None  # the lowest so many; None: all
    shorten: int = 1  # the steps, by this factor


WHOLE = Size()


class Job(NamedTuple):
    """One compiled program."""

    name: str
    trial: Callable[[], Trial]
    lanes: Lanes
    shape: tuple[int, int, int]  # bounds, seeds, rates


def shortened(trial: Trial, shorten: int) -> Trial:
    """A trial with fewer steps, to see whether it runs."""
    return trial._replace(steps=max(trial.steps // shorten, 2))


def trial_of(net: str, make: Callable[[Lanes, int], Transformation]) -> Trial:
    """A net's trial with an optimizer that depends on the lane and the number of steps."""
    if net == "cartpole":
        return cartpole(lambda lane: make(lane, STEPS))
    task = character_model() if net == "characters" else TASKS[net]()
    return training(task, lambda lane: make(lane, task.steps))


def compared(net: str, method: str) -> Trial:
    """A method on a large task."""
    make = COMPARED[method][1]
    return trial_of(net, lambda lane, steps: make(LARGE[net]._replace(steps=steps), lane.rate))


def neutral(net: str, optimizer: str) -> Trial:
    """`stabilize` with and without its own bound, at customary rates."""
    make = CUSTOMARY[optimizer].optimizer

    def guarded(lane: Lanes, steps: int) -> Transformation:
        bounded = optax.chain(make(lane.rate, steps), og.limit_step_growth(lane.bound))
        return og.stabilize(bounded, max_change=None, recorder_rows=1)

    return trial_of(net, guarded)


def hard(net: str, optimizer: str) -> Trial:
    """The same with a hard bound, `max_change`."""
    make = CUSTOMARY[optimizer].optimizer
    return trial_of(
        net, lambda lane, steps: og.stabilize(make(lane.rate, steps), max_change=lane.bound, recorder_rows=1)
    )


STUDIES = {"neutral": neutral, "hard": hard}  # the bound of the default, and that of a number as `max_change`


def all_jobs(size: Size = WHOLE) -> dict[str, Job]:
    """Every job, the most telling first."""
    jobs = {}

    def add(name: str, trial: Callable[[], Trial], count: int, rates: Any, bounds: Any) -> None:
        count, rates = size.seeds or count, rates[: size.rates]
        shape = len(bounds), count, len(rates)
        jobs[name] = Job(name, lambda: shortened(trial(), size.shorten), grid(count, rates, bounds), shape)

    for net, large in LARGE.items():
        for method in COMPARED:
            trial = functools.partial(compared, net, method)
            add(f"{net} {method}", trial, large.seeds, large.rates, (NO_BOUND,))
    for study, trial_with in STUDIES.items():
        for net in NETS:
            for optimizer, customary in CUSTOMARY.items():
                trial = functools.partial(trial_with, net, optimizer)
                add(f"{study}:{net} {optimizer}", trial, NEUTRAL_SEEDS, customary.rates, (NO_BOUND, BOUND))
    return jobs
