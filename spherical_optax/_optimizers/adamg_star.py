"""AdamG*: SGD with L2, written as an equivalent adaptive method on the unit sphere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import require_parts
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_one, hypot, is_zero, sqrt
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import as_dtype
from spherical_optax._transforms.inner_products import compute_inner_products
from spherical_optax._transforms.retract import Retraction


class MirroredRadiusState(NamedTuple):
    """State of `adamg_star`."""

    MOMENTS = Moments()

    count: jax.typing.ArrayLike  # steps taken, int32
    radius_squared: optax.Updates  # squared radius, per group, of the weights of the mirrored SGD


def adamg_star(
    learning_rate: Scalar, spheres: Spheres, *, weight_decay: Scalar = 0.0
) -> Transformation:
    """AdamG*: the adaptive method on the unit sphere that is equivalent to SGD with L2.

    Use this when you want the steps of SGD with L2 on weights whose radius stays 1.

    y = u - eta* grad / sqrt(v),  u <- y / ||y||,  v <- beta v + ||grad||^2
    beta = (1 - eta lambda)^4,  eta* = (2 beta)^(-1/2),  v_0 = r_0^4 / (2 eta^2 beta^(1/2))

    The second line is Theorem 4, with r_0 the radius at the first step. A group stays where it is if
    ||y|| is lost to rounding, as in `adamg`.

    Args:
      learning_rate: eta of the SGD that it mirrors, a number or a schedule.
      spheres: how the leaves split into groups, all of which land on unit spheres at the first step;
        all other leaves get SGD itself.
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

    Source: section 3.2 and Theorem 4 of the paper. Deviation: in place of v, the state holds the squared
    radius of the weights of SGD, (2 eta^2 beta^(1/2) v)^(1/2). For constant eta and lambda this is
    equivalent. It also mirrors schedules, and it does not overflow.
    """
    # With s the squared radius of the weights of SGD and q = 1 - eta lambda, Table 1 of the paper gives
    # SGD the effective learning rate eta / (s q), and s^2 <- q^2 (q^2 s^2 + 2 eta^2 ||grad L(u)||^2).
    retraction = Retraction(spheres, 1.0)

    def init(params):
        radius = match(spheres, params).with_tangent_space().make_zeros(params)
        mirrored = MirroredRadiusState(jnp.zeros([], jnp.int32), radius)
        return mirrored, retraction.init(params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        state, retract_state = require_parts("adamg_star", state, 2)
        groups = match_updates(spheres, updates, params).with_tangent_space()
        eta, decay = (h(state.count) if callable(h) else h for h in (learning_rate, weight_decay))
        shrink = 1 - jnp.asarray(eta * decay)
        products = compute_inner_products({"gg", "gx", "xx"}, groups, g=updates, x=params)

        def step_off_spheres(_s, _xx, x, g):
            if g is None:
                return None
            dtype = jnp.result_type(x)
            if not jnp.issubdtype(dtype, jnp.inexact):  # a mask or a count among the parameters
                return jnp.zeros_like(x)
            return -as_dtype(eta, dtype) * (as_dtype(g, dtype) + as_dtype(decay, dtype) * x)

        def start_at_parameters(s, xx):
            """The radius of SGD is that of the parameters at first, and for filters that were zero."""
            return jnp.where(is_zero(s), xx, s)

        def compute_factor(s, xx, *_):
            return -as_dtype(eta, s.dtype) / as_dtype(shrink, s.dtype) * divide_or_one(xx, s)

        def follow_radius(s, xx, gg):
            q, gain = as_dtype(shrink, s.dtype), jnp.asarray(2**0.5, s.dtype)
            return q * hypot(q * s, gain * as_dtype(eta, s.dtype) * sqrt(xx) * sqrt(gg))

        before = groups.read_state("radius_squared", state.radius_squared)
        mirrored = groups.map_per_group(start_at_parameters, before, products.xx)
        following = groups.map_per_group(follow_radius, mirrored, products.xx, products.gg)
        factors = groups.map_per_group(
            compute_factor, mirrored, products.xx, params, updates, off=step_off_spheres
        )
        steps, retract_state = retraction.update_multiple(
            updates, factors, retract_state, params, products, groups
        )
        state = MirroredRadiusState(
            optax.safe_increment(state.count), groups.choose(following, before)
        )
        return steps, (state, retract_state)

    return Transformation(init, with_open_boxes(update))
