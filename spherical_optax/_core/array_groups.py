"""How one array splits into groups: sums over axes and blocks, and their way back to the array."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spherical_optax._core.compiler_hints import sum_axes
from spherical_optax._core.shapes import Shape


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

    @property
    def group_shape(self) -> Shape:
        """The shape of one number per group: the counts, and 1 on the summed axes (keepdims)."""
        counts = dict(zip(self.axes, self.counts, strict=True))
        return tuple(counts.get(axis, 1) for axis in range(len(self.shape)))

    @property
    def uncut(self) -> tuple[int, ...]:
        """The axes that one number per group has in common with the array: no blocks, no sums."""
        return tuple(axis for axis in self.axes if self.group_shape[axis] == self.shape[axis])

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of x over each group, with the axes of x (the keepdims shape)."""
        if _has_explicit_mesh(x):  # where a sharded axis cannot be cut
            x = jnp.sum(x, axis=self.summed, keepdims=True)
        else:
            x = sum_axes(x, self.summed)
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
