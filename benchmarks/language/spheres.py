"""What is invariant in the decoder, measured, and what hyperball optimizers put on spheres."""

from typing import Any

import jax

import spherical_optax as so
from benchmarks.language.network import (
    HIDDEN,
    NORMALISED,
    Sizes,
    init_params,
    predict,
)

WIDTH_OF_A_HEAD, CONTEXT, BATCH = 8, 16, 8  # of the narrow copy
WHOLE_MATRIX = so.Sphere(())


def find_narrow_spheres(sizes: Sizes) -> Any:
    """The spheres of a narrow copy of the decoder, measured: queries and keys, one group per head.

    They declare the spheres of the decoder at every width, as they name axes and the number of heads.
    """
    narrow = sizes._replace(width=WIDTH_OF_A_HEAD * sizes.heads, context=CONTEXT, dtype="float32")
    params = init_params(jax.random.key(0), narrow)
    x = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT), 0, sizes.characters)
    found = so.find_spheres(lambda p: predict(p, x, narrow), params, key=jax.random.key(2))
    expected = so.spheres_where(
        params, rf"({'|'.join(NORMALISED)})/kernel", sphere=so.Sphere(blocks=sizes.heads)
    )
    assert found == expected, found
    return found


def declare_matrices(params: Any) -> Any:
    """Every matrix of every block as a whole on a sphere of its own: a constraint, as published."""
    return so.spheres_where(params, rf"({'|'.join(HIDDEN)})/kernel", sphere=WHOLE_MATRIX)
