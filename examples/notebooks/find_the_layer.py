# %% [markdown]
# # Find the layer
#
# A net of six layers tells benign from malignant tumours (scikit-learn's breast cancer data). One layer has a gate,
# `h * exp(h @ gate)`, and a penalty that should keep the gate small. It sets in at step 200, with the wrong sign: the
# gate grows, the loss falls, nobody worries. Which layer was it, how long before could it be seen, and what exactly
# happened?

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import optax_guard as og
from optax_guard.diagnose import diagnose
from optax_guard.report import read_log, story

rng = np.random.default_rng(0)
inputs, labels = load_breast_cancer(return_X_y=True)
inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).astype(np.float32)

sizes = (30, 32, 32, 32, 32, 32)
params = {
    f"layer_{i}": {"kernel": jnp.asarray(rng.normal(0, (1 / n) ** 0.5, (n, m)), jnp.float32)}
    for i, (n, m) in enumerate(itertools.pairwise(sizes))
}
params["layer_3"]["gate"] = jnp.asarray(rng.normal(0, 0.01, (32, 32)), jnp.float32)
params["out"] = {"kernel": jnp.zeros((32, 1))}


def loss_fn(params, batch):
    h, labels, strength = batch
    for i in range(5):
        layer = params[f"layer_{i}"]
        h = jnp.tanh(h @ layer["kernel"])
        if "gate" in layer:
            h = h * jnp.exp(h @ layer["gate"])
    logits = (h @ params["out"]["kernel"])[:, 0]
    penalty = -strength.mean() * jnp.sum(jnp.square(params["layer_3"]["gate"]))  # the mistake
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean() + penalty


# %% [markdown]
# ## The run
#
# `record_leaves` is a rule that never acts and keeps the gradient norm of every leaf. It comes first, and costs one
# number per leaf and step.

# %%
tx = og.guard(optax.sgd(0.1), og.record_leaves(), halt_after=5)
state = tx.init(params)


@jax.jit
def train_step(params, state, batch, index):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return og.apply_gradients(tx, grads, state, params, value=loss, tag=index)


log_events = og.event_logger(print)
try:
    for step in range(400):
        rows = rng.choice(len(labels), 64, replace=False)
        batch = inputs[rows], labels[rows].astype(np.float32), np.full(64, 0.6 if step >= 200 else 0, np.float32)
        params, state = train_step(params, state, batch, step)
        log_events(state, params, wait=True)
except og.TrainingHalted as error:
    print("halted:", str(error).split(". ")[0])

# %% [markdown]
# Every line names `layer_0/kernel`. That is where NaN was *found*, first in the order of the leaves, and not where it
# was made: it went backwards through all layers below the gate.
#
# ## Before it happened
#
# The state remembers the norms of all leaves, so it can be asked which of them left its usual range first:

# %%
print(*story(read_log(state, params)), sep="\n")

# %% [markdown]
# `layer_3/gate`, fifty steps earlier. The same as a picture, each leaf against its own median:

# %%
log = og.leaf_log(state, params)
with np.errstate(invalid="ignore"):
    relative = log.norms / np.nanmedian(log.norms, axis=0)
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for name, column in zip(log.names, relative.T, strict=True):
    is_gate = name == "layer_3/gate"
    axis.plot(log.steps, column, color="#d55e00" if is_gate else "0.75", zorder=3 if is_gate else 2, label=name)
axis.set(yscale="log", xlabel="step", ylabel="gradient norm / its median")
axis.legend(fontsize=7)
figure

# %% [markdown]
# ## What happened in the step itself
#
# The guard has held the step, so `params` are those from before it, and the batch can be run again, operation by
# operation:

# %%
found = diagnose(loss_fn, params, batch, progress=False)
print(found.story.splitlines()[1])  # all of it: print(found)

# %% [markdown]
# The exponential, in the line of the gate. The cure is the sign of the penalty. A guard can only tell: no rule knows
# which way a loss should have pointed.
