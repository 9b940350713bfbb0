"""The ways in which one array may split into groups.

Discovery compares splits with one another. Each is therefore an `ArrayGroups` in normal form: it has no
index axis of length 1, no axis that is cut into a single block, and it is tied to no other array.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._core.sphere import Sphere


def make_split(
    shape: tuple[int, ...], axes: tuple[int, ...], blocks: int | None = None
) -> ArrayGroups:
    """The split by these index axes, of which the last may be cut into blocks."""
    counts = tuple(shape[axis] for axis in axes)
    return ArrayGroups(shape, axes, counts if blocks is None else (*counts[:-1], blocks))


def enumerate_splits(shape: tuple[int, ...]) -> Iterator[ArrayGroups]:
    """Every choice of index axes longer than 1, and of equal blocks of one of them.

    The index axes ascend, but an axis that is cut into blocks comes last.
    """
    long = [axis for axis, length in enumerate(shape) if length > 1]
    for n in range(len(long) + 1):
        for axes in itertools.combinations(long, n):
            yield make_split(shape, axes)
            for axis in axes:
                others = tuple(a for a in axes if a != axis)
                for blocks in range(2, shape[axis] // 2 + 1):
                    if shape[axis] % blocks == 0:
                        yield make_split(shape, (*others, axis), blocks)


def coarsen(split: ArrayGroups) -> list[ArrayGroups]:
    """The next coarser splits: one for each index axis, without that axis and its blocks."""
    return [
        ArrayGroups(
            split.shape,
            axes=split.axes[:k] + split.axes[k + 1 :],
            counts=split.counts[:k] + split.counts[k + 1 :],
        )
        for k in range(len(split.axes))
    ]


def normalize(split: ArrayGroups) -> ArrayGroups:
    """The same groups in normal form: an axis along which there is one group tells no groups apart."""
    kept = [k for k, count in enumerate(split.counts) if count > 1]
    return ArrayGroups(
        split.shape,
        axes=tuple(split.axes[k] for k in kept),
        counts=tuple(split.counts[k] for k in kept),
    )


def make_sphere(split: ArrayGroups, tie: str | None) -> Sphere:
    """The `Sphere` of a split, with its axes counted from the back."""
    ndim = len(split.shape)
    return Sphere(tuple(axis - ndim for axis in split.axes), split.blocks, tie)


def count_long_axes(x: Any) -> int:
    """The number of axes longer than 1: a scale of shape (1, 1, 1, c) is a vector."""
    return sum(length > 1 for length in jnp.shape(x))
