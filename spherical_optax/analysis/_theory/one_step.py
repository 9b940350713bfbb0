"""Computes one step on the sphere: from its a and b (Theorem 2), or from any update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spherical_optax import geometry
from spherical_optax._core.arguments import reject_schedule
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import (
    divide_arrays,
    divide_or_infinity,
    divide_or_one,
    divide_or_zero,
    is_zero,
    sqrt,
)
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like


class ImageStep(NamedTuple):
    """The image of a step: trees like the parameters, or group-sized (None off the spheres)."""

    effective_lr: Any  # eta^e, group-sized
    direction: Any  # c_perp, tangent at u; off the spheres a / b
    angle: Any  # between x and x - eta a / b, group-sized, radians
    radius: Any  # ||x||, group-sized
    next_radius: Any  # ||x - eta a / b||, group-sized
    next_direction: Any  # u', that of x - eta a / b; off the spheres x - eta a / b itself


class MeasuredStep(NamedTuple):
    """A measured update q: trees like the parameters, or group-sized (None off the spheres)."""

    angle: Any  # between x and x + q, group-sized, radians
    tan_angle: Any  # eta^e ||c_perp||, group-sized; infinite for a right angle, negative beyond it
    velocity: Any  # -eta^e c_perp, 0 at a right angle; q does not tell the two factors apart
    radius: Any  # ||x||, group-sized
    next_radius: Any  # ||x + q||, group-sized
    radius_ratio: Any  # ||x + q|| / ||x||, group-sized; 1 where x is zero
    radial_cosine: Any  # <q, u> / ||q||, group-sized
    next_direction: Any  # u', that of x + q; off the spheres x + q itself


def image_step(
    params: Any, a: Any, b: Any, learning_rate: jax.typing.ArrayLike, spheres: Spheres
) -> ImageStep:
    r"""Computes the image on the unit spheres of the step x - eta a / b: Theorem 2.

    Use this when you know the a and the b of a step and want its effective learning rate and direction.

    c = r a / (b / (d^{-1/2} ||b||)),   A = eta / (r^2 d^{-1/2} ||b||)
    eta^e = A / (1 - A <c, u>)                                                            [11]
    u' = (u - eta^e c_perp) / sqrt(1 + (eta^e ||c_perp||)^2)                              [12]
    r' = r (1 - A <c, u>) sqrt(1 + (eta^e ||c_perp||)^2)                                  [14]
    angle = arctan(eta^e ||c_perp||)

    [12] and [14] are exact. The theorem assumes 1 - A <c, u> > 0. Longer steps break this assumption;
    their `angle`, `next_radius` and `next_direction` are still those of x - eta a / b.

    Args:
      params: x, tree of arrays.
      a: the numerator of the step, tree like `params`, or a number.
      b: the denominator, tree like `params`, or a number; 1 for SGD. Where b is 0 the step is 0, as in
        `so.quotient`.
      learning_rate: eta.
      spheres: how the leaves split into groups.

    Returns:
      An `ImageStep`. A group of radius 0 has no direction: its effective rate, direction and angle are
      0.

    Raises:
      ValueError: if `spheres` does not fit `params`, or if the learning rate is a schedule.

    >>> x, g = {"w": jnp.array([[2.0], [0.0]])}, {"w": jnp.array([[0.0], [4.0]])}
    >>> step = so.analysis.image_step(x, g, 1.0, 0.5, so.Sphere())
    >>> step.effective_lr  # that of SGD: eta / r^2
    {'w': Array([[0.125]], dtype=float32)}
    >>> step.next_radius, step.angle
    ({'w': Array([[2.828]], dtype=float32)}, {'w': Array([[0.785]], dtype=float32)})

    Source: Theorem 2, [10-14].
    """
    groups = match(spheres, params)
    a, b = _fill_tree(a, params), _fill_tree(b, params)
    radius = geometry.norm(params, groups)
    rms = groups.map_per_group(sqrt, groups.mean(geometry.dot(b, b, groups)))
    # a / b is c without its factor r d^{-1/2} ||b||. In A <c, u> and A ||c_perp|| this factor cancels.
    quotient = groups.map(lambda _, a, b: divide_arrays(a, b), params, a, b, off=_divide)
    tangent = geometry.project(params, quotient, groups)
    radial = groups.map_per_group(
        lambda q, r: divide_or_zero(q, r * r),
        geometry.dot(quotient, params, groups),
        radius,
    )
    eta = jnp.asarray(reject_schedule("image_step", learning_rate))

    def multiply_by_eta(x: jax.Array) -> jax.Array:
        return eta.astype(x.dtype) * x

    along = groups.map_per_group(lambda q: 1 - multiply_by_eta(q), radial)  # 1 - A <c, u>
    across = groups.map_per_group(
        lambda t, r: multiply_by_eta(divide_or_zero(t, r)),
        geometry.norm(tangent, groups),
        radius,
    )  # A ||c_perp||
    rate = groups.map_per_group(
        lambda r, b, q: divide_or_infinity(multiply_by_eta(divide_or_zero(1.0, r * r * b)), q),
        radius,
        rms,
        along,
    )
    direction = geometry.scale(
        tangent, groups.map_per_group(lambda r, b: r * b, radius, rms), groups
    )
    following = groups.map(
        lambda x, t: x - multiply_by_eta(t),
        params,
        quotient,
        off=lambda x, t: x - cast_like(multiply_by_eta(t), x),
    )
    return ImageStep(
        rate,
        direction,
        groups.map_per_group(jnp.arctan2, across, along),
        radius,
        _compute_next_radius(following, along, across, radius, groups),
        geometry.direction(following, groups),
    )


def measure_step(params: Any, updates: Any, spheres: Spheres) -> MeasuredStep:
    r"""Measures an update on the spheres, without knowing its a, its b or its learning rate.

    Use this when you have the update of any optimizer and want to know how far it turns each group.

    For the update q, x + q = r ((1 + <q, u> / r) u + q_perp / r). This gives

    eta^e ||c_perp|| = tan(angle) = ||q_perp|| / (r + <q, u>)                             [12]
    r' / r = hypot(1 + <q, u> / r, ||q_perp|| / r)                                        [14]

    These are [12] and [14] with the measured radial and tangential parts of the step.

    Args:
      params: x, before the update.
      updates: q, tree like `params`: what `optax.apply_updates` would add.
      spheres: how the leaves split into groups.

    Returns:
      A `MeasuredStep`. A group of radius 0 has no direction: its angle is 0.

    Raises:
      ValueError: if `spheres` does not fit `params`.

    >>> x, q = {"w": jnp.array([[2.0], [0.0]])}, {"w": jnp.array([[0.0], [-2.0]])}
    >>> step = so.analysis.measure_step(x, q, so.Sphere())
    >>> step.angle, step.radius_ratio
    ({'w': Array([[0.785]], dtype=float32)}, {'w': Array([[1.414]], dtype=float32)})

    Source: Theorem 2, [12] and [14].
    """
    groups = match(spheres, params)
    radius = geometry.norm(params, groups)
    tangent = geometry.project(params, updates, groups)
    radial = geometry.dot(updates, params, groups)
    along = groups.map_per_group(lambda qx, r: 1 + divide_or_zero(qx, r * r), radial, radius)
    across = groups.map_per_group(
        lambda t, r: divide_or_zero(t, r), geometry.norm(tangent, groups), radius
    )
    following = groups.map(
        lambda x, q: x + q,
        params,
        updates,
        off=lambda x, q: x if q is None else x + cast_like(q, x),
    )
    next_radius = _compute_next_radius(following, along, across, radius, groups)
    return MeasuredStep(
        groups.map_per_group(jnp.arctan2, across, along),
        groups.map_per_group(divide_or_infinity, across, along),
        geometry.scale(
            tangent,
            groups.map_per_group(lambda r, q: divide_or_zero(1.0, r * q), radius, along),
            groups,
        ),
        radius,
        next_radius,
        groups.map_per_group(divide_or_one, next_radius, radius),
        compute_radial_cosine(radial, radius, geometry.norm(updates, groups), groups),
        geometry.direction(following, groups),
    )


def compute_radial_cosine(radial: Any, radius: Any, length: Any, groups: Groups) -> Any:
    """<q, x> / (||q|| ||x||) of group-sized trees, and 0 where q or x is 0.

    Args:
      radial: <q, x>.
      radius: ||x||.
      length: ||q||.
      groups: spheres matched with the parameters.
    """

    def compute(qx: jax.Array, r: jax.Array, q: jax.Array) -> jax.Array:
        found = divide_or_zero(divide_or_zero(qx, r), q)
        return jnp.where(jnp.isnan(q), q, jnp.clip(found, -1, 1))

    return groups.map_per_group(compute, radial, radius, length)


def _compute_next_radius(
    following: Any, along: Any, across: Any, radius: Any, groups: Groups
) -> Any:
    """The radius after the step by [14]; a group that was zero has the length of the step."""
    return groups.map_per_group(
        lambda n, q, t, r: jnp.where(is_zero(r), n, r * jnp.hypot(q, t)),
        geometry.norm(following, groups),
        along,
        across,
        radius,
    )


def _fill_tree(tree: Any, params: Any) -> Any:
    """Turns a number into a tree like `params`; a tree stays as it is."""
    if jax.tree_util.all_leaves([tree]) and jnp.ndim(tree) == 0 and tree is not None:
        return jax.tree.map(lambda x: jnp.full_like(x, tree), params)
    return tree


def _divide(x: Any, a: Any, b: Any) -> Any:
    return None if a is None else divide_arrays(cast_like(a, x), cast_like(b, x))
