"""Element-wise arithmetic on trees, in Optax's order of operations.

An update may be None: Equinox leaves parameters out of the gradient in this way. The update then stays
None, and the state of the parameter stays as it is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.arguments import require_params


def mix(updates: Any, moment: Any, decay: Any, gain: Any) -> Any:
    """Applies `mix_arrays` to every leaf."""
    return jax.tree.map(
        lambda g, m: mix_arrays(g, m, decay, gain), updates, moment, is_leaf=lambda x: x is None
    )


def mix_arrays(g: Any, m: Any, decay: Any, gain: Any) -> Any:
    """Computes gain * g + decay * m in Optax's order of operations; without an update, m stays."""
    if g is None:
        return m
    g, m = jnp.asarray(g), jnp.asarray(m)
    dtype = g.dtype if g.dtype.itemsize >= m.dtype.itemsize else m.dtype
    decayed = (as_dtype(decay, m.dtype) * m).astype(dtype)
    return (as_dtype(gain, g.dtype) * g).astype(dtype) + decayed


@functools.partial(jax.jit, inline=True)
def correct_bias(moment: Any, decay: Any, count: Any) -> Any:
    """Computes m / (1 - decay^count), like `optax.tree.bias_correction`, with strict dtype promotion."""
    dtype = jnp.result_type(float)
    correction = 1 - as_dtype(decay, dtype) ** count.astype(dtype)
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moment)


def square_modulus(x: Any) -> jax.Array:
    """Computes |x|^2, which is real for complex numbers too."""
    return jnp.real(x * jnp.conj(x))


def as_dtype(value: Any, dtype: Any) -> Any:
    """Casts a hyper-parameter for arrays of this dtype; Python numbers are weakly typed and stay."""
    return value if type(value) in (int, float) else jnp.asarray(value, dtype)


def add_decay(updates: Any, params: Any, l2: Any) -> Any:
    """Computes g + lambda x; returns g itself if lambda is None."""
    if l2 is None:
        return updates
    return jax.tree.map(
        lambda g, x: None if g is None else _add(g, as_dtype(l2, jnp.result_type(x)) * x),
        updates,
        require_params(params),
        is_leaf=lambda x: x is None,
    )


def _add(g: Any, y: Any) -> jax.Array:
    """g + y in the wider of the two dtypes."""
    g, y = jnp.asarray(g), jnp.asarray(y)
    dtype = g.dtype if g.dtype.itemsize >= y.dtype.itemsize else y.dtype
    return g.astype(dtype) + y.astype(dtype)


def drop_missing(updates: Any, values: Any) -> Any:
    """Returns `values` with None in place of the leaves that have no update."""
    return jax.tree.map(
        lambda g, v: None if g is None else v, updates, values, is_leaf=lambda x: x is None
    )


def cast_like(tree: Any, like: Any) -> Any:
    """Casts every leaf to the dtype of the leaf of `like`; returns `tree` itself if `like` is None."""
    if like is None:
        return tree
    return jax.tree.map(
        lambda x, y: None if x is None else jnp.asarray(x).astype(jnp.result_type(y)),
        tree,
        like,
        is_leaf=lambda x: x is None,
    )


def is_placeholder(params: Any) -> bool:
    """Whether this is what `optax.tree.map_params` hands to `init` in place of parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"
