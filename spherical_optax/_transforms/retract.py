"""Back to the sphere after a step: x <- R (x + q) / ||x + q||.

Notation: x parameters of one group, q the update of the group, y = x + q, R the wanted radius.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from spherical_optax import geometry
from spherical_optax._core.arguments import (
    is_constant_zero,
    is_number,
    require_number,
    require_params,
    require_state,
)
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.projection import compute_retraction_factor
from spherical_optax._core.safe_math import divide_or_one, is_low_precision, is_zero, sqrt, upcast
from spherical_optax._core.shapes import OfGroups, PerGroup
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import as_dtype, cast_like
from spherical_optax._transforms.inner_products import InnerProducts, expand_square

Radius = jax.typing.ArrayLike | Literal["current", "initial"]


class RetractState(NamedTuple):
    """State of `retract` with radius "initial"."""

    MOMENTS = Moments()

    kept: optax.Updates  # the radius per group at `init`


def retract(
    spheres: Spheres,
    radius: jax.typing.ArrayLike | Literal["current", "initial"] = "current",
    *,
    outward: jax.typing.ArrayLike = 0.0,
    inward: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Changes the updates so that the parameters have radius R after `apply_updates`.

    Use this when weights should stay on spheres of fixed radius, or near them. It belongs at the end of
    a chain, after the learning rate. With y = x + q,

    y <- (R + c (||y|| - R)) y / ||y||,   c = `outward` where ||y|| > R, else `inward`

    (0, 0) is the retraction, R y / ||y||, and (1, 1) is no constraint. (0, 1) with a number for R keeps
    the weights inside a ball; (0.5, 1) brakes their growth.

    Args:
      spheres: how the leaves split into groups.
      radius: R. "current" is the radius before the step. "initial" is the radius at `init`: the state
        holds it, and it does not drift in low precision. A number is one radius for all groups.
      outward: the part of a step out of the sphere that remains, from 0 to 1.
      inward: the part of a step into the sphere that remains, from 0 to 1.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off the
      spheres, in groups of one coordinate, and where x, x + q or R is zero.

    Raises:
      ValueError: if `radius` is neither of the two words nor a positive number, if `outward` or `inward`
        is not in [0, 1], or if `spheres` does not fit the parameters; in `update`, if `params` is
        missing.

    >>> tx = optax.chain(optax.sgd(1.0), so.retract(so.Sphere(), 1.0))
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.4], [-0.8]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0.6],
           [0.8]], dtype=float32)}

    Source: the second line of AdamG*, section 3.2 of the paper. With `outward=0.5` and `inward=1.0` it
    is the "radial brake" of NVIDIA's Emerging-Optimizers.
    """
    retraction = Retraction(spheres, radius, outward, inward)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        x = require_params(params)
        xx = geometry.dot(x, x, groups)
        yy = groups.sum(lambda x, q: jnp.square(x + q), x, updates)
        return retraction.update(updates, state, x, groups, xx, yy)

    return optax.GradientTransformationExtraArgs(retraction.init, with_open_boxes(update))


