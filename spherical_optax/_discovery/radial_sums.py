"""Inner products of parameters and gradients over any choice of axes, reduced where the arrays are."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax._core.sphere import Sphere


@dataclasses.dataclass(frozen=True)
class Part:
    """One array split into groups, in normal form: no index axis of length 1, no single block."""

    shape: tuple[int, ...]
    # From the front, ascending, but an axis that is cut into blocks comes last.
    axes: tuple[int, ...]
    blocks: int | None = None

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many groups along each index axis."""
        lengths = tuple(self.shape[axis] for axis in self.axes)
        return lengths if self.blocks is None else (*lengths[:-1], self.blocks)

    @property
    def size(self) -> int:
        """Coordinates per group."""
        return math.prod(self.shape) // math.prod(self.counts)

    def sphere(self, tie: str | None) -> Sphere:
        return Sphere(tuple(axis - len(self.shape) for axis in self.axes), self.blocks, tie)

    def coarser(self) -> list["Part"]:
        """Without each of the index axes in turn; the last axis takes its blocks along."""
        axes, last = self.axes, len(self.axes) - 1
        return [
            Part(self.shape, axes[:k] + axes[k + 1 :], self.blocks if k < last else None)
            for k in range(len(axes))
        ]


class Sums:
    """Sums of x g, (x g)^2, x^2 and g^2 of one array, over the groups of any part of it."""

    def __init__(self, x: jax.Array, g: jax.Array):
        self._x, self._g = x, g
        self._unit, self._sums = _sums(x, g)
        self._long = [axis for axis, length in enumerate(x.shape) if length > 1]
        self._cache: dict[Part, np.ndarray] = {}

    @functools.cached_property
    def influence(self) -> float:
        """||x g||, entry by entry: how much the outputs change with the entries, to first order."""
        return math.sqrt(self.of(Part(self._x.shape, ()))[1])

    @functools.cached_property
    def figure(self) -> float:
        """The radial figure |<x, g>| / ||x g|| of the whole array; NaN where the gradient vanishes."""
        radial = abs(float(self.of(Part(self._x.shape, ()))[0]))
        return radial / self.influence if self.influence > 0 else math.nan

    def of(self, part: Part) -> np.ndarray:
        """The four, in float64 on the host: shape (4, *part.counts)."""
        if part not in self._cache:
            self._cache[part] = self._of(part)
        return self._cache[part]

    def _of(self, part: Part) -> np.ndarray:
        if part.blocks is not None:
            whole = self.of(dataclasses.replace(part, blocks=None))
            return whole.reshape(4, *part.counts, -1).sum(-1)
        ascending = sorted(part.axes)
        kept, unit = tuple(map(self._long.index, ascending)), float(self._unit)
        if kept in self._sums:
            sums = np.asarray(self._sums[kept], np.float64)
        else:  # every entry of a matrix is a group: no reduction, so nothing to keep on the device
            x, g = (np.asarray(y, np.float64).squeeze() for y in (self._x, self._g))
            g = g / unit if unit > 0 else g
            sums = np.stack([x * g, (x * g) ** 2, x * x, g * g])
        sums = sums * np.reshape([unit, unit**2, 1.0, unit**2], (4,) + (1,) * len(kept))
        return sums.transpose(0, *(1 + ascending.index(axis) for axis in part.axes))


@jax.jit
def _sums(x: jax.Array, g: jax.Array) -> tuple[jax.Array, dict[tuple[int, ...], jax.Array]]:
    """Sums by the axes that are kept, but for all of a matrix; g in units of its largest entry, so that
    no square vanishes. Axes of length 1 do not count.
    """
    x, g = jnp.squeeze(x), jnp.squeeze(g)
    unit = jnp.max(jnp.abs(g))
    g = g / jnp.where(unit > 0, unit, 1.0)
    every = tuple(range(x.ndim))
    sums = {every: jnp.stack([x * g, jnp.square(x * g), x * x, g * g])}
    for n in reversed(every):
        for kept in itertools.combinations(every, n):
            # From the smallest of those that keep one axis more.
            wider = [tuple(sorted((*kept, axis))) for axis in every if axis not in kept]
            wide = min(wider, key=lambda axes: math.prod(x.shape[axis] for axis in axes))
            (axis,) = set(wide) - set(kept)
            sums[kept] = jnp.sum(sums[wide], axis=1 + wide.index(axis))
    if x.ndim > 1:
        del sums[every]
    return unit, sums
