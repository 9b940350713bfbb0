"""Every division and root that is safe at zero, in value and in gradient.

One rule for zero: a number whose reciprocal may overflow, |x| below the smallest normal number of its
dtype or of float32, is zero. NaN is not zero, and shows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def upcast(x: Any) -> jax.Array:
    """x in at least float32, the precision of every reduction of the package."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def is_zero(x: Any) -> jax.Array:
    """Whether |x| is so small that 1 / x may overflow."""
    x = upcast(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x == 0
    return jnp.abs(x) < float(jnp.finfo(x.dtype).tiny)


def divide_or_zero(a: Any, b: Any) -> jax.Array:
    """a / b, and 0 where b is zero: a group of radius zero has no direction."""
    return jnp.where(is_zero(b), 0.0, a / _nonzero(b))


def divide_or_one(a: Any, b: Any) -> jax.Array:
    """a / b, and 1 where b is zero: the factor that leaves a group as it is."""
    return jnp.where(is_zero(b), 1.0, a / _nonzero(b))


def divide_or_infinity(a: Any, b: Any) -> jax.Array:
    """a / b, infinity where b alone is zero, and 0 where both are: the tangent of a right angle."""
    at_zero = jnp.where(is_zero(a), 0.0, jnp.inf)
    return jnp.where(is_zero(b), at_zero, a / _nonzero(b))


@functools.partial(jax.jit, inline=True)
def divide_arrays(a: jax.Array, b: jax.Array) -> jax.Array:
    """The step a / b of whole arrays, and 0 where b is zero; a numerator that is not finite shows.

    The denominator is replaced, and not the quotient, because XLA fuses a choice between quotients
    differently from program to program, and they round differently (JAX 0.10, CPU).
    """
    if not jnp.issubdtype(b.dtype, jnp.inexact):
        b = b.astype(jnp.result_type(float))
        a = a.astype(b.dtype)
    return a / jnp.where(is_zero(b), jnp.full_like(b, jnp.inf), b)


def sqrt(x: jax.Array) -> jax.Array:
    """The square root of a sum of squares; 0 at zero, as is its gradient."""
    zero = is_zero(x) | (x < 0)  # rounding may leave a negative sum
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """(a^2 + b^2)^(1/2) without overflow; 0 where both are zero, as is its gradient."""
    zero = is_zero(a) & is_zero(b)
    return jnp.where(zero, 0.0, jnp.hypot(jnp.where(zero, 1.0, a), b))


def _nonzero(x: Any) -> jax.Array:
    return jnp.where(is_zero(x), 1.0, x)
