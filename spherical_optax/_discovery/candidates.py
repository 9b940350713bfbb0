"""The ways in which the arrays of one module may split into groups, and the evidence for each.

If the groups of a candidate are invariant, so are those of every coarser one, whose groups are unions of
them. So candidates are measured from the coarsest to the finest, and those finer than a clear "no" not
at all.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from spherical_optax._discovery.radial_sums import Part, Sums
from spherical_optax._discovery.random_points import dimensions

# How much larger the larger radius is.
LARGER = 10.0
# From so many groups on, the figures of one probe are a sample; of fewer, every probe has to agree.
MANY = 16


class Evidence(NamedTuple):
    """Radial figures of a candidate: about |N(0, 1)| for groups that are not invariant, else 0."""

    natural: float  # at the natural radius, of a typical group
    large: float  # at LARGER times that, the root mean square over the groups
    typical: float  # and of a typical group
    worst: float  # and the largest
    clear: float  # a natural figure beyond this is a "no"

    @property
    def possible(self) -> bool:
        return self.natural < self.clear

    def holds(self, tol: float, rounding: float) -> bool:
        """Small at the larger radius, and natural and larger radius agree.

        What remains at the natural radius may be the eps of a normalisation layer, which falls with the
        square of the radius. If it is a branch that drowns its shortcut, or a nonlinearity that
        saturates, then it falls with the radius.
        """
        agree = self.typical < max(rounding, 2 * self.natural / LARGER**2)
        return self.possible and self.large < tol and self.worst < 10 * tol and agree

    def close(self, tol: float) -> bool:
        """Neither yes nor no; nor is what says nothing at the larger radius."""
        return self.possible and not self.large >= 10 * tol


@dataclasses.dataclass
class Candidate:
    """Arrays of one module, by their index, split into groups that are united one by one."""

    parts: dict[int, Part]
    alive: bool = True  # no clear "no" so far
    # The figures of every group, a row per probe.
    _natural: list[np.ndarray] = dataclasses.field(default_factory=list)
    _large: list[np.ndarray] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def key(self) -> Any:
        return frozenset(self.parts.items())

    @functools.cached_property
    def coarser(self) -> list[Any]:
        """The keys of the next coarser ones."""
        columns = [part.coarser() for part in self.parts.values()]
        return [frozenset(zip(self.parts, row, strict=True)) for row in zip(*columns, strict=True)]

    @functools.cached_property
    def size(self) -> int:
        """Coordinates per group, d."""
        return sum(part.size for part in self.parts.values())

    @functools.cached_property
    def groups(self) -> int:
        return math.prod(next(iter(self.parts.values())).counts)

    def measure(self, sums: dict[int, Sums], large: bool = False) -> float:
        """Takes in the figures |<x, g>| / ||x g|| of one probe, where g says something.

        Returns the largest cosine |<x, g>| / (||x|| ||g||) of these groups.
        """
        total = functools.reduce(operator.add, (sums[i].of(p) for i, p in self.parts.items()))
        radial, squares, xx, gg = total.reshape(4, -1)
        influence = np.sqrt(squares)
        # Next to the others, the row of a token that never came and a dead filter are rounding.
        there = influence > 1e-3 * np.sqrt(np.mean(squares))
        if not there.any():
            return 0.0
        figures = np.full(radial.shape, np.nan)
        figures[there] = np.abs(radial[there]) / influence[there]
        (self._large if large else self._natural).append(figures)
        self.alive = self.alive and not self._clearly_not()
        return float(np.max(np.abs(radial[there]) / np.sqrt(xx[there] * gg[there])))

    def _clearly_not(self) -> bool:
        natural = self._typical()
        if self.groups >= MANY:
            return any(f > 0.5 for f in natural) or sum(f > 0.3 for f in natural) > 1
        return any(f > 0.3 for f in natural)

    def _typical(self) -> list[float]:
        """The median over the groups, of each probe at the natural radius."""
        return [float(np.nanmedian(figures)) for figures in self._natural]

    @property
    def promising(self) -> bool:
        return self.alive and bool(self._natural)

    @property
    def evidence(self) -> Evidence:
        """Of many groups, an odd probe and the worst probe of each group do not count."""
        many = self.groups >= MANY
        clear = 0.3 if many else 0.1
        natural = (np.median if many else _rms)(self._typical()) if self._natural else math.nan
        if len(self._large) < 2:  # not finite, or without influence
            return Evidence(float(natural), math.nan, math.nan, math.nan, clear)
        large = _largest(np.stack(self._large), but=1 if many else 0)
        typical = float(np.median(large))
        return Evidence(float(natural), _rms(large), typical, float(large.max()), clear)


def _rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _largest(rows: np.ndarray, but: int) -> np.ndarray:
    """The largest of each column but for so many, if it has more; columns of NaN are left out."""
    there = np.isfinite(rows).sum(axis=0)
    index = np.clip(np.minimum(but, there - 1), 0, None)
    descending = -np.sort(-rows, axis=0)  # NaN last
    return np.take_along_axis(descending, index[None], axis=0)[0][there > 0]


def candidates(arrays: dict[int, Any], vectors: bool) -> list[Candidate]:
    """All candidates of one module's arrays, from the coarsest to the finest."""
    found = []
    options = {i: list(_parts(jnp.shape(x))) for i, x in arrays.items()}
    # Up to all of a recurrent cell; in a flat dict of many arrays no more than kernel and bias.
    most = 5 if len(arrays) <= 5 else 3 if len(arrays) <= 8 else 2
    for n in range(1, most + 1):
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


def _parts(shape: tuple[int, ...]) -> Iterator[Part]:
    """Every choice of index axes longer than 1, and of blocks of one of them."""
    long = [axis for axis, length in enumerate(shape) if length > 1]
    for n in range(len(long) + 1):
        for axes in itertools.combinations(long, n):
            yield Part(shape, axes)
            for axis in axes:
                others = tuple(a for a in axes if a != axis)
                for blocks in range(2, shape[axis] // 2 + 1):
                    if shape[axis] % blocks == 0:
                        yield Part(shape, (*others, axis), blocks)
