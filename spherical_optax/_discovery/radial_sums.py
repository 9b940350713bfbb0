"""Inner products of parameters and gradients within the groups of any split of an array."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._discovery.portions import make_portions
from spherical_optax._discovery.splits import make_split

# The device sums over axes of at least this length; a sum over a shorter one is as large as the array.
LONG_ENOUGH = 8

# For each axis, by its number, the four sums over this axis alone.
SumsOverOneAxis = dict[int, jax.Array]


class RadialSums:
    """Sums of x g, (x g)^2, x^2 and g^2 over the groups of any split of one array.

    The device reduces the array over each of its long axes alone (`_sum_over_single_axes`). All other
    sums are added up from these on the host, in float64.
    """

    def __init__(self, x: jax.Array, g: jax.Array, unit: jax.Array, sums: SumsOverOneAxis):
        self._x, self._g, self._unit, self._sums = x, g, float(unit), sums
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

    def find_penalized_axes(self) -> set[int]:
        """The index axes for which g has the same part along x in all groups, as of an L2 penalty.

        The gradient of lambda ||x||^2 / 2 is lambda x: <x, g> / <x, x> is then lambda in every group of
        a matrix, up to what an eps adds.
        """
        found = set()
        for axis in self._long if len(self._long) > 1 else ():
            radial, _, xx, _ = self.sum_within(make_split(self._x.shape, (axis,)))
            ratio = radial / np.maximum(xx, np.finfo(xx.dtype).tiny)
            if len(ratio) > 2 and np.std(ratio) < 0.3 * abs(np.mean(ratio)):
                found.add(axis)
        return found

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
        kept = [self._long.index(axis) for axis in ascending]
        # The smallest array that has all of the axes that are kept.
        at_hand = [(axis, sums) for axis, sums in self._sums.items() if axis not in kept]
        if at_hand:
            axis, sums = min(at_hand, key=lambda entry: entry[1].size)
            found, kept = np.asarray(sums, np.float64), [k - (k > axis) for k in kept]
        else:
            found = self._multiply_entries()
        others = [axis for axis in range(found.ndim - 1) if axis not in kept]
        found = found.sum(tuple(1 + axis for axis in others))
        found = found * np.reshape(
            [self._unit, self._unit**2, 1.0, self._unit**2], (4,) + (1,) * len(kept)
        )
        return found.transpose(0, *(1 + ascending.index(axis) for axis in split.axes))

    def _multiply_entries(self) -> np.ndarray:
        """The four products of every entry."""
        x, g = (np.asarray(y, np.float64).squeeze() for y in (self._x, self._g))
        g = g / self._unit if self._unit > 0 else g
        return np.stack([x * g, (x * g) ** 2, x * x, g * g])


def make_radial_sums(xs: Sequence[jax.Array], gs: Sequence[jax.Array]) -> list[RadialSums]:
    """The `RadialSums` of all arrays, from one program for each portion."""
    reduced: list[tuple[jax.Array, SumsOverOneAxis]] = []
    for portion in make_portions(xs):
        found = _reduce_all(list(xs[portion]), list(gs[portion]))
        reduced += jax.block_until_ready(found)  # so that no two portions are summed at once
    return [RadialSums(x, g, *sums) for x, g, sums in zip(xs, gs, reduced, strict=True)]


@jax.jit
def _reduce_all(
    xs: list[jax.Array], gs: list[jax.Array]
) -> list[tuple[jax.Array, SumsOverOneAxis]]:
    return list(map(_sum_over_single_axes, xs, gs))


def _sum_over_single_axes(x: jax.Array, g: jax.Array) -> tuple[jax.Array, SumsOverOneAxis]:
    """The four sums over each long axis alone; axes of length 1 are squeezed out first.

    g is divided by its largest entry, which is returned as its unit, because squares of small gradients
    would underflow.
    """
    x, g = jnp.squeeze(x), jnp.squeeze(g)
    unit = jnp.max(jnp.abs(g))
    g = g / jnp.where(unit > 0, unit, 1.0)
    products = (x * g, jnp.square(x * g), x * x, g * g)
    return unit, {
        axis: jnp.stack([jnp.sum(product, axis) for product in products])
        for axis, length in enumerate(x.shape)
        if length >= LONG_ENOUGH
    }
