"""The ways in which the arrays of one module may split into groups, and how invariant each one is.

A candidate splits every array it contains along some axes, possibly the last of them into blocks; the
groups of tied arrays are united one by one. If the groups of a candidate are invariant, so are those of
every coarser one, whose groups are unions of them: so candidates are looked at from the coarsest to
the finest, and those finer than a clear "no" not at all.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax._probes import dimensions
from spherical_optax._spheres import Sphere

# How much larger the larger radius is.
LARGER = 10.0
# From so many groups on, the figures of one probe are a sample; of fewer, every probe has to agree.
MANY = 16


@dataclasses.dataclass(frozen=True)
class Part:
    """How a candidate splits one array."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]  # ascending, but the one that is cut into blocks is the last
    blocks: int | None = None

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        lengths = tuple(self.shape[axis] for axis in self.axes)
        return lengths if self.blocks is None else (*lengths[:-1], self.blocks)

    @property
    def size(self) -> int:
        return math.prod(self.shape) // math.prod(self.counts)

    def sphere(self, tie: str | None = None) -> Sphere:
        return Sphere(tuple(axis - len(self.shape) for axis in self.axes), self.blocks, tie)

    def coarser(self) -> list["Part"]:
        """This part with each of its index axes left out in turn; a last axis takes its blocks along."""
        axes, last = self.axes, len(self.axes) - 1
        return [
            Part(self.shape, axes[:k] + axes[k + 1 :], self.blocks if k < last else None)
            for k in range(len(axes))
        ]


