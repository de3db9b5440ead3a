# %% [markdown]
# # Rescue a run
#
# A classifier of handwritten digits is trained with plain AdamW. Its loss becomes NaN. This is what to do, from the
# checkpoint on: put in a guard, go on, and find out what it was. (Two scans among the data are blank. The person whose
# run it is does not know that yet.)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_guard as og
from optax_guard.diagnose import diagnose

rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
held_out = images[1500:], labels[1500:]

batches = []
for _ in range(400):
    rows = rng.choice(1500, 32, replace=False)
    batches.append((images[rows], labels[rows]))
for step in (170, 290):
    batches[step][0][5] = 0.0  # a blank scan

params = {
    "hidden": jnp.asarray(rng.normal(0, 0.1, (64, 64)), jnp.float32),
    "out": jnp.asarray(rng.normal(0, 0.1, (64, 10)), jnp.float32),
}


def logits_of(params, images):
    contrast = images / jnp.std(images, axis=-1, keepdims=True)
    return jax.nn.relu(contrast @ params["hidden"]) @ params["out"]


def loss_fn(params, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels).mean()


def accuracy(params):
    return float(jnp.mean(jnp.argmax(logits_of(params, held_out[0]), axis=-1) == held_out[1]))


# %% [markdown]
# ## The run that dies
#
# Plain Optax, with a checkpoint every 100 steps (in memory here; Orbax in life).

# %%
optimizer = optax.adamw(3e-3)


@jax.jit
def plain_step(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state, checkpoints, died = optimizer.init(params), {}, []
for step, batch in enumerate(batches):
    if step % 100 == 0:
        checkpoints[step] = params, state
    params, state, loss = plain_step(params, state, batch)
    died.append(float(loss))
print("the first loss that is NaN: step", int(np.argmax(np.isnan(died))))
print(f"accuracy at the end: {accuracy(params):.2f}, where chance is 0.10")

# %% [markdown]
# Every checkpoint after that step holds NaN as well. The last good one is from step 100.
#
# ## Go on from the last good checkpoint, with a guard
#
# `add_guard_state` takes over the moments and the counters of the old state, bit for bit. `tag=` tells the guard which
# batch it sees.

# %%
tx = og.stabilize(optimizer)
params, old_state = checkpoints[100]
state = og.add_guard_state(tx, params, old_state)


@jax.jit
def train_step(params, state, batch, index):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    params, state = og.apply_gradients(tx, grads, state, params, value=loss, tag=index)
    return params, state, loss


log_events, rescued, kept = og.event_logger(print), died[:100], {}
for step in range(100, 400):
    kept[step] = params  # to look at below
    params, state, loss = train_step(params, state, batches[step], step)
    rescued.append(float(loss))
    log_events(state, params)
log_events(state, params, wait=True)
print(f"accuracy at the end: {accuracy(params):.2f}")

# %% [markdown]
# Two steps were held because of NaN: parameters and moments are as if those batches had never come. (The guard counts
# its own steps from 0; the batch is the number that we passed.)

# %%
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
axis.plot(died, color="0.6", label="plain AdamW")
end = int(np.argmax(np.isnan(died))) - 1
axis.plot(end, died[end], "X", color="0.4", markersize=10, label="its parameters become NaN")
axis.plot(range(100, 400), rescued[100:], color="#0072b2", label="from step 100, with a guard")
axis.set(yscale="log", xlabel="step", ylabel="loss")
axis.legend()
figure

# %% [markdown]
# ## What was it?
#
# The line above named the batch, 170. A held step leaves the parameters as they were, so the same batch can be run
# again, operation by operation:

# %%
print(diagnose(loss_fn, kept[170], batches[170], progress=False))

# %% [markdown]
# An image without contrast, in row 5, and a division by its standard deviation. The cure is in the model,
# `images / (jnp.std(...) + 1e-6)`, or in the data. The guard stays: there will be a next time.
