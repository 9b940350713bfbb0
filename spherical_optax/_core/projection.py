"""The tangential part of a vector at a point."""

from spherical_optax._core.compiler_hints import OTHER_ZERO
from spherical_optax._core.safe_math import divide_or_zero
from spherical_optax._core.shapes import OfArray, SpreadGroups


def remove_radial(q: OfArray, x: OfArray, qx: SpreadGroups, xx: SpreadGroups) -> OfArray:
    """q_perp = q - <q, x> / <x, x> x on one array; q itself where x is zero."""
    return q - divide_or_zero(qx, xx, OTHER_ZERO) * x
