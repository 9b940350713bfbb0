"""AdamG: Adam on the unit sphere."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import require_params, require_parts
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.matching import match_updates
from spherical_optax._core.safe_math import divide_arrays, divide_or_zero
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like, correct_bias
from spherical_optax._transforms.inner_products import InnerProducts, compute_inner_products
from spherical_optax._transforms.learning_rate import scale_by_learning_rate
from spherical_optax._transforms.momentum import Ema
from spherical_optax._transforms.quotient import Quotient, QuotientState
from spherical_optax._transforms.retract import Retraction
from spherical_optax._transforms.second_moment import Rms
from spherical_optax._transforms.weight_decay import add_decay_off_spheres


def adamg(
    learning_rate: Scalar,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """AdamG: Adam on the unit sphere, with transported momentum and one second moment per group.

    Use this when the weights should stay on unit spheres, and the learning rate should be an angle.

    y = x - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),  x <- y / ||y||
    m <- b1 Gamma(m) + (1 - b1) grad,  v <- b2 v + (1 - b2) ||grad||^2

    Gamma is the parallel transport of m from the last point to this one; v is not divided by d.
    A group stays where it is if ||y|| is lost to rounding: less than about 3 % of ||x|| in float32, or
    squares out of range.

    Args:
      learning_rate: eta, a number or a schedule: the step in radians, and therefore larger than Adam's.
      spheres: how the leaves split into groups, all of which land on unit spheres at the first step.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      weight_decay: lambda, a number or a schedule; only off the spheres, because it is radial on them.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m, and two numbers per group.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.adamg(0.1, so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[0.0], [7.0]])}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere())
    {'kernel': Array([[1.]], dtype=float32)}

    Source: Cho and Lee, "Riemannian approach to batch normalization" (2017), as in section 4.1.
    """
    decay = add_decay_off_spheres(spheres, weight_decay)
    a = Ema(decay=b1, spheres=spheres, transport=True, accumulator_dtype=mu_dtype)
    b = Rms(decay=b2, eps=eps, spheres=spheres, reduce="sum")
    block = Quotient(a, b)
    rate, retraction = scale_by_learning_rate(learning_rate), Retraction(spheres, 1.0)

    def init(params):
        return (
            decay.init(params),
            block.init(params),
            rate.init(params),
            retraction.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        """The numbers and states of a chain of the four, with all sums in one pass over g, m and x."""
        del extra_args
        decay_state, quotient_state, rate_state, retract_state = require_parts("adamg", state, 4)
        x = require_params(params)
        m = block.get_momentum(quotient_state)
        g, decay_state = decay.update(updates, decay_state, x)
        groups = match_updates(spheres, g, x).with_tangent_space()
        groups.require_moment("the momentum", m)
        # A narrower momentum is summed in the precision of x, which the radius has.
        wide = jax.tree.map(_widen_like, m, x)
        products = compute_inner_products(block.inner_products | {"gm"}, groups, g=g, x=x, m=wide)
        top, a_state = a.average(g, quotient_state.a, x, products, groups)
        bottom, b_state = b.average(g, quotient_state.b, x, products, groups)
        factors = groups.map_per_group(
            lambda b, *_: divide_or_zero(1.0, b),  # of m, which is spread over the array later
            bottom,
            cast_like(top, x),
            cast_like(bottom, x),
            off=lambda _, m, b: None if m is None else divide_arrays(m, b),
        )
        factors, rate_state = rate.update(factors, rate_state)
        products = a.momentum.follow_products(m, quotient_state.a.kept, products, groups)
        along = InnerProducts(
            gg=correct_bias(correct_bias(products.mm, b1, a_state.count), b1, a_state.count),
            gx=correct_bias(products.mx, b1, a_state.count),
            xx=products.xx,
        )
        steps, retract_state = retraction.update_multiple(
            top, factors, retract_state, x, along, groups
        )
        return steps, (decay_state, QuotientState(a_state, b_state), rate_state, retract_state)

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def _widen_like(m: jax.Array, x: jax.Array) -> jax.Array:
    dtype = jnp.result_type(x)
    return m if m.dtype.itemsize >= dtype.itemsize else m.astype(dtype)
