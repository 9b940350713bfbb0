r"""The second moment: the `b` of x <- x - eta a / b [3]."""

import dataclasses
import functools
from collections.abc import Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import (
    is_constant_zero,
    require_constant_decay,
    weight_decay_at,
)
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import is_zero
from spherical_optax._core.shapes import OfGroups
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import (
    abs_squared,
    add_decay,
    as_dtype,
    cast_like,
    correct_bias,
    drop_missing,
    mix,
    mix_arrays,
)
from spherical_optax._transforms.inner_products import InnerProducts, to_transformation


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
    return to_transformation(
        Rms(
            decay=decay,
            eps=eps,
            spheres=spheres,
            reduce=reduce,
            rescale=rescale,
            weight_decay=weight_decay,
        )
    )


def second_moment(rrv: OfGroups, squares: OfGroups, xx: OfGroups, *, decay: Any) -> OfGroups:
    r"""Eq. [20] times r_k^2: r_k^2 v_k = decay r_{k-1}^2 v_{k-1} + (1 - decay) r_k^2 ||g_k||^2 / d.

    With `squares` = ||g_k + lambda x_k||^2 / d and `xx` = r_k^2, one number per group. By Lemma 1,
    r^2 v is the mean square of the gradients on the unit sphere, and needs no ratio of radii.
    """
    decay, gain = as_dtype(decay, rrv.dtype), as_dtype(1 - decay, rrv.dtype)
    # A group of radius zero starts anew. States of earlier versions have a negative number there.
    rrv = jnp.where(is_zero(xx) | (rrv < 0), 0.0, rrv)
    return decay * rrv + gain * _multiply_bounded(_square_radius(xx), squares)


def _square_radius(xx: OfGroups) -> OfGroups:
    """r^2, and 2^-60 at radius zero: v follows from r^2 v, which later counts for nothing."""
    return jnp.where(is_zero(xx), 2.0**-60, xx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rms:
    """`rms` as a block that may be given its inner products."""

    decay: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike = 1e-8
    spheres: Spheres = None
    reduce: Literal["mean", "sum"] = "mean"
    rescale: bool = False
    weight_decay: optax.ScalarOrSchedule = 0.0

    def __post_init__(self):
        require_constant_decay("rms", self.decay)
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"rms: reduce is {self.reduce!r}, not 'mean' or 'sum'")

    @property
    def inner_products(self) -> Set[str]:
        """The names of the inner products that `update` needs."""
        l2 = set() if is_constant_zero(self.weight_decay) else {"gx", "xx"}
        return {"gg"} | l2 | ({"xx"} if self.rescale else set())

    def get_momentum(self, state: RmsState) -> Any:
        del state  # it has none

    def init(self, params: Any) -> RmsState:
        groups = match(self.spheres, params).with_tangent_space()
        per_group, zeros = groups.zeros_per_group(params), optax.tree.zeros_like(params)
        nu = groups.choose(per_group, jax.tree.map(abs_squared, zeros))
        return RmsState(jnp.zeros([], jnp.int32), nu)

    def update(
        self, updates: Any, state: RmsState, params: Any, products: InnerProducts
    ) -> tuple[Any, RmsState]:
        groups = match(self.spheres, updates).with_tangent_space()
        l2 = weight_decay_at(self.weight_decay, state.count)
        count = optax.safe_increment(state.count)
        squares = self.mean_squares(updates, params, l2, products, groups)
        average = functools.partial(mix_arrays, decay=self.decay, gain=1 - self.decay)
        if self.rescale:
            nu = groups.map_per_group(
                functools.partial(second_moment, decay=self.decay),
                state.nu,
                squares,
                products.xx,
                off=lambda v, g, _: average(g, v),
            )
            v = groups.map_per_group(
                lambda rrv, xx: rrv / _square_radius(xx), nu, products.xx, off=lambda v, _: v
            )
        else:
            nu = v = mix(squares, state.nu, self.decay, 1 - self.decay)
        v = correct_bias(drop_missing(updates, v), self.decay, count)
        out = groups.map_per_group(_root, v, off=lambda v: None if v is None else jnp.sqrt(v))
        out = jax.tree.map(lambda b: b + as_dtype(self.eps, b.dtype), out)
        # Zeros rather than `broadcast_to`, for the sharding of the updates.
        out = groups.map(lambda g, b: jnp.zeros_like(g) + b, updates, out, off=lambda _, b: b)
        return cast_like(out, params), RmsState(count, cast_like(nu, state.nu))

    def mean_squares(self, g: Any, x: Any, l2: Any, products: InnerProducts, groups: Groups) -> Any:
        """||g + lambda x||^2 / d, or without d, per group; |g + lambda x|^2 off the spheres."""
        sums = products.gg
        if l2 is not None:
            sums = groups.map_per_group(
                functools.partial(_squared_length, l2=l2), products.gg, products.gx, products.xx
            )
        sums = groups.mean(sums) if self.reduce == "mean" else sums
        return groups.choose(sums, jax.tree.map(abs_squared, add_decay(g, x, l2)))


def _squared_length(gg: OfGroups, gx: OfGroups, xx: OfGroups, *, l2: Any) -> OfGroups:
    """||g + lambda x||^2 from inner products: g + lambda x itself would have to be in memory.

    XLA on a CPU sums over arrays in memory alone (JAX 0.10).
    """
    l2 = as_dtype(l2, gg.dtype)
    return jnp.maximum(gg + l2 * (2 * gx + l2 * xx), 0.0)


def _multiply_bounded(rr: OfGroups, v: OfGroups) -> OfGroups:
    """r^2 v; finite if v is, though weight decay alone makes it grow with r^4."""
    return jnp.where(jnp.isinf(v), v, jnp.minimum(rr * v, jnp.finfo(v.dtype).max / 2))


def _root(v: OfGroups) -> OfGroups:
    """The square root of v, which also has a derivative at zero."""
    tiny = float(jnp.finfo(v.dtype).tiny)
    return jnp.sqrt(jnp.maximum(v, tiny)) - tiny**0.5
