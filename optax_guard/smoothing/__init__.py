"""Noise at test time: classifiers smoothed with Gaussian noise, their certificates, and accuracy under noise.

=========================================  =====================================================================
Function                                   Gives you
=========================================  =====================================================================
`augment_with_noise(inputs, sigma, key=)`  how to train a network that tolerates noise (inside the training step)
`smooth(apply_fn, sigma)`                  the classifier that returns the most likely class under noise
`predict(smoothed, params, inputs, key=)`  which class that is, or an abstention if the samples do not decide
`certify(smoothed, params, inputs, key=)`  how far an input can move before that class may change
`certified_accuracy`, its plot             the fraction of a test set that is right and stays right within a radius
`perturbed_accuracy(apply_fn, ...)`        accuracy under noise on the inputs and on the weights, without a guarantee
=========================================  =====================================================================

Throughout, `apply_fn(params, inputs)` maps inputs [batch, ...] to logits [batch, classes]. The parameters are an
argument so that one compiled function serves every checkpoint; values that `apply_fn` closes over become constants.
Dropout and batch norm must behave as they do at test time.

    linen     apply_fn, params = model.apply, variables
    nnx       graph, params = nnx.split(model);  apply_fn = lambda params, x: nnx.merge(graph, params)(x)
    Equinox   params, rest = eqx.partition(model, eqx.is_array)
              apply_fn = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)
    closure   apply_fn, params = (lambda _, x: classify(x)), ()

None of these functions goes into an optimizer's chain. Only `augment_with_noise` runs inside `jit`; the others call
compiled functions themselves and return NumPy arrays. Noise on weights or gradients certifies nothing about inputs.
"""

from optax_guard.smoothing._arguments import ABSTAIN, SmoothedClassifier
from optax_guard.smoothing._certificate import (
    Certificate,
    certified_accuracy,
    certify,
    clopper_pearson_lower,
    plot_certified_accuracy,
)
from optax_guard.smoothing._classifier import augment_with_noise, class_counts, predict, smooth
from optax_guard.smoothing._perturbed import PerturbedAccuracy, perturbed_accuracy

__all__ = [
    "ABSTAIN",
    "Certificate",
    "PerturbedAccuracy",
    "SmoothedClassifier",
    "augment_with_noise",
    "certified_accuracy",
    "certify",
    "class_counts",
    "clopper_pearson_lower",
    "perturbed_accuracy",
    "plot_certified_accuracy",
    "predict",
    "smooth",
]
