r"""The second moment, and the division by it: the `b` of x <- x - eta a / b [3], and the scheme."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import require_constant_decay, require_params, weight_decay_at
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import is_zero
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import (
    abs_squared,
    add_decay,
    as_dtype,
    cast_like,
    debias,
    drop_missing,
    mix,
)
from spherical_optax._transforms.inner_products import Products, known, sharing


class RmsState(NamedTuple):
    """State of `rms`."""

    MOMENTS = Moments(square="nu")

    count: jax.typing.ArrayLike  # steps taken, int32
    nu: optax.Updates  # on the spheres one number per group: v, or r^2 v with `rescale`


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
    Off the spheres v is element-wise [8], and its root has no derivative at zero, as in Optax. The ratio
    of radii is there with `rescale`: then r^2 v is kept, by Lemma 1 the average square of gradients on
    the unit sphere, which needs no ratio.

    Args:
      decay: rate of decay (b2).
      eps: added outside the root.
      spheres: how the leaves split into groups; None is element-wise everywhere.
      reduce: "mean" as in [20], or "sum", without d^{-1}, as in AdamG.
      rescale: multiply v by the squared ratio of the radii; needs `params`. From a group that is zero
        the ratio is 1; if a group becomes zero, its average starts afresh. The squares of r g and of
        lambda r^2 have to fit in float32: lengths from about 1e-18 to 1e18.
      weight_decay: lambda of the L2 term, as in `ema`.

    Returns:
      A `GradientTransformationExtraArgs`. State: on the spheres one number per group, in at least
      float32, v or with `rescale` r^2 v; elsewhere v like the parameters.

    Raises:
      ValueError: if `reduce` is unknown or `decay` a schedule, in `init` and `update` if `spheres`
        does not fit, in `update` if `params` is missing and `rescale` or `weight_decay` needs it.

    >>> tx = so.rms(0.99, spheres=so.Sphere())
    >>> g = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx.update(g, tx.init(g))[0]  # sqrt((9 + 16) / 2)
    {'kernel': Array([[3.536],
           [3.536]], dtype=float32)}

    Source: [8], [9] and [20].
    """
    decay = require_constant_decay("rms", decay)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"rms: reduce is {reduce!r}, not 'mean' or 'sum'")

    def squares(g, params, groups, products, l2=None):
        sums = products.dot(g, g, groups)
        if l2 is not None:
            params = require_params(params)
            # From inner products, as in `ema`: what is summed over on a CPU has to be in memory.
            sums = groups.map_per_group(
                lambda gg, gx, xx: _norm_squared(gg, gx, xx, as_dtype(l2, gg.dtype)),
                sums,
                products.dot(g, params, groups),
                products.dot(params, params, groups),
            )
        sums = groups.mean(sums) if reduce == "mean" else sums
        return groups.choose(sums, jax.tree.map(abs_squared, add_decay(g, params, l2)))

    def init(params):
        groups = match(spheres, params).with_tangent_space()
        zeros = optax.tree.zeros_like(params)
        return RmsState(jnp.zeros([], jnp.int32), squares(zeros, None, groups, Products()))

    def update(updates, state, params=None, *, inner_products=None, **extra_args):
        del extra_args
        products = known(inner_products)
        groups = match(spheres, updates).with_tangent_space()
        l2, count = weight_decay_at(weight_decay, state.count), optax.safe_increment(state.count)
        nu, new = state.nu, squares(updates, params, groups, products, l2)
        if rescale:
            xx = products.dot(require_params(params), params, groups)
            began = jnp.greater(count, 1)
            nu = groups.map_per_group(
                lambda nu, gg, xx: _arriving(nu, gg, xx, began), nu, new, xx, off=_first
            )
            new = groups.map_per_group(_squared_radius_times, new, xx, off=_first)
        v = nu = mix(new, nu, decay, 1 - decay)
        if rescale:
            nu = groups.map_per_group(_kept, nu, xx, off=_first)
            # From what is kept: else XLA computes that twice, and copies the old one for it.
            v = groups.map_per_group(
                lambda nu, xx: abs(nu) / jnp.where(is_zero(xx), 1.0, xx), nu, xx, off=_first
            )
        v = debias(drop_missing(updates, v), decay, count)
        out = groups.map_per_group(_root, v, off=lambda v: None if v is None else jnp.sqrt(v))
        out = jax.tree.map(lambda b: b + as_dtype(eps, b.dtype), out)
        # Zeros rather than `broadcast_to`, for the sharding of the updates.
        out = groups.map(lambda g, b: jnp.zeros_like(g) + b, updates, out, off=lambda _, b: b)
        return cast_like(out, params), RmsState(count, cast_like(nu, state.nu))

    return sharing(init, update)


def _arriving(kept: jax.Array, now: jax.Array, xx: jax.Array, began: Any) -> jax.Array:
    """r^2 v at the present radius, or v where it is zero, of what was kept at another."""
    zero, v = jnp.signbit(kept) | ~began, abs(kept)
    return jnp.where(
        is_zero(xx),
        jnp.where(zero, v, now),
        jnp.where(zero, _squared_radius_times(v, xx), v),
    )


def _squared_radius_times(v: jax.Array, xx: jax.Array) -> jax.Array:
    """r^2 v, or v where r is zero; finite if v is: weight decay alone makes it grow with r^4."""
    product = jnp.minimum(jnp.where(is_zero(xx), 1.0, xx) * v, jnp.finfo(v.dtype).max / 2)
    return jnp.where(jnp.isinf(v), v, product)


def _kept(nu: jax.Array, xx: jax.Array) -> jax.Array:
    """r^2 v, and -v where r is zero."""
    return jnp.where(is_zero(xx), -nu, nu)


def _root(v: jax.Array) -> jax.Array:
    """Of v, with a derivative at zero too."""
    tiny = float(jnp.finfo(v.dtype).tiny)
    return jnp.sqrt(jnp.maximum(v, tiny)) - tiny**0.5


def _first(x: Any, *_: Any) -> Any:
    return x


def _norm_squared(gg: Any, gx: Any, xx: Any, l2: Any) -> jax.Array:
    """||g + l2 x||^2"""
    return jnp.maximum(gg + l2 * (2 * gx + l2 * xx), 0.0)
