"""SGD with momentum, and its momentum transported: chains of building blocks.

sgd      add_decayed_weights(l2)  trace()                       lr
sgd_mrt  add_decayed_weights(l2)  trace(transport, rescale)     lr
"""

from typing import Any

import jax
import optax

from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like
from spherical_optax._transforms.momentum import trace

Scalar = optax.ScalarOrSchedule
Transformation = optax.GradientTransformationExtraArgs


def sgd(
    learning_rate: Scalar,
    spheres: Spheres = None,
    momentum: jax.typing.ArrayLike | None = None,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """SGD with L2 regularisation and heavy-ball momentum.

    x <- x - eta m [5],  m <- momentum m + grad + lambda x [6]

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: not used; there so that the variants can be swapped.
      momentum: decay of m; None keeps no m at all.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m, or nothing.

    Raises:
      ValueError: in `update`, if `params` is missing.

    >>> tx = so.sgd(0.1, momentum=0.9, weight_decay=0.5)
    >>> params = {"kernel": jnp.array([2.0])}
    >>> tx.update({"kernel": jnp.array([1.0])}, tx.init(params), params)[0]
    {'kernel': Array([-0.2], dtype=float32)}

    Source: [5] and [6].
    """
    del spheres
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.stateless(cast_like)
        if momentum is None
        else trace(momentum, accumulator_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd_mrt(
    learning_rate: Scalar,
    spheres: Spheres,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """SGD-MRT: SGD with momentum that is transported and rescaled by the ratio of the radii.

    m_k = momentum (r_{k-1} / r_k) Gamma(m_{k-1}) + grad + lambda x: [6] with the carry of [19]

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; the rest gets `sgd`.
      momentum: decay of m.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.sgd_mrt(0.1, so.Sphere())
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates
    {'kernel': Array([[-0.3],
           [-0.4]], dtype=float32)}

    Source: appendix D of the paper; the radial part of m is dropped, as in the released code.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        trace(momentum, spheres, transport=True, rescale=True, accumulator_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )
