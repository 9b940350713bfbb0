"""Table 1 of the paper: effective learning rates and directions in closed form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spherical_optax import geometry
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import divide_or_zero, sqrt
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import as_dtype


class EffectiveStep(NamedTuple):
    """A row of Table 1 in numbers."""

    effective_lr: Any  # eta^e, group-sized, None off the spheres
    direction: Any  # c_perp, tree like the parameters


def effective_sgd(
    params: Any,
    grads: Any,
    learning_rate: jax.typing.ArrayLike,
    spheres: Spheres,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> EffectiveStep:
    r"""Computes the effective learning rate and direction of SGD with L2.

    Use this when you want the formula of Table 1; `image_step` gives the same for any a and b.

    eta^e = eta / (r^2 (1 - eta lambda)),   direction = grad L(u) = r grad L(x)

    These are the rows "SGD" and "SGD + L2" of Table 1. They assume a tangential gradient (Lemma 1).

    Args:
      params: x, tree of arrays.
      grads: grad L(x), tree like `params`, without the L2 term.
      learning_rate: eta.
      spheres: how the leaves split into groups.
      weight_decay: lambda of the L2 term.

    Returns:
      An `EffectiveStep`. Where the radius is 0 the rate is 0.

    Raises:
      ValueError: if `spheres` does not fit `params`.

    >>> x, g = {"w": jnp.array([[2.0], [0.0]])}, {"w": jnp.array([[0.0], [3.0]])}
    >>> so.analysis.effective_sgd(x, g, 0.5, so.Sphere(), weight_decay=0.4).effective_lr
    {'w': Array([[0.156]], dtype=float32)}

    Source: Table 1.
    """
    groups = match(spheres, params)
    radius = geometry.norm(params, groups)
    shrink = 1 - jnp.asarray(learning_rate) * jnp.asarray(weight_decay)
    rate = groups.map_per_group(
        lambda r: divide_or_zero(
            as_dtype(learning_rate, r.dtype), r * r * as_dtype(shrink, r.dtype)
        ),
        radius,
    )
    return EffectiveStep(rate, geometry.scale(grads, radius, groups))


def effective_sgd_momentum(
    params: Any, momentum: Any, learning_rate: jax.typing.ArrayLike, spheres: Spheres
) -> EffectiveStep:
    r"""Computes the effective learning rate and direction of SGD with momentum.

    Use this when you want the formula of Table 1; `image_step` gives the same for any a and b.

    eta^e = (eta / r^2) / (1 - eta <c, u> / r^2),   direction = c_perp,   c = r m

    Args:
      params: x, tree of arrays.
      momentum: m of this step [6], tree like `params`: the `trace` in the state after the update of
        `optax.sgd`, including L2 terms if there are any.
      learning_rate: eta.
      spheres: how the leaves split into groups.

    Returns:
      An `EffectiveStep`. Where the radius is 0 the rate is 0.

    Raises:
      ValueError: if `spheres` does not fit `params`.

    >>> x, m = {"w": jnp.array([[2.0], [0.0]])}, {"w": jnp.array([[1.0], [3.0]])}
    >>> so.analysis.effective_sgd_momentum(x, m, 0.5, so.Sphere()).effective_lr
    {'w': Array([[0.167]], dtype=float32)}

    Source: Table 1.
    """
    groups = match(spheres, params)
    radius = geometry.norm(params, groups)
    ones = groups.map_per_group(jnp.ones_like, radius)
    return _compute_effective_step(params, momentum, ones, radius, learning_rate, groups)


def effective_adam(
    params: Any,
    mu: Any,
    nu: Any,
    count: jax.typing.ArrayLike,
    learning_rate: jax.typing.ArrayLike,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> EffectiveStep:
    r"""Computes the effective learning rate and direction of Adam.

    Use this when you want the formula of Table 1 for moments that you have at hand; `so.track` finds the
    moments and the hyperparameters itself.

    eta^e = (eta / (r nu)) / (1 - eta <c, u> / (r nu)),   direction = c_perp
    nu = r d^{-1/2} ||b||,   c = r a / (b / (d^{-1/2} ||b||))
    a = m / (1 - b1),   b = (1 - b1^t) / (1 - b1) (sqrt(v / (1 - b2^t)) + eps)              [9]

    Args:
      params: x, tree of arrays.
      mu: first moment m of this step, tree like `params`: `mu` in the state after the update.
      nu: second moment v of this step, tree like `params`: `nu` in the state after the update.
      count: t, the number of steps, including this one.
      learning_rate: eta.
      spheres: how the leaves split into groups.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: number that is added outside the root.

    Returns:
      An `EffectiveStep`. Where the radius is 0 the rate is 0.

    Raises:
      ValueError: if `spheres` does not fit `params`.

    >>> x = {"w": jnp.array([[2.0], [0.0]])}
    >>> m, v = {"w": jnp.array([[0.0], [0.1]])}, {"w": jnp.array([[0.001], [0.001]])}
    >>> so.analysis.effective_adam(x, m, v, 1, 0.5, so.Sphere()).effective_lr  # b = 1
    {'w': Array([[0.125]], dtype=float32)}

    Source: Table 1, [9] and [13].
    """
    groups = match(spheres, params)
    radius = geometry.norm(params, groups)
    dtype = jnp.result_type(float)
    t, beta1, beta2 = (jnp.asarray(x, dtype) for x in (count, b1, b2))
    gain, first, second = 1 - beta1, 1 - beta1**t, 1 - beta2**t

    def compute_b(v: jax.Array) -> jax.Array:
        root = jnp.sqrt(v / second.astype(v.dtype)) + as_dtype(eps, v.dtype)
        return (first / gain).astype(v.dtype) * root

    b = groups.map(compute_b, nu)
    rms = groups.map_per_group(sqrt, groups.mean(geometry.dot(b, b, groups)))
    step = groups.map(
        lambda m, b, rms: m / gain.astype(m.dtype) * divide_or_zero(rms, b),
        mu,
        b,
        rms,
    )
    return _compute_effective_step(params, step, rms, radius, learning_rate, groups)


def _compute_effective_step(
    params: Any,
    step: Any,
    rms: Any,
    radius: Any,
    learning_rate: jax.typing.ArrayLike,
    groups: Groups,
) -> EffectiveStep:
    """eta^e = (eta / (r^2 rms)) / (1 - eta <c, u> / (r^2 rms)) with c = r step, and c_perp.

    Args:
      params: x.
      step: a / (b / rms), tree like `params`.
      rms: d^{-1/2} ||b||, group-sized.
      radius: r, group-sized.
      learning_rate: eta.
      groups: spheres matched with `params`.
    """

    def compute_rate(r: jax.Array, rms: jax.Array, step_x: jax.Array) -> jax.Array:
        eta = as_dtype(learning_rate, r.dtype)
        return divide_or_zero(eta, r * r * rms - eta * step_x)  # <c, u> = <step, x>

    rates = groups.map_per_group(compute_rate, radius, rms, geometry.dot(step, params, groups))
    tangent = geometry.project(params, step, groups)
    return EffectiveStep(rates, geometry.scale(tangent, radius, groups))
