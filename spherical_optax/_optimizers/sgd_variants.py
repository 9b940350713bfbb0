"""SGD with momentum, and SGD with transported momentum: chains of building blocks.

Numbers in brackets are equations of the paper.

sgd      add_decayed_weights(l2)  trace()                       lr
sgd_mrt  add_decayed_weights(l2)  trace(transport, rescale)     lr
"""

from typing import Any

import jax
import optax

from spherical_optax._core.arguments import reject_number
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like
from spherical_optax._transforms.learning_rate import scale_by_learning_rate
from spherical_optax._transforms.momentum import trace
from spherical_optax._transforms.weight_decay import add_decayed_weights


def sgd(
    learning_rate: Scalar,
    spheres: Spheres = None,
    momentum: jax.typing.ArrayLike | None = None,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """SGD with L2 regularisation and heavy-ball momentum.

    Use this when you compare with SGD as it is in the paper.

    x <- x - eta m [5],  m <- momentum m + grad + lambda x [6]

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: ignored; accepted because all variants have the same arguments.
      momentum: decay of m; None is SGD without m.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m, or nothing.

    Raises:
      ValueError: if `spheres` is a number; in `update`, if `params` is missing.

    >>> tx = so.sgd(0.1, momentum=0.9, weight_decay=0.5)
    >>> params = {"kernel": jnp.array([2.0])}
    >>> tx.update({"kernel": jnp.array([1.0])}, tx.init(params), params)[0]
    {'kernel': Array([-0.2], dtype=float32)}

    Source: equations [5] and [6] of the paper.
    """
    reject_number("sgd", spheres, f"write momentum={spheres!r}")
    return optax.chain(
        add_decayed_weights(weight_decay),
        optax.stateless(cast_like)
        if momentum is None
        else trace(momentum, accumulator_dtype=mu_dtype),
        scale_by_learning_rate(learning_rate),
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

    Use this when the weights are normalised and you train with SGD and momentum.

    m_k = momentum (r_{k-1} / r_k) Gamma(m_{k-1}) + grad + lambda x

    This is equation [6] with the old momentum brought to the new point as in equation [19]: Gamma is its
    parallel transport from the last point to this one, r the radius.

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; all other leaves get `sgd`.
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

    Source: appendix D of the paper. As in the authors' released code, the transport drops the radial
    part of m.
    """
    return optax.chain(
        add_decayed_weights(weight_decay),
        trace(momentum, spheres, transport=True, rescale=True, accumulator_dtype=mu_dtype),
        scale_by_learning_rate(learning_rate),
    )
