"""Arithmetic within groups: sums over axes, blocks and ties, and their way back to the arrays."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spherical_optax._core.safe_math import upcast
from spherical_optax._core.shapes import Params, PerGroup


@dataclasses.dataclass(frozen=True)
class ArrayGroups:
    """How one parameter array splits into groups.

    Attributes:
      shape: the shape of the array.
      axes: the index axes, counted from the front, in the order in which the user wrote them.
      counts: the number of groups along each index axis. Where the last count is smaller than the
        length of its axis, the axis is cut into that many contiguous blocks of equal length.
      tied_size: the coordinates that each group has in the arrays that are tied to this one.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    counts: tuple[int, ...]
    tied_size: int = 0

    @property
    def blocks(self) -> int | None:
        """The number of blocks of the last index axis; None if every entry of it is an index."""
        cut = bool(self.axes) and self.counts[-1] != self.shape[self.axes[-1]]
        return self.counts[-1] if cut else None

    @property
    def own_size(self) -> int:
        """The coordinates that each group has in this array."""
        return math.prod(self.shape) // max(math.prod(self.counts), 1)

    @property
    def size(self) -> int:
        """The coordinates of each group, d, those in tied arrays included."""
        return self.own_size + self.tied_size

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that are no index axes."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of x over each group, with the axes of x (the keepdims shape)."""
        x = jnp.sum(x, axis=self.summed, keepdims=True)
        if not self.axes or x.shape[self.axes[-1]] == self.counts[-1]:
            return x
        axis, blocks = self.axes[-1], self.counts[-1]
        cut = (*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])
        return jnp.sum(replicate(x).reshape(cut), axis=axis + 1)

    def spread(self, x: jax.Array) -> jax.Array:
        """Repeats the number of each block along its axis; x then broadcasts against the array."""
        if not self.axes or x.shape[self.axes[-1]] == self.shape[self.axes[-1]]:
            return x
        axis = self.axes[-1]
        return jnp.repeat(replicate(x), self.shape[axis] // x.shape[axis], axis=axis)

    def to_counts(self, x: jax.Array) -> jax.Array:
        """From the keepdims shape to the shape `counts`, which all arrays of a tie have in common."""
        order = sorted(self.axes)
        return jnp.transpose(jnp.squeeze(x, self.summed), [order.index(a) for a in self.axes])

    def from_counts(self, x: jax.Array) -> jax.Array:
        """From the shape `counts` to the keepdims shape."""
        return jnp.expand_dims(
            jnp.transpose(x, [self.axes.index(a) for a in sorted(self.axes)]), self.summed
        )


def replicate(x: jax.Array) -> jax.Array:
    """Copies x to all devices under an explicit mesh, where a sharded axis cannot be reshaped."""
    return jax.reshard(x, PartitionSpec()) if _has_explicit_mesh(x) else x


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives x, which `replicate` has copied to all devices, the sharding of `like`."""
    return jax.reshard(x, jax.typeof(like).sharding) if _has_explicit_mesh(like) else x


def _has_explicit_mesh(x: jax.Array) -> bool:
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and bool(mesh.explicit_axes)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Spheres matched with the leaves of a tree: all other modules compute with these.

    A "group-sized" tree holds one number per group. It has the structure of the parameters, its leaves
    have keepdims shapes, and it holds None in place of the leaves off the spheres.

    Attributes:
      treedef: the structure of the parameters.
      leaves: how each leaf splits into groups; None for a leaf off the spheres.
      ties: for each tie, the indices of the leaves that form their spheres together.
    """

    treedef: Any
    leaves: list[ArrayGroups | None]
    ties: list[list[int]]

    def with_tangent_space(self) -> "Groups":
        """The groups without those leaves whose groups have one coordinate and thus no tangent space.

        Optimizers treat such leaves element by element, like leaves off the spheres.
        """
        leaves = [None if leaf is None or leaf.size < 2 else leaf for leaf in self.leaves]
        return Groups(self.treedef, leaves, [t for t in self.ties if leaves[t[0]] is not None])

    def parts(self) -> list[tuple[list[int], "Groups"]]:
        """The indices of each tie, or of each single leaf on spheres, and a `Groups` of it alone.

        The tree of such a `Groups` is the list of these leaves.
        """
        tied = {i for tie in self.ties for i in tie}
        alone = [[i] for i, leaf in enumerate(self.leaves) if leaf is not None and i not in tied]
        return [
            (
                where,
                Groups(
                    jax.tree.structure([0] * len(where)),
                    [self.leaves[i] for i in where],
                    [list(range(len(where)))] if len(where) > 1 else [],
                ),
            )
            for where in sorted([*alone, *self.ties])
        ]

    def _zip_leaves(self, trees: Sequence[Any]):
        """(how the leaf splits, its entry in each of the trees), leaf by leaf."""
        return zip(self.leaves, *(self.treedef.flatten_up_to(tree) for tree in trees), strict=True)

    def _unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)

    def sum(self, f: Callable[..., jax.Array], *trees: Any) -> PerGroup:
        """Group-sized sum of f(*leaves) over each group, in at least float32."""
        sums: list[Any] = [
            None if leaf is None else leaf.sum(f(*map(upcast, arrays)))
            for leaf, *arrays in self._zip_leaves(trees)
        ]
        for tie in self.ties:
            tied = [(i, leaf) for i in tie if (leaf := self.leaves[i]) is not None]
            parts = [leaf.to_counts(sums[i]) for i, leaf in tied]
            widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
            total = functools.reduce(operator.add, (part.astype(widest) for part in parts))
            for (i, leaf), part in zip(tied, parts, strict=True):
                sums[i] = leaf.from_counts(total).astype(part.dtype)
        return self._unflatten(sums)

    def map(
        self,
        f: Callable[..., jax.Array],
        tree: Any,
        *rest: Any,
        off: Callable[..., Any] = lambda x, *_: x,
    ) -> Any:
        """`map_arrays`, whose results are brought to the dtypes of `tree`."""
        return self.map_arrays(
            lambda x, *others: f(upcast(x), *others).astype(x.dtype), tree, *rest, off=off
        )

    def map_arrays(
        self,
        f: Callable[..., jax.Array],
        tree: Any,
        *rest: Any,
        off: Callable[..., Any] = lambda x, *_: x,
    ) -> Any:
        """Applies f to the arrays on spheres, and `off` to the other arrays.

        `rest` are trees shaped like `tree`, or group-sized; f gets them in at least float32.
        """

        def apply(leaf: ArrayGroups | None, x: Any, *others: Any) -> Any:
            if x is None:
                return None
            if leaf is None:
                return off(x, *others)
            return f(x, *(leaf.spread(upcast(y)) for y in others))

        return self._unflatten([apply(*entries) for entries in self._zip_leaves((tree, *rest))])

    def map_per_group(
        self, f: Callable[..., Any], *trees: Any, off: Callable[..., Any] = lambda *_: None
    ) -> Any:
        """Applies f to the leaves of group-sized trees, and `off` to their entries off the spheres."""
        leaves = self._zip_leaves(trees)
        return self._unflatten([(off if leaf is None else f)(*xs) for leaf, *xs in leaves])

    def mean(self, sums: PerGroup) -> PerGroup:
        """Divides group-sized sums by the number of coordinates of each group."""
        leaves = self._zip_leaves((sums,))
        return self._unflatten(
            [None if leaf is None else s / max(leaf.size, 1) for leaf, s in leaves]
        )

    def choose(self, on: Any, off: Any) -> Any:
        """The tree with the leaves of `on` on the spheres and the leaves of `off` elsewhere."""
        leaves = self._zip_leaves((on, off))
        return self._unflatten([b if leaf is None else a for leaf, a, b in leaves])

    def as_state(self, scalars: PerGroup, before: Any = None) -> Any:
        """A group-sized tree as optimizer state, with a zero in place of every None.

        The zeros keep the structure of the parameters. Given the state `before`, they are its zeros.
        """
        if before is None:
            return self.map_per_group(
                lambda s: s, scalars, off=lambda _: jnp.zeros((), jnp.float32)
            )
        return self.map_per_group(lambda s, _: s, scalars, before, off=lambda _, b: b)

    def zeros_per_group(self, params: Params) -> Any:
        """A zero per group, as optimizer state.

        Zeros are summed rather than made: shape, dtype and sharding are then those of later sums.
        """
        zeros = jax.tree.map(jnp.zeros_like, params)
        return self.as_state(self.sum(lambda x: x, zeros))

    def off(self) -> Any:
        """True on the leaves off the spheres: a mask for `optax.masked`."""
        return self._unflatten([leaf is None for leaf in self.leaves])
