"""A gradient on its way to the optimizer."""

from typing import NamedTuple

import jax

from optax_guard._common.tree import cast_like, wider_dtype
from optax_guard._common.typing import AxisName, Mask, PyTree
from optax_guard._step.judge import scale_leaves
from optax_guard._step.mask import chosen, only_chosen, select_statistics, zeros_elsewhere
from optax_guard._step.observe import GradientStatistics, one_pass_statistics, scale_statistics

__all__ = ["Gradient"]


class Gradient(NamedTuple):
    """The gradient `total * factor` in the dtypes of `like`, and its statistics if they are known.

    The two parts are kept separate so that the mean of an accumulation is never written to memory: readers multiply on
    the fly.
    """

    total: PyTree
    like: PyTree
    factor: jax.Array | None = None  # f32[] or f32[n_leaves]; None stands for 1
    statistics: GradientStatistics | None = None  # the statistics of `total`, if it has been read

    def times(self, scale: jax.Array) -> "Gradient":
        """The gradient multiplied by one number, or by one per leaf."""
        if self.factor is not None:
            wide = wider_dtype(scale.dtype, self.factor.dtype)
            scale = scale.astype(wide) * self.factor.astype(wide)
        return self._replace(factor=scale)

    def written(self) -> PyTree:
        """The gradient as one tree."""
        return cast_like(self.total if self.factor is None else scale_leaves(self.total, self.factor), self.like)

    def look(self, function: str, mask: Mask | None, axis_name: AxisName | None) -> "Gradient":
        """The gradient with its statistics and zeros outside `mask`, in one read or none if they are known."""
        statistics = self.statistics
        if statistics is None:
            statistics = one_pass_statistics(only_chosen(function, mask, self.total), axis_name)
        elif mask is not None:
            statistics = select_statistics(statistics, chosen(function, mask, self.total))
        return self._replace(total=zeros_elsewhere(function, mask, self.total), statistics=statistics)

    def seen(self) -> GradientStatistics:
        """The statistics of the gradient itself, available only after `look`."""
        assert self.statistics is not None, "`look` comes first"
        return self.statistics if self.factor is None else scale_statistics(self.statistics, self.factor)
