"""The ways in which arrays with one parent may split into groups together.

If the groups of a candidate are invariant, then so are the groups of every coarser candidate, because
these are unions of them. Candidates are therefore measured from the coarsest to the finest, and a clear
"no" of one with many groups rules out all finer ones unmeasured.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._discovery.evidence import Evidence, Figures
from spherical_optax._discovery.radial_sums import RadialSums
from spherical_optax._discovery.splits import coarsen, count_long_axes, enumerate_splits

Sums = Sequence[RadialSums] | Mapping[int, RadialSums]  # by the index of the array


class Candidate:
    """One array, or several that are tied, split into groups.

    Every array splits into the same number of groups, and the n-th groups of all arrays form one group.

    Attributes:
      splits: how each array splits, by the index of the array.
      key: the same as a hashable object.
      size: the number of coordinates of each group, d.
      groups: the number of groups.
      ruled_out: whether there has been a clear "no", of this candidate or of a coarser one.
      active: whether each group has had influence, in any probe; of the shape `counts`.
    """

    def __init__(self, splits: dict[int, ArrayGroups]):
        self.splits = splits
        self.key = frozenset(splits.items())
        self.size = sum(split.own_size for split in splits.values())
        self.groups = math.prod(next(iter(splits.values())).counts)
        self.ruled_out = False
        self.active = np.zeros(next(iter(splits.values())).counts, bool)
        self._figures = Figures(self.groups)

    @functools.cached_property
    def coarser(self) -> list[Any]:
        """The keys of the next coarser candidates."""
        columns = [coarsen(split) for split in self.splits.values()]
        return [frozenset(zip(self.splits, row, strict=True)) for row in zip(*columns, strict=True)]

    def measure(self, sums: Sums, large: bool = False) -> float:
        """Takes in the radial figures |<x, g>| / ||x g|| of one probe.

        Returns the largest cosine |<x, g>| / (||x|| ||g||) of the groups.
        """
        parts = (sums[i].sum_within(split) for i, split in self.splits.items())
        radial, squares, xx, gg = functools.reduce(operator.add, parts).reshape(4, -1)
        influence = np.sqrt(squares)
        # Groups with a negligible gradient (the embedding of a token that never came, a dead filter) are
        # left out: their figures are rounding noise.
        counts = influence > 1e-3 * np.sqrt(np.mean(squares))
        if not counts.any():
            return 0.0
        self.active |= counts.reshape(self.active.shape)
        figures = np.full(radial.shape, np.nan)
        figures[counts] = np.abs(radial[counts]) / influence[counts]
        self._figures.add(figures, large)
        self.ruled_out = self.ruled_out or self._figures.say_no()
        return float(np.max(np.abs(radial[counts]) / np.sqrt(xx[counts] * gg[counts])))

    @property
    def is_shown_along_every_axis(self) -> bool:
        """Whether no index axis has a single active group at most, for any indices along the others.

        Such an axis might as well be summed over. On images of 1 x 1 pixels, a kernel of 3 x 3 taps uses
        its middle tap alone: that is no evidence for a sphere per tap.
        """
        return all(
            count == 1 or self.active.sum(axis).max() > 1
            for axis, count in enumerate(self.active.shape)
        )

    @property
    def has_blocks(self) -> bool:
        """Whether an axis is cut into blocks."""
        return any(split.blocks is not None for split in self.splits.values())

    @property
    def promising(self) -> bool:
        """Whether there are figures, and none of them says a clear "no"."""
        return not self.ruled_out and self._figures.any_natural

    @property
    def evidence(self) -> Evidence:
        return self._figures.summarize()


def enumerate_candidates(
    arrays: dict[int, Any], vectors: bool, copies: frozenset[int] = frozenset(), near: bool = False
) -> list[Candidate]:
    """All candidates of the arrays with one parent, from the coarsest to the finest.

    Args:
      arrays: the arrays, by their index.
      vectors: whether there are candidates of vectors alone.
      copies: the arrays whose first axis counts copies of a module: a stack of vectors is no matrix.
      near: whether only arrays that follow one another are tied, as in a flat list.
    """
    splits = {i: list(enumerate_splits(jnp.shape(x))) for i, x in arrays.items()}
    matrices = {i for i, x in arrays.items() if count_long_axes(x) > (2 if i in copies else 1)}
    found = []
    for tied in _enumerate_ties(list(arrays), near):
        if vectors or not matrices.isdisjoint(tied):
            found += _combine_splits({i: splits[i] for i in tied})
    return sorted((c for c in found if c.size > 1), key=lambda c: -c.size)


def _enumerate_ties(arrays: list[int], near: bool) -> Iterator[tuple[int, ...]]:
    """Every choice of arrays that may be tied, the single arrays included.

    Five arrays may be a whole recurrent cell. Among the many arrays of a flat dict, only two (a kernel
    and a bias) are tied, because the number of combinations would explode.
    """
    if near:
        for k, first in enumerate(arrays):
            following = arrays[k + 1 : k + 3]
            for n in range(len(following) + 1):
                yield from ((first, *rest) for rest in itertools.combinations(following, n))
        return
    largest = 5 if len(arrays) <= 5 else 3 if len(arrays) <= 8 else 2
    for n in range(1, largest + 1):
        yield from itertools.combinations(arrays, n)


def _combine_splits(splits: dict[int, list[ArrayGroups]]) -> list[Candidate]:
    """Every choice of one split for each array, if all have the same counts."""
    by_counts: dict[tuple[int, ...], dict[int, list[ArrayGroups]]] = {}
    for i, options in splits.items():
        for split in options:
            columns = by_counts.setdefault(split.counts, {j: [] for j in splits})
            columns[i].append(split)
    return [
        Candidate(dict(zip(splits, row, strict=True)))
        for columns in by_counts.values()
        for row in itertools.product(*columns.values())
    ]
