"""AdamG*: what SGD does on the sphere, written as the adaptive method that it is there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._core.arguments import require_params
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_one, hypot, is_zero
from spherical_optax._core.sphere import Spheres
from spherical_optax._transforms.constraints import retract

Scalar = optax.ScalarOrSchedule
Transformation = optax.GradientTransformationExtraArgs


def adamg_star(
    learning_rate: Scalar, spheres: Spheres, *, weight_decay: Scalar = 0.0
) -> Transformation:
    """AdamG*: the adaptive method on the unit sphere that SGD with L2 is in disguise.

    y = u - eta* grad / sqrt(v),  u <- y / ||y||,  v <- beta v + ||grad||^2  with Theorem 4's
    beta = (1 - eta lambda)^4, eta* = (2 beta)^(-1/2), v_0 = r_0^4 / (2 eta^2 beta^(1/2))

    Args:
      learning_rate: eta of the SGD that it mirrors, a number or a schedule.
      spheres: how the leaves split into groups, all of which land on unit spheres at the first step;
        the rest gets that SGD itself.
      weight_decay: lambda of the SGD that it mirrors, a number or a schedule.

    Returns:
      A `GradientTransformationExtraArgs`. State: one number per group.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.adamg_star(0.1, so.Sphere(), weight_decay=1e-3)
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[0.0], [7.0]])}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere())
    {'kernel': Array([[1.]], dtype=float32)}

    Source: section 3.2 and Theorem 4. Deviation: kept is not v but the squared radius that the SGD
    would have, (2 eta^2 beta^(1/2) v)^(1/2), which is the same for constant eta and lambda, mirrors
    schedules too, and does not overflow.
    """
    return optax.chain(
        _scale_by_mirrored_radius(learning_rate, weight_decay, spheres), retract(spheres, 1.0)
    )


class MirroredRadiusState(NamedTuple):
    """State of `adamg_star`."""

    MOMENTS = Moments()

    count: jax.typing.ArrayLike  # steps taken, int32
    radius_squared: optax.Updates  # per group, of the SGD that is mirrored


def _scale_by_mirrored_radius(
    learning_rate: Scalar, weight_decay: Scalar, spheres: Spheres
) -> Transformation:
    """The step of SGD, on spheres of this radius but with the effective learning rate of that one's.

    With s the squared radius of the SGD and q = 1 - eta lambda, Table 1 gives SGD the effective
    learning rate eta / (s q), and its radius follows s^2 <- q^2 (q^2 s^2 + 2 eta^2 ||grad L(u)||^2).
    """

    def init(params):
        radius = match(spheres, params).with_tangent_space().zeros_per_group(params)
        return MirroredRadiusState(jnp.zeros([], jnp.int32), radius)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match(spheres, updates).with_tangent_space()
        eta, decay = (h(state.count) if callable(h) else h for h in (learning_rate, weight_decay))
        shrink = 1 - jnp.asarray(eta * decay)
        square = geometry.dot(require_params(params), params, groups)

        def sgd(x, g):
            return None if g is None else -_as(eta, x) * (_as(g, x) + _as(decay, x) * x)

        # At the first step, and for a filter that was zero so far, the SGD is where the parameters are.
        mirrored = groups.map_per_group(
            lambda s, xx: jnp.where(is_zero(s), xx, s), state.radius_squared, square
        )
        rate = groups.map_per_group(
            lambda s, xx: _as(eta, s) / _as(shrink, s) * divide_or_one(xx, s), mirrored, square
        )
        following = groups.map_per_group(
            lambda s, r, g: (
                _as(shrink, s) * hypot(_as(shrink, s) * s, 2**0.5 * _as(eta, s) * r * g)
            ),
            mirrored,
            geometry.norm(params, groups),
            geometry.norm(updates, groups),
        )
        updates = groups.map(
            lambda x, g, rate: -rate * g, params, updates, rate, off=lambda x, g, _: sgd(x, g)
        )
        count = optax.safe_increment(state.count)
        return updates, MirroredRadiusState(count, groups.as_state(following, state.radius_squared))

    return Transformation(init, update)


def _as(value: Any, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, jnp.result_type(like))