@dataclasses.dataclass(frozen=True)
class Retraction:
    """`retract`, whose `update` takes the squared lengths before and after the step as arguments."""

    spheres: Spheres
    radius: Radius
    outward: jax.typing.ArrayLike = 0.0
    inward: jax.typing.ArrayLike = 0.0

    def __post_init__(self):
        if not _is_radius(self.radius):
            raise ValueError(
                f"retract: radius is {self.radius!r}, not 'current', 'initial' or a positive number"
            )
        for name, part in (("outward", self.outward), ("inward", self.inward)):
            require_number("retract", name, part)
            if not _is_part(part):
                raise ValueError(f"retract: {name} is {part!r}, not in [0, 1]")

    def init(self, params: Any) -> Any:
        groups = match(self.spheres, params).with_tangent_space()
        if not self._keeps_initial:
            return optax.EmptyState()
        return RetractState(groups.make_state(geometry.norm(params, groups), params))

    def update(
        self, q: Any, state: Any, params: Any, groups: Groups, xx: PerGroup, yy: PerGroup
    ) -> tuple[Any, Any]:
        """Computes the step in at least float32: in low precision it is then rounded once."""
        wanted, state = self._choose_radius(state, groups, groups.map_per_group(sqrt, xx))
        if not self._is_strict:
            wanted = groups.map_per_group(self._leave_part, wanted, yy)
        factor = groups.map_per_group(compute_retraction_factor, wanted, xx, yy)
        x = jax.tree.map(upcast, params)
        y = groups.map(lambda x, q, f: f * (x + q), x, q, factor)
        if not (self._keeps_current and self._is_strict):
            y = _compensate_rounding(y, params, groups)
        step = groups.map(lambda x, q, y: y - x, params, q, y, off=lambda x, q, _: q)
        return cast_like(step, params), state

    def update_multiple(
        self, a: Any, c: Any, state: Any, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, Any]:
        """`update` for the multiple q = c a of a vector, with ||x + c a||^2 from inner products.

        The sum over the array x + q would wait for c, and read the arrays once more. A group stays where
        it is if the inner products do not tell ||x + c a||.

        Args:
          a: the tree of vectors.
          c: one number per group; off the spheres, the updates themselves.
          state: the state of `retract`.
          params: the parameters x.
          products: <a, a>, <a, x> and <x, x>, in the fields gg, gx and xx.
          groups: how the leaves split.
        """
        xx, ax, aa = products.xx, products.gx, products.gg
        yy = groups.map_per_group(expand_square, xx, ax, aa, c)
        lost = groups.map_per_group(_is_lost, yy, xx, aa, c)
        yy = groups.map_per_group(jnp.where, lost, xx, yy)
        c = groups.map_per_group(
            lambda c, lost: jnp.where(lost, jnp.zeros_like(c), c), c, lost, off=lambda c, _: c
        )
        q = groups.map_arrays(lambda a, c: c * upcast(a), a, c, off=lambda _, q: q)
        return self.update(q, state, params, groups, xx, yy)

    @property
    def _keeps_initial(self) -> bool:
        return isinstance(self.radius, str) and self.radius == "initial"

    @property
    def _keeps_current(self) -> bool:
        return isinstance(self.radius, str) and self.radius == "current"

    @property
    def _is_strict(self) -> bool:
        return is_constant_zero(self.outward) and is_constant_zero(self.inward)

    def _choose_radius(self, state: Any, groups: Groups, now: PerGroup) -> tuple[PerGroup, Any]:
        """The radius R of every group, and the new state; `now` are the radii before the step."""
        if self._keeps_current:
            return now, state
        if not self._keeps_initial:
            return groups.to_per_group(self.radius, now), state
        require_state(state, RetractState)
        # A filter that starts at zero has no initial radius: it keeps its first radius above zero.
        wanted = groups.map_per_group(
            lambda kept, r: jnp.where(is_zero(kept), r, kept),
            groups.read_state("kept", state.kept),
            now,
        )
        return wanted, RetractState(groups.choose(wanted, state.kept))

    def _leave_part(self, r: OfGroups, yy: OfGroups) -> OfGroups:
        """The radius R + c (||y|| - R)."""
        y = sqrt(yy)
        part = jnp.where(y > r, as_dtype(self.outward, r.dtype), as_dtype(self.inward, r.dtype))
        return r + part * (y - r)


def _is_lost(yy: OfGroups, xx: OfGroups, aa: OfGroups, c: OfGroups) -> Any:
    """Whether there is no step, or yy = ||x + c a||^2 is lost to overflow, underflow or cancellation.

    The rounding of the expansion is a few eps (<x, x> + c^2 <a, a>). A result of 10^4 times that, in
    float32 a y of 3 % of x, gives the radius to 1e-4.
    """
    rounding = float(jnp.finfo(yy.dtype).eps) * (xx + c * c * aa)
    return (c == 0) | jnp.isinf(aa) | is_zero(aa) | jnp.isinf(yy) | (yy < 1e4 * rounding)


def _is_part(part: Any) -> bool:
    return isinstance(part, Tracer) or (jnp.ndim(part) == 0 and 0 <= float(part) <= 1)


def _is_radius(radius: Any) -> bool:
    if isinstance(radius, str):
        return radius in ("current", "initial")
    if isinstance(radius, bool) or not is_number(radius) or jnp.ndim(radius):
        return False
    return isinstance(radius, Tracer) or 0 < float(radius) < float("inf")


def _compensate_rounding(target: Any, params: Any, groups: Groups) -> Any:
    """Rescales the target such that its rounded image has the wanted radius.

    bfloat16 rounds a small change of the radius away in every coordinate, if the change is less than
    half a unit in the last place, and the radius drifts by more than 1e-3. We therefore simulate the
    rounded point, rescale the target by the error of its radius, and keep the new target only in groups
    where its rounded radius is closer.
    """
    if not any(map(is_low_precision, jax.tree.leaves(params))):
        return target

    def measure_rounded(tree):
        return geometry.norm(jax.tree.map(_simulate_step, params, tree), groups)

    def keep_if_closer(wanted, before, after, factor):
        return jnp.where(jnp.abs(after - wanted) < jnp.abs(before - wanted), factor, 1.0)

    wanted, before = geometry.norm(target, groups), measure_rounded(target)
    factor = groups.map_per_group(divide_or_one, wanted, before)
    after = measure_rounded(geometry.scale(target, factor, groups))
    factor = groups.map_per_group(keep_if_closer, wanted, before, after, factor)
    return geometry.scale(target, factor, groups)


def _simulate_step(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + (y - x) as `optax.apply_updates` rounds it in the dtype of x.

    `reduce_precision` stands in for casts, because compilers may skip a cast down and up again.
    """
    if not is_low_precision(x):
        return y
    kind = jnp.finfo(x.dtype)
    round_to_dtype = functools.partial(
        jax.lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=kind.nmant
    )
    return round_to_dtype(upcast(x) + round_to_dtype(y - upcast(x)))
