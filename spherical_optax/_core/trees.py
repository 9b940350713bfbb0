"""Element-wise arithmetic on trees, in Optax's order of operations.

A None among the updates is what Equinox leaves out of the gradient: it stays None, and the state of
its parameter stays as it is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.arguments import require_params


def mix(updates: Any, moment: Any, decay: Any, gain: Any) -> Any:
    """`mix_arrays` on trees."""
    return jax.tree.map(
        lambda g, m: mix_arrays(g, m, decay, gain), updates, moment, is_leaf=lambda x: x is None
    )


def mix_arrays(g: Any, m: Any, decay: Any, gain: Any) -> Any:
    """gain * g + decay * m in Optax's order of operations; where there is no update, m stays."""
    if g is None:
        return m
    g, m = jnp.asarray(g), jnp.asarray(m)
    dtype = g.dtype if g.dtype.itemsize >= m.dtype.itemsize else m.dtype
    decayed = (as_dtype(decay, m.dtype) * m).astype(dtype)
    return (as_dtype(gain, g.dtype) * g).astype(dtype) + decayed


@functools.partial(jax.jit, inline=True)
def correct_bias(moment: Any, decay: Any, count: Any) -> Any:
    """m / (1 - decay^count), as `optax.tree.bias_correction` but for strict dtype promotion."""
    dtype = jnp.result_type(float)
    correction = 1 - as_dtype(decay, dtype) ** count.astype(dtype)
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moment)


def abs_squared(x: Any) -> jax.Array:
    """|x|^2, which is real for complex numbers too."""
    return jnp.real(x * jnp.conj(x))


def as_dtype(value: Any, dtype: Any) -> Any:
    """A hyper-parameter for arrays of this dtype: Python numbers are weakly typed already."""
    return value if type(value) in (int, float) else jnp.asarray(value, dtype)


def add_decay(updates: Any, params: Any, l2: Any) -> Any:
    """g + lambda x; g itself where lambda is None."""
    if l2 is None:
        return updates
    return jax.tree.map(
        lambda g, x: None if g is None else g + as_dtype(l2, jnp.result_type(x)) * x,
        updates,
        require_params(params),
        is_leaf=lambda x: x is None,
    )


def drop_missing(updates: Any, values: Any) -> Any:
    """`values`, where there are updates: Equinox leaves out what it does not differentiate."""
    return jax.tree.map(
        lambda g, v: None if g is None else v, updates, values, is_leaf=lambda x: x is None
    )


def cast_like(tree: Any, like: Any) -> Any:
    if like is None:
        return tree
    return jax.tree.map(
        lambda x, y: None if x is None else jnp.asarray(x).astype(jnp.result_type(y)),
        tree,
        like,
        is_leaf=lambda x: x is None,
    )
