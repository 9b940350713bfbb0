"""The radial part of vectors, removed."""

from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.groups import Groups
from spherical_optax._core.safe_math import divide_or_zero


def remove_radial(point: Any, vectors: Any, qx: Any, xx: Any, groups: Groups) -> Any:
    """`project`, given the inner products <q, x> and <x, x>."""
    # -0.0 as in `_arithmetic.divide`.
    radial = groups.map_per_group(lambda qx, xx: divide_or_zero(qx, xx), qx, xx)
    return groups.map(lambda q, x, c: q - c * x, vectors, point, radial)


def zeros_per_group(params: Any, groups: Groups) -> Any:
    """A zero per group, as optimizer state."""
    # Summed rather than made: shape, dtype and sharding are then those of every later sum.
    zeros = jax.tree.map(jnp.zeros_like, params)
    return groups.as_state(groups.sum(lambda x, y: x * y, zeros, zeros))
