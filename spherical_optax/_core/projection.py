"""The tangential part of a vector at a point, and the way back to the sphere."""

import jax.numpy as jnp

from spherical_optax._core.compiler_hints import OTHER_ZERO
from spherical_optax._core.safe_math import divide_or_one, divide_or_zero, is_zero, sqrt
from spherical_optax._core.shapes import OfArray, OfGroups, SpreadGroups


def remove_radial(q: OfArray, x: OfArray, qx: SpreadGroups, xx: SpreadGroups) -> OfArray:
    """q_perp = q - <q, x> / <x, x> x on one array; q itself where x is zero."""
    return q - divide_or_zero(qx, xx, OTHER_ZERO) * x


def compute_retraction_factor(wanted: OfGroups, xx: OfGroups, yy: OfGroups) -> OfGroups:
    """R / ||y||, which takes y = x + q to the radius R; 1 where R, x or y is zero."""
    return jnp.where(is_zero(wanted) | is_zero(xx), 1.0, divide_or_one(wanted, sqrt(yy)))
