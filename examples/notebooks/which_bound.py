# %% [markdown]
# # Which bound
#
# Clip the gradient at a fixed norm, clip it relative to its history, bound the step itself, or nothing? The answer
# depends on what goes wrong. Here all of them train the same small net on handwritten digits, at eight learning rates:
# first on clean data, then with batches whose loss was summed instead of averaged, 32 times too large.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_guard as og
from optax_guard.preflight import learning_rate_sweep

rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
rows = rng.choice(1500, (250, 32))
scale = np.ones(250, np.float32)
batches = {"images": images[rows], "labels": labels[rows], "scale": scale}
held_out = {"images": images[1500:], "labels": labels[1500:], "scale": np.float32(1)}

params = [jnp.asarray(rng.normal(0, 1.4 / n**0.5, (n, m)), jnp.float32) for n, m in ((64, 64), (64, 64), (64, 10))]


def loss_fn(params, batch):
    h = batch["images"]
    for kernel in params[:-1]:
        h = jax.nn.relu(h @ kernel)
    losses = optax.softmax_cross_entropy_with_integer_labels(h @ params[-1], batch["labels"])
    return batch["scale"] * losses.mean()


rates = np.geomspace(1e-3, 3, 8)
bounds = {
    "nothing": lambda rate: optax.adamw(rate),
    "clip_by_global_norm(1)": lambda rate: og.guard(optax.adamw(rate), og.clip_by_global_norm(1.0)),
    "clip_by_norm_history()": lambda rate: og.guard(optax.adamw(rate), og.clip_by_norm_history()),
    "stabilize()": lambda rate: og.stabilize(optax.adamw(rate)),
    "stabilize(max_change=0.01)": lambda rate: og.stabilize(optax.adamw(rate), max_change=0.01),
}


def sweep_all(batches):
    """The held-out loss after training, bound -> f64[rates]; at most that of guessing."""
    found = {}
    for name, make_tx in bounds.items():
        sweep = learning_rate_sweep(make_tx, loss_fn, params, batches, rates, validation=held_out)
        found[name] = np.minimum(np.nan_to_num(sweep.final_losses, nan=np.inf), np.log(10))
    return found


def picture(found, title):
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for (name, losses), line in zip(found.items(), ("0.6", "#e69f00", "#56b4e9", "#009e73", "#0072b2"), strict=True):
        axis.plot(rates, losses, "o-", color=line, label=name)
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss", title=title)
    axis.legend()
    return figure


# %% [markdown]
# ## Clean data
#
# `learning_rate_sweep` trains at all rates at once, in one compiled program for each bound.

# %%
clean = sweep_all(batches)
picture(clean, "Clean data")

# %% [markdown]
# With AdamW, what a clip does to the *gradient* matters little: Adam divides by the gradient's own size, so the step is
# as large as the learning rate says. What helps at rates that are too large is a bound on the *step*. With
# `max_change=0.01` no step moves the parameters by more than 1 % of their norm. By default `stabilize` allows more if
# the steps before it have grown that far, as in a warm-up; here there is none, and the two hardly differ.
#
# ## With faults
#
# Every tenth batch comes with a summed loss.

# %%
scale[5::10] = 32.0
faulty = sweep_all(batches)
picture(faulty, "Every tenth loss 32 times too large")

# %% [markdown]
# ## What to take from it
#
# How much each lost to the faults at its best rate, and at which share of the rates it ends below half of the loss of
# guessing:

# %%
for name in bounds:
    ratio = faulty[name].min() / clean[name].min()
    usable = [np.mean(losses[name] < np.log(10) / 2) for losses in (clean, faulty)]
    print(f"{name:28} best loss x{ratio:.2f}   usable rates: {usable[0]:.2f} clean, {usable[1]:.2f} with faults")

# %% [markdown]
# Whoever knows the right rate needs little: a fixed clip at a bound that suits the task is as good as anything, with or
# without faults. Whoever does not should bound the step, as `stabilize` does. [Which rule](../rules/which_rule.md)
# has the same comparison for all methods, on ten tasks and under fifteen faults.
