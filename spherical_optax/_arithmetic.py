"""Element-wise arithmetic on trees, in Optax's order of operations.

A None among the updates is what Equinox leaves out of the gradient: it stays None, and the state of
its parameter stays as it is.
"""

import functools
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import optax


def mix(updates: Any, moment: Any, decay: Any, gain: Any) -> Any:
    """gain * updates + decay * moment in Optax's order of operations; no update, no change."""

    def mix(g, m):
        if g is None:
            return m
        g, m = jnp.asarray(g), jnp.asarray(m)
        dtype = g.dtype if g.dtype.itemsize >= m.dtype.itemsize else m.dtype
        kept = (scalar(decay, m.dtype) * m).astype(dtype)
        return (scalar(gain, g.dtype) * g).astype(dtype) + kept

    return jax.tree.map(mix, updates, moment, is_leaf=lambda x: x is None)


@functools.partial(jax.jit, inline=True)
def debias(moment: Any, decay: Any, count: Any) -> Any:
    """m / (1 - decay^count), as `optax.tree.bias_correction` but for strict dtype promotion."""
    dtype = jnp.result_type(float)
    correction = 1 - scalar(decay, dtype) ** count.astype(dtype)
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moment)


def abs_squared(x: Any) -> jax.Array:
    """|x|^2, which is real for complex numbers too."""
    return jnp.real(x * jnp.conj(x))


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


def scalar(value: Any, dtype: Any) -> Any:
    """A hyper-parameter for arrays of this dtype: Python numbers are weakly typed already."""
    return value if type(value) in (int, float) else jnp.asarray(value, dtype)


def is_transformation(
    caller: str,
    tx: Any,
    wrong: str = "is no optax.GradientTransformation, such as optax.scale_by_adam() or so.ema(0.9)",
) -> Any:
    """The transformation, and one error for what is none."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"{caller}: {reprlib.repr(tx)} {wrong}")
    return tx


def not_schedule(
    caller: str, value: Any, instead: str = "give its value at the step, schedule(count)"
) -> Any:
    """The value; a schedule has none of its own."""
    if callable(value):
        raise ValueError(f"{caller}: {value!r} is a schedule; {instead}")
    return value


def decay_rate(caller: str, value: Any) -> Any:
    """The rate of decay; no transformation of Optax takes a schedule for it either."""
    return not_schedule(
        caller,
        value,
        "for one of a rate of decay, "
        "optax.inject_hyperparams(so.adamp, static_args='spheres')(1e-3, spheres, b1=schedule)",
    )


def is_zero(value: Any) -> bool:
    """A zero that is known already, so that what it is a factor of can be left out."""
    return type(value) in (int, float) and value == 0


def l2_now(weight_decay: optax.ScalarOrSchedule, count: Any) -> Any:
    """The L2 coefficient of this step; None for a constant zero, which needs no parameters."""
    if is_zero(weight_decay):
        return None
    return weight_decay(count) if callable(weight_decay) else weight_decay


def decayed(updates: Any, params: Any, l2: Any) -> Any:
    if l2 is None:
        return updates
    return jax.tree.map(
        lambda g, x: None if g is None else g + scalar(l2, jnp.result_type(x)) * x,
        updates,
        given(params),
        is_leaf=lambda x: x is None,
    )


def output(updates: Any, values: Any) -> Any:
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


def given(params: Any) -> Any:
    if params is None:
        raise ValueError(
            "this transformation moves with the parameters: call update(updates, state, params)"
        )
    return params
