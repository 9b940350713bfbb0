"""What a user writes: which coordinates of an array form one sphere."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sphere:
    """How one parameter array splits into radially invariant groups, one sphere each.

    A group x in R^d is a set of coordinates with L(rho x) = L(x) for every rho > 0 (section 2.1).

    Attributes:
      index_axes: the axes that tell the groups apart; everything else is summed over. `(-1,)`: one
        group per output channel (BatchNorm). `()`: the whole array (LayerNorm). `(0, -1)`: a stack
        of scanned layers. `(1,)`: per head of an `(in, heads, head_dim)` kernel.
      blocks: cuts the last of `index_axes` into so many equal contiguous blocks, one sphere each
        (the groups of GroupNorm).
      tie: leaves with the same string form their spheres together (a kernel and its bias under
        LayerNorm or GroupNorm), so every layer needs a string of its own.

    Raises:
      ValueError: if `index_axes` are not distinct integers, or `blocks` is not a positive integer
        that has an axis to cut.

    >>> Sphere()  # one sphere per output channel
    Sphere(index_axes=(-1,), blocks=None, tie=None)
    >>> Sphere((), tie="Dense_0")  # a whole layer, together with its bias
    Sphere(index_axes=(), blocks=None, tie='Dense_0')

    Source: "A spherical analysis of Adam with Batch Normalization", section 2.1, appendices A, B.
    """

    index_axes: tuple[int, ...] = (-1,)
    blocks: int | None = None
    tie: str | None = None

    def __post_init__(self):
        axes = self.index_axes
        axes = tuple(axes) if isinstance(axes, Sequence) and not isinstance(axes, str) else (axes,)
        object.__setattr__(self, "index_axes", axes)
        if not all(type(a) is int for a in axes) or len(set(axes)) < len(axes):
            raise ValueError(f"{self}: index_axes must be distinct integers")
        if self.blocks is not None and not (type(self.blocks) is int and self.blocks > 0):
            raise ValueError(f"{self}: blocks must be a positive integer or None")
        if self.blocks is not None and not axes:
            raise ValueError(f"{self}: blocks cut the last index axis, and there is none")
        if not (self.tie is None or isinstance(self.tie, str)):
            raise ValueError(f"{self}: tie must be a string or None")


# A tree of `Sphere | None` shaped like the parameters, a prefix of one, or params -> such a tree.
Spheres = Any
