"""Inner products of parameters and gradients within the groups of any split of an array."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax._core.groups import ArrayGroups
from spherical_optax._discovery.splits import make_split


class RadialSums:
    """Sums of x g, (x g)^2, x^2 and g^2 over the groups of any split of one array.

    The device reduces the array once over every set of its axes (`_reduce_over_axes`). The sums of a
    split are then read from these reductions, and the sums of blocks are added up on the host.
    """

    def __init__(self, x: jax.Array, g: jax.Array):
        self._x, self._g = x, g
        self._unit, self._sums = _reduce_over_axes(x, g)
        self._long = [axis for axis, length in enumerate(x.shape) if length > 1]
        self._cache: dict[ArrayGroups, np.ndarray] = {}

    @functools.cached_property
    def influence(self) -> float:
        """||x g||, entry by entry: how much the outputs change with the entries, to first order."""
        return math.sqrt(self.sum_within(make_split(self._x.shape, ()))[1])

    @functools.cached_property
    def figure(self) -> float:
        """The radial figure |<x, g>| / ||x g|| of the whole array; NaN where the gradient vanishes."""
        radial = abs(float(self.sum_within(make_split(self._x.shape, ()))[0]))
        return radial / self.influence if self.influence > 0 else math.nan

    def sum_within(self, split: ArrayGroups) -> np.ndarray:
        """The four sums over each group, in float64 on the host: shape (4, *split.counts)."""
        if split not in self._cache:
            self._cache[split] = self._compute(split)
        return self._cache[split]

    def _compute(self, split: ArrayGroups) -> np.ndarray:
        if split.blocks is not None:
            uncut = self.sum_within(make_split(split.shape, split.axes))
            return uncut.reshape(4, *split.counts, -1).sum(-1)
        ascending = sorted(split.axes)
        kept, unit = tuple(map(self._long.index, ascending)), float(self._unit)
        if kept in self._sums:
            sums = np.asarray(self._sums[kept], np.float64)
        else:
            # Every entry of a matrix is a group of its own, and `_reduce_over_axes` has left it out.
            x, g = (np.asarray(y, np.float64).squeeze() for y in (self._x, self._g))
            g = g / unit if unit > 0 else g
            sums = np.stack([x * g, (x * g) ** 2, x * x, g * g])
        sums = sums * np.reshape([unit, unit**2, 1.0, unit**2], (4,) + (1,) * len(kept))
        return sums.transpose(0, *(1 + ascending.index(axis) for axis in split.axes))


@jax.jit
def _reduce_over_axes(
    x: jax.Array, g: jax.Array
) -> tuple[jax.Array, dict[tuple[int, ...], jax.Array]]:
    """The four sums for every set of axes that is kept; axes of length 1 are squeezed out first.

    g is divided by its largest entry, which is returned as its unit, because squares of small gradients
    would underflow. The entries of a matrix or larger array, with all axes kept, are not returned: they
    would take four times the memory of the array.
    """
    x, g = jnp.squeeze(x), jnp.squeeze(g)
    unit = jnp.max(jnp.abs(g))
    g = g / jnp.where(unit > 0, unit, 1.0)
    every = tuple(range(x.ndim))
    sums = {every: jnp.stack([x * g, jnp.square(x * g), x * x, g * g])}
    for n in reversed(every):
        for kept in itertools.combinations(every, n):
            # Each reduction starts from the smallest of those that keep one axis more.
            wider = [tuple(sorted((*kept, axis))) for axis in every if axis not in kept]
            source = min(wider, key=lambda axes: math.prod(x.shape[axis] for axis in axes))
            (axis,) = set(source) - set(kept)
            sums[kept] = jnp.sum(sums[source], axis=1 + source.index(axis))
    if x.ndim > 1:
        del sums[every]
    return unit, sums
