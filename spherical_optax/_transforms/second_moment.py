r"""The second moment, one number per group: the denominator b of x <- x - eta a / b, equation [3]."""

import dataclasses
import functools
from collections.abc import Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import (
    get_weight_decay,
    is_constant_zero,
    require_decay,
    require_number,
    require_state,
)
from spherical_optax._core.compiler_hints import OTHER_ZERO
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import is_zero
from spherical_optax._core.shapes import OfGroups
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import (
    add_decay,
    as_dtype,
    cast_like,
    correct_bias,
    drop_missing,
    mix,
    mix_arrays,
    square_modulus,
)
from spherical_optax._transforms.inner_products import (
    InnerProducts,
    expand_square,
    to_transformation,
)


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

    Use this when a chain of your own should divide by a second moment, without deforming the gradient on
    spheres. Per group of d coordinates:

    v_k = decay (r_{k-1} / r_k)^2 v_{k-1} + (1 - decay) d^{-1} ||g_k + lambda x_k||^2       [20]

    The output is sqrt(v_k / (1 - decay^{k+1})) + eps, in the shape of the updates. `rescale` applies
    the ratio of radii. The state then holds r^2 v: by Lemma 1 this is the average squared gradient on
    the unit sphere, which does not change with the radius. Off the spheres v is element-wise, as in
    equation [8], and its root has no derivative at zero, as in Optax.

    Args:
      decay: rate of decay (b2).
      eps: added outside the root.
      spheres: how the leaves split into groups; None is element-wise everywhere.
      reduce: "mean" as in equation [20], or "sum", without d^{-1}, as in AdamG.
      rescale: multiply v by the squared ratio of the radii; needs `params`. If a group has radius zero,
        its average starts afresh, and does not count at the next step. The squares of r g and of
        lambda r^2 have to fit in float32: lengths from about 1e-18 to 1e18.
      weight_decay: lambda of the L2 term, as in `ema`.

    Returns:
      A `GradientTransformationExtraArgs`. State: one number per group on the spheres, v or with
      `rescale` r^2 v, in at least float32; elsewhere v in the shape of the parameters.

    Raises:
      ValueError: if `reduce` is unknown or `decay` is a schedule; in `init` and `update`, if `spheres`
        does not fit the parameters; in `update`, if `params` is missing and `rescale` or `weight_decay`
        needs it.

    >>> tx = so.rms(0.99, spheres=so.Sphere())
    >>> g = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx.update(g, tx.init(g))[0]  # sqrt((9 + 16) / 2)
    {'kernel': Array([[3.536],
           [3.536]], dtype=float32)}

    Source: equations [8], [9] and [20] of the paper.
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

    By Lemma 1, r^2 v is the mean square of the gradients on the unit sphere: it needs no ratio of radii.

    Args:
      rrv: r_{k-1}^2 v_{k-1}, one number per group.
      squares: ||g_k||^2 / d per group, with the L2 term ||g_k + lambda x_k||^2 / d.
      xx: r_k^2 per group.
      decay: rate of decay.
    """
    decay, gain = as_dtype(decay, rrv.dtype), as_dtype(1 - decay, rrv.dtype)
    # A group of radius zero starts afresh. Earlier versions stored a negative number for such a group.
    rrv = jnp.where(is_zero(xx) | (rrv < OTHER_ZERO), OTHER_ZERO, rrv)
    return decay * rrv + gain * _multiply_bounded(_replace_zero_radius(xx), squares)


def _replace_zero_radius(xx: OfGroups) -> OfGroups:
    """Returns r^2, or 2^-60 at radius zero.

    The state of a group of radius zero is then 2^-60 v: v follows from it at this step, and it is
    negligible at later steps (2^-60 is the square of a radius of 1e-9).
    """
    return jnp.where(is_zero(xx), 2.0**-60, xx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rms:
    """The block of `rms`: its `update` takes the inner products as an argument."""

    decay: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike = 1e-8
    spheres: Spheres = None
    reduce: Literal["mean", "sum"] = "mean"
    rescale: bool = False
    weight_decay: optax.ScalarOrSchedule = 0.0

    def __post_init__(self):
        require_decay("rms", self.decay)
        require_number("rms", "eps", self.eps)
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"rms: reduce is {self.reduce!r}, not 'mean' or 'sum'")

    @property
    def inner_products(self) -> Set[str]:
        """The names of the inner products that `update` needs."""
        l2 = set() if is_constant_zero(self.weight_decay) else {"gx", "xx"}
        return {"gg"} | l2 | ({"xx"} if self.rescale else set())

    def get_momentum(self, state: RmsState) -> Any:
        del state  # no momentum in it

    def init(self, params: Any) -> RmsState:
        groups = match(self.spheres, params).with_tangent_space()
        nu = groups.make_zeros(
            params, off=lambda x: None if x is None else square_modulus(jnp.zeros_like(x))
        )
        return RmsState(jnp.zeros([], jnp.int32), nu)

    def update(
        self, updates: Any, state: RmsState, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, RmsState]:
        out, state = self.average(updates, state, params, products, groups)
        # `zeros_like` gives the result the sharding of the updates; `broadcast_to` would not.
        out = groups.map(lambda g, b: jnp.zeros_like(g) + b, updates, out, off=lambda _, b: b)
        return cast_like(out, params), state

    def average(
        self, updates: Any, state: RmsState, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, RmsState]:
        """`update` with one number per group on the spheres."""
        require_state(state, RmsState)
        l2 = get_weight_decay(self.weight_decay, state.count)
        count = optax.safe_increment(state.count)
        before = groups.read_state("nu", state.nu, full=True)
        squares = self.compute_squares(updates, params, l2, products, groups)
        average = functools.partial(mix_arrays, decay=self.decay, gain=1 - self.decay)
        if self.rescale:
            nu = groups.map_per_group(
                functools.partial(second_moment, decay=self.decay),
                before,
                squares,
                products.xx,
                off=lambda v, g, _: average(g, v),
            )
            v = groups.map_per_group(
                lambda rrv, xx: rrv / _replace_zero_radius(xx), nu, products.xx, off=lambda v, _: v
            )
        else:
            nu = v = mix(squares, before, self.decay, 1 - self.decay)
        v = correct_bias(drop_missing(updates, v), self.decay, count)
        out = groups.map_per_group(_take_root, v, off=lambda v: None if v is None else jnp.sqrt(v))
        out = jax.tree.map(lambda b: b + as_dtype(self.eps, b.dtype), out)
        return out, RmsState(count, cast_like(nu, before))

    def compute_squares(
        self, g: Any, x: Any, l2: Any, products: InnerProducts, groups: Groups
    ) -> Any:
        """Computes ||g + lambda x||^2 per group, over d if "mean"; |g + lambda x|^2 off the spheres."""
        sums = products.gg
        if l2 is not None:
            sums = groups.map_per_group(
                lambda gg, gx, xx: expand_square(gg, gx, xx, as_dtype(l2, gg.dtype)),
                products.gg,
                products.gx,
                products.xx,
            )
        sums = groups.mean(sums) if self.reduce == "mean" else sums
        return groups.choose(sums, jax.tree.map(square_modulus, add_decay(g, x, l2)))


def _multiply_bounded(rr: OfGroups, v: OfGroups) -> OfGroups:
    """Multiplies r^2 v, and keeps the product finite if v is: weight decay makes it grow with r^4."""
    return jnp.where(jnp.isinf(v), v, jnp.minimum(rr * v, jnp.finfo(v.dtype).max / 2))


def _take_root(v: OfGroups) -> OfGroups:
    """Computes the square root of v, with a finite derivative at zero."""
    tiny = float(jnp.finfo(v.dtype).tiny)
    return jnp.sqrt(jnp.maximum(v, tiny)) - tiny**0.5
