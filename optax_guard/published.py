"""Published methods as their authors wrote them: their algorithms, their arguments, their defaults.

>>> import optax
>>> import optax_guard as og
>>> tx = og.guard(optax.adamw(3e-4), og.published.zclip())

The functions of the same names in `optax_guard` are repaired: take those for training, and these to compare with the
papers. Each docstring says what goes wrong, and where the function deviates from the authors' code.

====================================================  ===========================================================
Method                                                Function
====================================================  ===========================================================
ZClip, AutoClip, AdaGC                                `zclip`, `autoclip`, `adagc`: rules
skipping of OLMo-core and MaxText                     `skip_spikes`: a rule
SPAM, Stable-SPAM                                     `spam_clip`, `stable_spam`: around the optimizer
clip of the update of Levanter                        `clip_by_update_norm`: the last link of a chain
====================================================  ===========================================================

`tests/test_fidelity.py` compares every one with its authors' algorithm in float64.
"""

from optax_guard.rules._published import PublishedSpikeState, adagc, autoclip, skip_spikes, zclip
from optax_guard.transforms._published import PublishedUpdateNormState, clip_by_update_norm, spam_clip, stable_spam

__all__ = [
    "PublishedSpikeState",
    "PublishedUpdateNormState",
    "adagc",
    "autoclip",
    "clip_by_update_norm",
    "skip_spikes",
    "spam_clip",
    "stable_spam",
    "zclip",
]
