"""Arithmetic within groups: sums over axes, blocks and ties, and their way back to the arrays."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spherical_optax._core.safe_math import upcast


@dataclasses.dataclass(frozen=True)
class ArrayGroups:
    """How one parameter array splits into groups."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]  # the index axes, counted from the front
    counts: tuple[int, ...]  # groups along each; fewer than entries on the last: contiguous blocks
    size: int  # coordinates of a group, d

    @property
    def summed(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    def sum(self, x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=self.summed, keepdims=True)
        if not self.axes or x.shape[self.axes[-1]] == self.counts[-1]:
            return x
        axis, blocks = self.axes[-1], self.counts[-1]
        split = (*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])
        return jnp.sum(replicate(x).reshape(split), axis=axis + 1)

    def spread(self, x: jax.Array) -> jax.Array:
        """Makes what has one entry per group broadcast against the array."""
        if not self.axes or x.shape[self.axes[-1]] == self.shape[self.axes[-1]]:
            return x
        axis = self.axes[-1]
        return jnp.repeat(replicate(x), self.shape[axis] // x.shape[axis], axis=axis)

    def to_counts(self, x: jax.Array) -> jax.Array:
        """From the keepdims shape to `counts`, which tied leaves have in common."""
        order = sorted(self.axes)
        return jnp.transpose(jnp.squeeze(x, self.summed), [order.index(a) for a in self.axes])

    def from_counts(self, x: jax.Array) -> jax.Array:
        return jnp.expand_dims(
            jnp.transpose(x, [self.axes.index(a) for a in sorted(self.axes)]), self.summed
        )


def replicate(x: jax.Array) -> jax.Array:
    """Where shardings are explicit, what is cut or reshaped has to be whole on every device."""
    return jax.reshard(x, PartitionSpec()) if _explicit(x) else x


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The way back from `replicated`."""
    return jax.reshard(x, jax.typeof(like).sharding) if _explicit(like) else x


def _explicit(x: jax.Array) -> bool:
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and bool(mesh.explicit_axes)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Spheres matched with the leaves of a tree: what all other modules compute with.

    Trees of one number per group ("group-sized") have the parameters' structure, keepdims shapes, and
    None on the leaves off the spheres.
    """

    treedef: Any
    leaves: list[ArrayGroups | None]
    ties: list[list[int]]  # the indices of the leaves that form their spheres together

    def with_tangent_space(self) -> "Groups":
        """Without the groups of one coordinate: they have no tangent space, so they go element-wise."""
        leaves = [None if leaf is None or leaf.size < 2 else leaf for leaf in self.leaves]
        return Groups(self.treedef, leaves, [t for t in self.ties if leaves[t[0]] is not None])

    def parts(self) -> list[tuple[list[int], "Groups"]]:
        """For each leaf on spheres, or tie, its indices and a `Groups` of its own, on a list."""
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

    def _columns(self, trees: Sequence[Any]):
        return zip(self.leaves, *(self.treedef.flatten_up_to(tree) for tree in trees), strict=True)

    def _unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)

    def sum(self, f: Callable[..., jax.Array], *trees: Any) -> Any:
        """Group-sized sum of f(*leaves) over each group, in at least float32."""
        sums: list[Any] = [
            None if leaf is None else leaf.sum(f(*map(upcast, arrays)))
            for leaf, *arrays in self._columns(trees)
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
        """`map_arrays`, but the arrays come back in the dtype of `tree`."""
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
        """f over the arrays on spheres, in at least float32, and `off` over the others.

        `rest` are trees shaped like `tree`, or group-sized.
        """

        def one(leaf: ArrayGroups | None, x: Any, *others: Any) -> Any:
            if x is None:
                return None
            if leaf is None:
                return off(x, *others)
            return f(x, *(leaf.spread(upcast(y)) for y in others))

        return self._unflatten([one(*column) for column in self._columns((tree, *rest))])

    def map_per_group(
        self, f: Callable[..., Any], *trees: Any, off: Callable[..., Any] = lambda *_: None
    ) -> Any:
        """f of group-sized trees, `off` of what they hold off the spheres."""
        columns = self._columns(trees)
        return self._unflatten([(off if leaf is None else f)(*xs) for leaf, *xs in columns])

    def mean(self, sums: Any) -> Any:
        """Group-sized sums over the number of coordinates of each group."""
        columns = self._columns((sums,))
        return self._unflatten(
            [None if leaf is None else s / max(leaf.size, 1) for leaf, s in columns]
        )

    def choose(self, on: Any, off: Any) -> Any:
        """The leaves of `on` on the spheres, those of `off` elsewhere."""
        columns = self._columns((on, off))
        return self._unflatten([b if leaf is None else a for leaf, a, b in columns])

    def as_state(self, scalars: Any, before: Any = None) -> Any:
        """A group-sized tree as optimizer state: a zero off the spheres keeps the tree's structure.

        The zeros of the state `before` stay: hundreds of new ones would take time.
        """
        if before is None:
            return self.map_per_group(
                lambda s: s, scalars, off=lambda _: jnp.zeros((), jnp.float32)
            )
        return self.map_per_group(lambda s, _: s, scalars, before, off=lambda _, b: b)

    def zeros_per_group(self, params: Any) -> Any:
        """A zero per group, as optimizer state.

        Zeros are summed rather than made: shape, dtype and sharding are then those of later sums.
        """
        zeros = jax.tree.map(jnp.zeros_like, params)
        return self.as_state(self.sum(lambda x: x, zeros))

    def off(self) -> Any:
        """True on the leaves off the spheres: a mask for `optax.masked`."""
        return self._unflatten([leaf is None for leaf in self.leaves])
