r"""The second moment, and the division by it: the `b` of x <- x - eta a / b [3], and the scheme."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._arithmetic import (
    cast_like,
    debias,
    decayed,
    divide,
    given,
    l2_now,
    mix,
    output,
    scalar,
)
from spherical_optax._spheres import Spheres, match


class RmsState(NamedTuple):
    """State of `rms`."""

    count: jax.typing.ArrayLike  # steps taken, int32
    nu: optax.Updates  # one number per group on the spheres
    kept: Any  # None, or the radius per group at the last step


class QuotientState(NamedTuple):
    """State of `quotient`."""

    a: optax.OptState
    b: optax.OptState


def rms(
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike = 1e-8,
    spheres: Spheres = None,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    rescale: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Root of the average square, one number per group on the spheres: the denominator of Adam.

    v_k = decay (r_{k-1} / r_k)^2 v_{k-1} + (1 - decay) d^{-1} ||g_k + lambda x_k||^2 per group of d
    coordinates, and sqrt(v_k / (1 - decay^{k+1})) + eps comes out, in the shape of the updates [20].
    Off the spheres v is element-wise [8]. The ratio of radii is there with `rescale`.

    Args:
      decay: rate of decay (b2).
      eps: added outside the root.
      spheres: how the leaves split into groups; None is element-wise everywhere.
      reduce: "mean" as in [20], or "sum", without d^{-1}, as in AdamG.
      rescale: multiply v by the squared ratio of the radii; needs `params`.
      weight_decay: lambda of the L2 term, as in `ema`.

    Returns:
      A `GradientTransformationExtraArgs`. State: on the spheres v, and the radius with `rescale`, each
      one number per group in at least float32; elsewhere v like the parameters.

    Raises:
      ValueError: if `reduce` is unknown, in `init` and `update` if `spheres` does not fit, in `update`
        if `params` is missing and `rescale` or `weight_decay` needs it.

    >>> tx = so.rms(0.99, spheres=so.Sphere())
    >>> g = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx.update(g, tx.init(g))[0]  # sqrt((9 + 16) / 2)
    {'kernel': Array([[3.536],
           [3.536]], dtype=float32)}

    Source: [8], [9] and [20].
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"rms: reduce is {reduce!r}, not 'mean' or 'sum'")

    def squares(g, params, groups, l2=None):
        sums = geometry.dot(g, g, groups)
        if l2 is not None:
            params = given(params)
            # From inner products, as in `ema`: what is summed over on a CPU has to be in memory.
            sums = groups.scalars(
                lambda gg, gx, xx: _norm_squared(gg, gx, xx, scalar(l2, gg.dtype)),
                sums,
                geometry.dot(g, params, groups),
                geometry.dot(params, params, groups),
            )
        sums = groups.mean(sums) if reduce == "mean" else sums
        return groups.choose(sums, jax.tree.map(jnp.square, decayed(g, params, l2)))

    def init(params):
        groups = match(spheres, params).curved()
        nu = squares(optax.tree.zeros_like(params), None, groups)
        radius = geometry.zero_norm(params, groups) if rescale else None
        return RmsState(jnp.zeros([], jnp.int32), nu, radius)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match(spheres, updates).curved()
        nu, radius = state.nu, None
        if rescale:
            radius = groups.stored(geometry.norm(given(params), groups))
            # Twice, not squared: the square of a large ratio overflows where the product does not.
            change = geometry.change(state.kept, radius, groups)
            nu = groups.scalars(lambda v, c: c * (c * v), nu, change, off=lambda v, _: v)
        l2 = l2_now(weight_decay, state.count)
        nu = mix(squares(updates, params, groups, l2), nu, decay, 1 - decay)
        count = optax.safe_increment(state.count)
        out = debias(output(updates, nu), decay, count)
        out = groups.scalars(geometry.sqrt, out, off=lambda v: None if v is None else jnp.sqrt(v))
        out = jax.tree.map(lambda b: b + scalar(eps, b.dtype), out)
        # Zeros rather than `broadcast_to`, for the sharding of the updates.
        out = groups.map(lambda g, b: jnp.zeros_like(g) + b, updates, out, off=lambda _, b: b)
        return cast_like(out, params), RmsState(count, cast_like(nu, state.nu), radius)

    return optax.GradientTransformationExtraArgs(init, update)


def quotient(
    a: optax.GradientTransformation, b: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds both with the same updates and divides what comes out: a / b element-wise [3].

    Where b is 0 the quotient is 0: a parameter that never had a gradient stays, whatever the eps.

    Args:
      a: the numerator, e.g. `so.ema(0.9)`.
      b: the denominator, e.g. `so.rms(0.999)`.

    Returns:
      A `GradientTransformationExtraArgs` with the states of both.

    Raises:
      ValueError: what `a` and `b` raise.

    >>> tx = so.quotient(so.ema(0.9), so.rms(0.999))  # optax.scale_by_adam()
    >>> g = {"kernel": jnp.array([-2.0, 0.0, 5.0])}
    >>> tx.update(g, tx.init(g), g)[0]
    {'kernel': Array([-1.,  0.,  1.], dtype=float32)}

    Source: the generic scheme, [3] and [4].
    """
    a, b = optax.with_extra_args_support(a), optax.with_extra_args_support(b)

    def init(params):
        return QuotientState(a.init(params), b.init(params))

    def update(updates, state, params=None, **extra_args):
        top, a_state = a.update(updates, state.a, params, **extra_args)
        bottom, b_state = b.update(updates, state.b, params, **extra_args)
        updates = jax.tree.map(divide, top, bottom)
        return updates, QuotientState(a_state, b_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _norm_squared(gg: Any, gx: Any, xx: Any, l2: Any) -> jax.Array:
    """||g + l2 x||^2"""
    return jnp.maximum(gg + l2 * (2 * gx + l2 * xx), 0.0)
