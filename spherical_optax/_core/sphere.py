"""`Sphere`, with which a user says which coordinates of an array form one sphere."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sphere:
    """How one parameter array splits into radially invariant groups, one sphere each.

    Use this when you know which layer normalises the output of a parameter array; `find_spheres` finds
    the spheres of a whole model by measurement.

    A group is a set of d coordinates x with L(rho x) = L(x) for every rho > 0 (section 2.1). An array
    has one group for each combination of indices along `index_axes`, and the group consists of all
    entries with these indices:

      - `(-1,)`: one group per output channel, for BatchNorm. A kernel of shape (3, 3, 16, 32) has 32
        groups, each of d = 144 coordinates.
      - `()`: the whole array is one group, for LayerNorm.
      - `(0, -1)`: one group per layer and output channel, for a stack of scanned layers.
      - `(1,)`: one group per head, for a kernel of shape (in, heads, head_dim).

    Attributes:
      index_axes: the axes that tell the groups apart, counted from the front or the back.
      blocks: the last of `index_axes` is cut into this many contiguous blocks of equal length, and
        every block is one group (the groups of GroupNorm).
      tie: leaves with the same string form their spheres together, as a kernel and its bias do under
        LayerNorm or GroupNorm. Every layer needs a string of its own.

    Raises:
      ValueError: if `index_axes` are not distinct integers, if `blocks` is not a positive integer or
        there is no axis to cut, or if `tie` is not a string.

    >>> so.Sphere()  # one sphere per output channel
    Sphere(index_axes=(-1,), blocks=None, tie=None)
    >>> so.Sphere((), tie="Dense_0")  # a whole layer, together with its bias
    Sphere(index_axes=(), blocks=None, tie='Dense_0')

    Source: "A spherical analysis of Adam with Batch Normalization", section 2.1, appendices A, B.
    """

    index_axes: tuple[int, ...] = (-1,)
    blocks: int | None = None
    tie: str | None = None

    def __post_init__(self):
        axes = self.index_axes
        axes = tuple(axes) if isinstance(axes, Sequence) and not isinstance(axes, str) else (axes,)
        object.__setattr__(self, "index_axes", tuple(map(_to_int, axes)))
        object.__setattr__(self, "blocks", _to_int(self.blocks))
        axes = self.index_axes
        if not all(type(a) is int for a in axes) or len(set(axes)) < len(axes):
            raise ValueError(f"{self}: index_axes must be distinct integers")
        if self.blocks is not None and not (type(self.blocks) is int and self.blocks > 0):
            raise ValueError(f"{self}: blocks must be a positive integer or None")
        if self.blocks is not None and not axes:
            raise ValueError(f"{self}: blocks cut the last index axis, and there is none")
        if not (self.tie is None or isinstance(self.tie, str)):
            raise ValueError(f"{self}: tie must be a string or None")


def _to_int(x: Any) -> Any:
    """A NumPy integer as a Python integer; anything else as it is."""
    return int(x) if isinstance(x, np.integer) else x


# The type of every `spheres` argument: a tree of `Sphere | None` shaped like the parameters, a prefix of
# such a tree, or a function from the parameters to such a tree.
Spheres = Any
