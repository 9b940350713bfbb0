"""Every division and root that is safe at zero."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def ratio(a: Any, b: Any, otherwise: float = 1.0) -> jax.Array:
    """a / b, and `otherwise` where b is not positive: what a group of radius zero gets.

    Here and below it is zero that is asked for, so that NaN stays NaN.
    """
    return jnp.where(vanishes(b), otherwise, a / or_one(b))


def vanishes(x: jax.Array) -> jax.Array:
    """Not positive, or so small that dividing by it overflows; NaN is not."""
    return x < (jnp.finfo(x.dtype).tiny if jnp.issubdtype(x.dtype, jnp.floating) else 1)


def or_one(x: jax.Array) -> jax.Array:
    """x, and 1 where that is zero: what can be divided by."""
    return jnp.where(vanishes(x), 1.0, x)


def sqrt(x: jax.Array) -> jax.Array:
    """Zero at zero in value and gradient, as all lengths here."""
    return jnp.where(vanishes(x), 0.0, jnp.sqrt(or_one(x)))


@functools.partial(jax.jit, inline=True)
def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0; but what is not finite shows."""
    # -0.0 is equal to 0.0, but another constant: XLA on a CPU orders the sums over groups, which start
    # from 0.0, by who else has that constant, and sums of one array should follow one another. And b is
    # replaced rather than the quotient: a choice within it would round differently from place to place.
    if not jnp.issubdtype(b.dtype, jnp.inexact):
        b = b.astype(jnp.result_type(float))
        a = a.astype(b.dtype)
    nothing = b == jnp.full_like(b, -0.0)
    return a / jnp.where(nothing, jnp.full_like(b, jnp.inf), b)
