"""Every division and root that is safe at zero, in value and in gradient.

One rule decides what counts as zero: |x| below the smallest normal number of its dtype, or of float32
for narrower dtypes, because the reciprocal of such a number may overflow. The test is "is it zero?" and
not "is it positive?": NaN is not zero, and is not replaced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def upcast(x: Any) -> jax.Array:
    """Casts x to at least float32, the precision of every reduction of the package."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def is_low_precision(x: Any) -> bool:
    """Whether x is a real number or array of less precision than float32."""
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def is_zero(x: Any) -> jax.Array:
    """Whether |x| is so small that 1 / x may overflow."""
    x = upcast(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x == 0
    return jnp.abs(x) < float(jnp.finfo(x.dtype).tiny)


def divide_or_zero(a: Any, b: Any, zero: float = 0.0) -> jax.Array:
    """Computes a / b, or 0 where b is zero: a group of radius zero has no direction.

    Where the result does not leave a step, `zero` may be `compiler_hints.OTHER_ZERO`.
    """
    return jnp.where(is_zero(b), zero, a / _replace_zero(b))


def divide_or_one(a: Any, b: Any) -> jax.Array:
    """Computes a / b, or 1 where b is zero: this factor leaves a group as it is."""
    return jnp.where(is_zero(b), 1.0, a / _replace_zero(b))


def divide_or_infinity(a: Any, b: Any) -> jax.Array:
    """Computes a / b, or infinity where b alone is zero, or 0 where both are.

    This is the tangent of an angle with the legs a and b: infinite at a right angle.
    """
    at_zero = jnp.where(is_zero(a), 0.0, jnp.inf)
    return jnp.where(is_zero(b), at_zero, a / _replace_zero(b))


@functools.partial(jax.jit, inline=True)
def divide_arrays(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes the step a / b of whole arrays, or 0 where b is zero. Infinity or NaN in a shows.

    The code replaces the denominator by infinity, and not the quotient by 0: XLA fuses a choice between
    quotients differently from program to program, and the results are then rounded differently (JAX
    0.10, CPU).
    """
    if not jnp.issubdtype(b.dtype, jnp.inexact):
        b = b.astype(jnp.result_type(float))
        a = a.astype(b.dtype)
    return a / jnp.where(is_zero(b), jnp.full_like(b, jnp.inf), b)


def sqrt(x: jax.Array, zero: float = 0.0) -> jax.Array:
    """Computes the square root of a sum of squares; at zero, it and its gradient are 0."""
    nothing = is_zero(x) | (x < zero)  # rounding may leave a negative sum
    return jnp.where(nothing, zero, jnp.sqrt(jnp.where(nothing, 1.0, x)))


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes (a^2 + b^2)^(1/2) without overflow; where both are zero, it and its gradient are 0."""
    zero = is_zero(a) & is_zero(b)
    return jnp.where(zero, 0.0, jnp.hypot(jnp.where(zero, 1.0, a), b))


def _replace_zero(x: Any) -> jax.Array:
    return jnp.where(is_zero(x), 1.0, x)