def parts(shape: tuple[int, ...]) -> Iterator[Part]:
    """Every choice of index axes longer than 1, and of blocks of one of them."""
    long = [axis for axis, length in enumerate(shape) if length > 1]
    for n in range(len(long) + 1):
        for axes in itertools.combinations(long, n):
            yield Part(shape, axes)
            for axis in axes:
                rest = tuple(a for a in axes if a != axis)
                for blocks in range(2, shape[axis] // 2 + 1):
                    if shape[axis] % blocks == 0:
                        yield Part(shape, (*rest, axis), blocks)


class Evidence(NamedTuple):
    """Radial figures of a candidate, which scatter around 1 where groups are not invariant."""

    natural: float  # at the natural radius, of a typical group
    large: float  # at LARGER times that, the root mean square over the groups
    worst: float  # and the largest
    clear: float  # natural figures beyond this are a "no"

    def holds(self, tol: float) -> bool:
        """Natural and larger radius agree.

        A figure that remains at the natural radius may be the eps of a normalisation layer: then it
        falls with the square of the radius. If it is a branch that drowns its shortcut, or a softmax
        that saturates, it falls with the radius.
        """
        small = self.large < tol and self.worst < 10 * tol and self.natural < self.clear
        return small and (self.natural < tol or self.large < 2 * self.natural / LARGER**2)

    def close(self, tol: float) -> bool:
        return self.large < 3 * tol and self.natural < self.clear


@dataclasses.dataclass
class Candidate:
    """Arrays of one module, by their index, split into groups that are united one by one."""

    parts: dict[int, Part]
    figures: list[np.ndarray] = dataclasses.field(default_factory=list)  # per probe, of every group
    scaled: list[bool] = dataclasses.field(default_factory=list)  # per probe
    alive: bool = True

    @property
    def key(self) -> Any:
        return frozenset(self.parts.items())

    @functools.cached_property
    def size(self) -> int:
        """Coordinates per group, d."""
        return sum(part.size for part in self.parts.values())

    @functools.cached_property
    def groups(self) -> int:
        return math.prod(next(iter(self.parts.values())).counts)

    @functools.cached_property
    def coarser(self) -> list[Any]:
        columns = [part.coarser() for part in self.parts.values()]
        return [frozenset(zip(self.parts, row, strict=True)) for row in zip(*columns, strict=True)]

    def measure(self, sums: dict[int, "Sums"], scaled: bool) -> None:
        """Adds the figures |<x, g>| sqrt(d) / (||x|| ||g||) of one probe; NaN where g says nothing."""
        total = sum(sums[i].of(part) for i, part in self.parts.items())
        radial, influence = np.abs(total[0]), np.sqrt(total[1] * total[2])
        # A group that hardly matters next to the others, such as the row of a rare token, is rounding.
        there = influence > 1e-3 * np.sqrt(np.mean(np.square(influence)))
        figure = np.full(radial.shape, np.nan)
        figure[there] = radial[there] * math.sqrt(self.size) / influence[there]
        self.figures.append(figure.ravel())
        self.scaled.append(scaled)
        if not scaled:
            self.alive = not self._clearly_not()

    @property
    def _natural(self) -> np.ndarray:
        """The median over the groups, of each probe at the natural radius that says something."""
        rows = [f for f, s in zip(self.figures, self.scaled, strict=True) if not s]
        return np.array([np.nanmedian(row) for row in rows if np.isfinite(row).any()])

    def _clearly_not(self) -> bool:
        natural = self._natural
        if self.groups >= MANY:
            return bool((natural > 0.5).any() or (natural > 0.3).sum() > 1)
        return bool((natural > 0.3).any())

    @property
    def measured(self) -> bool:
        return self._natural.size > 0

    @functools.cached_property
    def evidence(self) -> Evidence:
        """Of many groups, the worst probe of each group and the odd probe do not count."""
        many, natural = self.groups >= MANY, self._natural
        if many:
            typical, clear = (float(np.median(natural)) if natural.size else math.nan), 0.3
        else:
            typical, clear = (float(_rms(natural)) if natural.size else math.nan), 0.1
        rows = [f for f, s in zip(self.figures, self.scaled, strict=True) if s]
        large = _largest(np.stack(rows), but=int(many)) if rows else np.array([])
        large = large[np.isfinite(large)]
        if not large.size:
            return Evidence(typical, math.nan, math.nan, clear)
        return Evidence(typical, _rms(large), float(large.max()), clear)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _largest(rows: np.ndarray, but: int) -> np.ndarray:
    """The largest of each column but so many, NaN aside; the smallest where there are no more."""
    ordered = -np.sort(-rows, axis=0)  # NaN last
    there = np.isfinite(rows).sum(axis=0)
    index = np.clip(np.minimum(but, there - 1), 0, None)
    return np.take_along_axis(ordered, index[None], axis=0)[0]


def candidates(arrays: dict[int, Any], vectors: bool) -> list[Candidate]:
    """All candidates of one module's arrays, from the coarsest to the finest."""
    found = []
    options = {i: list(parts(jnp.shape(x))) for i, x in arrays.items()}
    # Scale, kernel and bias; in a flat dict of many arrays no more than kernel and bias.
    largest = 3 if len(arrays) <= 8 else 2
    for n in range(1, largest + 1):
        for tied in itertools.combinations(arrays, n):
            if not vectors and all(dimensions(arrays[i]) < 2 for i in tied):
                continue
            by_counts: dict[tuple[int, ...], list[list[Part]]] = {}
            for k, i in enumerate(tied):
                for part in options[i]:
                    by_counts.setdefault(part.counts, [[] for _ in tied])[k].append(part)
            for columns in by_counts.values():
                for row in itertools.product(*columns):
                    found.append(Candidate(dict(zip(tied, row, strict=True))))
    return sorted((c for c in found if c.size > 1), key=lambda c: -c.size)


class Sums:
    """Sums of x g, x^2 and g^2 of one array over any choice of axes, on the host when asked for."""

    def __init__(self, x: jax.Array, g: jax.Array):
        self._x, self._g = x, g
        self._unit, self._sums = _sums(x, g)
        self._long = [axis for axis, length in enumerate(x.shape) if length > 1]
        self._cache: dict[Part, np.ndarray] = {}

    @property
    def influence(self) -> float:
        """||x|| ||g||: how much the outputs may change, to first order, with the array's direction."""
        _, xx, gg = self.of(Part(self._x.shape, ()))
        return math.sqrt(xx * gg)

    @property
    def radial(self) -> float:
        """The figure of the whole array."""
        radial = self.of(Part(self._x.shape, ()))[0]
        return abs(radial) * math.sqrt(self._x.size) / self.influence if self.influence > 0 else 0.0

    def of(self, part: Part) -> np.ndarray:
        """In the order of the part's index axes, with blocks summed: (3, *counts), float64."""
        if part not in self._cache:
            self._cache[part] = self._of(part)
        return self._cache[part]

    def _of(self, part: Part) -> np.ndarray:
        if part.blocks is not None:
            whole = self.of(dataclasses.replace(part, blocks=None))
            return whole.reshape(3, *part.counts, -1).sum(-1)
        kept = tuple(sorted(self._long.index(axis) for axis in part.axes))
        if kept in self._sums:
            sums = np.asarray(self._sums[kept], np.float64)
        else:
            x, g = (np.asarray(y, np.float64).squeeze() for y in (self._x, self._g))
            g = g / self._unit if self._unit > 0 else g
            sums = np.stack([x * g, x * x, g * g])
        unit = float(self._unit)
        sums = sums * np.reshape([unit, 1.0, unit**2], (3,) + (1,) * len(kept))
        order = sorted(part.axes)
        return sums.transpose(0, *(1 + order.index(axis) for axis in part.axes))


@jax.jit
def _sums(x: jax.Array, g: jax.Array) -> tuple[jax.Array, dict[tuple[int, ...], jax.Array]]:
    """Sums over every choice of axes, those over many from those over fewer; g in units of its size.

    All the entries of a matrix, summed over nothing, would be as large as the parameters: left out.
    """
    x, g = jnp.squeeze(x), jnp.squeeze(g)
    unit = jnp.max(jnp.abs(g))
    g = g / jnp.where(unit > 0, unit, 1.0)
    every = tuple(range(x.ndim))
    sums = {every: jnp.stack([x * g, x * x, g * g])}
    for n in reversed(range(x.ndim)):
        for kept in itertools.combinations(every, n):
            above = [tuple(sorted((*kept, axis))) for axis in every if axis not in kept]
            above = min(above, key=lambda axes: math.prod(x.shape[a] for a in axes))
            (axis,) = set(above) - set(kept)
            sums[kept] = jnp.sum(sums[above], axis=1 + above.index(axis))
    if x.ndim > 1:
        del sums[every]
    return unit, sums
