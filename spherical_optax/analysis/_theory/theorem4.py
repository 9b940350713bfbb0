"""Theorem 4: on the sphere, SGD with L2 is AdamG* with these constants."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spherical_optax._core.arguments import reject_schedule


class AdamGStar(NamedTuple):
    """Constants of AdamG*: y = u - eta* grad / sqrt(v), u <- y / ||y||, v <- beta v + ||grad||^2."""

    beta: jax.Array
    learning_rate: jax.Array  # eta*
    v0: Any  # shaped like the given radius


def adamg_star_from_sgd(
    learning_rate: jax.typing.ArrayLike, weight_decay: jax.typing.ArrayLike, radius: Any
) -> AdamGStar:
    r"""Computes the constants with which AdamG* follows SGD with L2, at order 2 in the step.

    Use this when you want to look at the constants; `so.adamg_star` computes its own.

    beta = (1 - eta lambda)^4,   eta* = (2 beta)^{-1/2},   v_0 = r_0^4 / (2 eta^2 beta^{1/2})

    Args:
      learning_rate: eta of the SGD step x - eta (grad + lambda x).
      weight_decay: lambda of the same step.
      radius: r_0, the radius at the start: a number, or a tree as `so.geometry.norm` returns it.

    Returns:
      An `AdamGStar`, with `v0` shaped like `radius`.

    Raises:
      ValueError: if the learning rate or the weight decay is a schedule; outside `jax.jit` also if the
        learning rate is not positive, or learning rate times weight decay is not in [0, 1).

    >>> star = so.analysis.adamg_star_from_sgd(0.1, 0.5, radius=2.0)
    >>> star.beta, star.learning_rate
    (Array(0.815, dtype=float32), Array(0.783, dtype=float32))

    Source: Theorem 4.
    """
    rate, decay = (reject_schedule("adamg_star_from_sgd", x) for x in (learning_rate, weight_decay))
    if not isinstance(rate, Tracer) and not isinstance(decay, Tracer):
        product: Any = np.asarray(rate * decay)
        if not (np.all(np.asarray(rate) > 0) and np.all((product >= 0) & (product < 1))):
            raise ValueError(
                f"adamg_star_from_sgd: learning rate {rate} and weight decay {decay}; needed are a "
                "positive rate, and a product of both from 0 to below 1"
            )
    eta = jnp.asarray(rate, jnp.result_type(float))
    shrink = 1 - eta * jnp.asarray(decay, eta.dtype)
    root = shrink * shrink  # beta^{1/2}
    v0 = jax.tree.map(
        lambda r: jnp.asarray(r, jnp.result_type(float)) ** 4 / (2 * eta * eta * root),
        radius,
    )
    return AdamGStar(root * root, 1 / (jnp.sqrt(jnp.asarray(2.0, eta.dtype)) * root), v0)
