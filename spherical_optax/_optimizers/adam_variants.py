r"""Adam and the paper's variants of it: chains of building blocks, each one step further from Adam.

Numbers in brackets are equations of the paper. Its letters name the three parts that bend Adam's steps
away from the sphere: (a) the element-wise division, (b) momentum without transport along the sphere,
(c) the ratios of the radii.

    adam     quotient(ema(l2),                      rms(l2))                             lr
    adams    quotient(ema(l2),                      rms(spheres, l2))                    lr
    adamst   quotient(ema(transport, l2),           rms(spheres, l2))                    lr
    adamsrt  quotient(ema(transport, rescale, l2),  rms(spheres, rescale, l2))           lr
    adamg    quotient(ema(transport),               rms(spheres, reduce="sum"))          lr  retract(1)
             (in adamg.py)

The L2 term is an argument of the moments, as in [8], [19] and [20]. `add_decayed_weights` in front of
them would give the same numbers, but the sum g + lambda x would take one more array in memory.
"""

from typing import Any

import jax
import optax

from spherical_optax._core.arguments import reject_number
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Spheres
from spherical_optax._transforms.inner_products import to_transformation
from spherical_optax._transforms.learning_rate import scale_by_learning_rate
from spherical_optax._transforms.momentum import Ema, ema
from spherical_optax._transforms.quotient import Quotient, quotient
from spherical_optax._transforms.second_moment import Rms, rms


def adam(
    learning_rate: Scalar,
    spheres: Spheres = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """Adam with L2 regularisation inside the gradient, the scheme that the paper analyses.

    Use this when you compare with Adam as it is in the paper; for decoupled weight decay use
    `optax.adamw`.

    x <- x - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)               [7]
    m <- b1 m + (1 - b1) (grad + lambda x),  v <- b2 v + (1 - b2) (grad + lambda x)^2   [8]

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: ignored; accepted because all variants have the same arguments.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m and v. The steps are those of
      `optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(...))`.

    Raises:
      ValueError: if `spheres` is a number; in `update`, if `params` is missing and `weight_decay` is
        not 0.

    >>> tx = so.adam(0.1, weight_decay=1e-4)
    >>> params = {"kernel": jnp.ones(3)}
    >>> updates, state = tx.update({"kernel": jnp.array([1.0, -5.0, 0.2])}, tx.init(params), params)
    >>> updates
    {'kernel': Array([-0.1,  0.1, -0.1], dtype=float32)}

    Source: [7-9]; Kingma and Ba, "Adam: a method for stochastic optimization" (2015).
    """
    reject_number("adam", spheres, "b1 and b2 follow it")
    a = ema(b1, weight_decay=weight_decay, accumulator_dtype=mu_dtype)
    b = rms(b2, eps, weight_decay=weight_decay)
    return optax.chain(quotient(a, b), scale_by_learning_rate(learning_rate))


def adams(
    learning_rate: Scalar,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """Adam w/o (a): one second moment per sphere, which does not deform the gradient.

    Use this when you want to see the effect of the element-wise division, (a), alone.

    v <- b2 v + (1 - b2) ||grad + lambda x||^2 / d per group of d coordinates; m and x as in `adam`

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; all other leaves get `adam`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m, and one number per group.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing and
        `weight_decay` is not 0.

    >>> tx = so.adams(0.1, so.Sphere())
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates  # parallel to the gradient
    {'kernel': Array([[-0.085],
           [-0.113]], dtype=float32)}

    Source: section 4.2 of the paper; "AdamS" in the authors' released code.
    """
    a = ema(b1, weight_decay=weight_decay, accumulator_dtype=mu_dtype)
    b = rms(b2, eps, spheres, weight_decay=weight_decay)
    return optax.chain(quotient(a, b), scale_by_learning_rate(learning_rate))


def adamst(
    learning_rate: Scalar,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """Adam w/o (ab): `adams` with the momentum transported along the sphere.

    Use this when you want to see the effect of (a) and (b) without the ratios of the radii.

    m <- b1 Gamma(m) + (1 - b1) (grad + lambda x)

    Gamma is the parallel transport of m from the last point to this one.

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; all other leaves get `adam`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m, and two numbers per group.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.adamst(0.1, so.Sphere())
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates["kernel"].shape
    (2, 1)

    Source: section 4.2 of the paper; the transport drops the radial part of m.
    """
    a = Ema(
        decay=b1,
        spheres=spheres,
        transport=True,
        weight_decay=weight_decay,
        accumulator_dtype=mu_dtype,
    )
    b = Rms(decay=b2, eps=eps, spheres=spheres, weight_decay=weight_decay)
    return optax.chain(to_transformation(Quotient(a, b)), scale_by_learning_rate(learning_rate))


def adamsrt(
    learning_rate: Scalar,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """Adam w/o (abc): `adamst` with the moments rescaled by the ratio of the radii.

    Use this when weights are normalised: it neutralises (a), (b) and (c), with half of Adam's state.

    x <- x - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)                          [18]
    m_k = b1 (r_{k-1} / r_k) Gamma(m_{k-1}) + (1 - b1) (grad + lambda x)                [19]
    v_k = b2 (r_{k-1} / r_k)^2 v_{k-1} + (1 - b2) ||grad + lambda x||^2 / d             [20]

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; all other leaves get `adam`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      weight_decay: lambda, a number or a schedule.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m, and one number per group: half of Adam's state.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.adamsrt(0.1, so.Sphere())
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates["kernel"].shape
    (2, 1)

    Source: equations [18] to [20] of the paper. As in the authors' released code ("AdamSRT"), the
    transport drops the radial part of m.
    """
    a = Ema(
        decay=b1,
        spheres=spheres,
        transport=True,
        rescale=True,
        weight_decay=weight_decay,
        accumulator_dtype=mu_dtype,
    )
    b = Rms(decay=b2, eps=eps, spheres=spheres, rescale=True, weight_decay=weight_decay)
    return optax.chain(to_transformation(Quotient(a, b)), scale_by_learning_rate(learning_rate))
