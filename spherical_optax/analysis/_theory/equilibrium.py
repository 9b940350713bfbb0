"""Radius and angle per step at which weight decay and the growth of the radius balance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spherical_optax._core.arguments import reject_schedule


class Equilibrium(NamedTuple):
    """The steady state of a group under weight decay: root mean squares over steps."""

    angle: jax.Array  # of one step, radians
    radius: jax.Array  # ||x||


def sgd_equilibrium(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
    gradient_norm: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike = 0.0,
) -> Equilibrium:
    r"""Computes the equilibrium of SGD with L2 and heavy-ball momentum.

    Use this when you want a radius or an angle to compare a training run with, as in `plot_angles`.

    angle = sqrt(2 eta lambda / (1 + mu)),   radius = (eta G^2 / (2 lambda (1 - mu)))^{1/4}

    This holds for gradients that are noise: orthogonal to x, uncorrelated from step to step, and of root
    mean square length G on the unit sphere. Over time x moves by eta / (1 - mu) times each gradient.
    These moves add eta^2 G^2 / (r^2 (1 - mu)^2) to r^2 per step, and the decay subtracts
    2 eta lambda r^2 / (1 - mu).

    Args:
      learning_rate: eta.
      weight_decay: lambda, the L2 coefficient.
      gradient_norm: G, root mean square of ||grad L(u)|| = r ||grad L(x)||; a number, or an array with
        one number per group. The angle does not depend on it.
      momentum: mu of m <- mu m + grad + lambda x.

    Returns:
      An `Equilibrium`: the angle of one step in radians, and the radius.

    Raises:
      ValueError: if an argument is a schedule, or negative.

    >>> so.analysis.sgd_equilibrium(0.1, 5e-4, gradient_norm=1.0, momentum=0.9)
    Equilibrium(angle=Array(0.007, dtype=float32), radius=Array(5.623, dtype=float32))

    Source: Kosson, Messmer and Jaggi, "Rotational equilibrium: how weight decay balances learning across
    neural networks" (2024); for the angle also Wan et al., "Spherical motion dynamics" (2021), and
    without momentum van Laarhoven, "L2 regularization versus batch and weight normalization" (2017).
    """
    eta, lam, norm, mu = _convert_to_floats(learning_rate, weight_decay, gradient_norm, momentum)
    radius = (eta * norm * norm / (2 * lam * (1 - mu))) ** 0.25
    return Equilibrium(jnp.sqrt(2 * eta * lam / (1 + mu)), radius)


def adamw_equilibrium(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
    size: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
) -> Equilibrium:
    r"""Computes the equilibrium of AdamW, with the same angle for every group, whatever its gradients.

    Use this when you want a radius or an angle to compare a training run with, as in `plot_angles`.

    angle = sqrt(2 eta lambda (1 - b1) / (1 + b1)),   radius = sqrt(eta d / (2 lambda))

    This holds for gradients that are noise, orthogonal to x and uncorrelated from step to step. The d
    coordinates of g / sqrt(v) then have root mean square 1. They add eta^2 d to r^2 per step, and the
    decay subtracts 2 eta lambda r^2.

    Args:
      learning_rate: eta.
      weight_decay: lambda of the decoupled decay, as in `optax.adamw`: x <- x - eta (m / sqrt(v) +
        lambda x).
      size: d, the number of coordinates of a group: kh * kw * in for a filter. The angle does not depend
        on it.
      b1: decay of the first moment.

    Returns:
      An `Equilibrium`: the angle of one step in radians, and the radius.

    Raises:
      ValueError: if an argument is a schedule, or negative.

    >>> so.analysis.adamw_equilibrium(1e-3, 1e-1, size=576)
    Equilibrium(angle=Array(0.003, dtype=float32), radius=Array(1.697, dtype=float32))

    Source: Kosson, Messmer and Jaggi, "Rotational equilibrium: how weight decay balances learning across
    neural networks" (2024).
    """
    eta, lam, d, b1 = _convert_to_floats(learning_rate, weight_decay, size, b1)
    return Equilibrium(jnp.sqrt(2 * eta * lam * (1 - b1) / (1 + b1)), jnp.sqrt(eta * d / (2 * lam)))


def lion_equilibrium(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
    size: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
) -> Equilibrium:
    r"""Computes the equilibrium of Lion, with the same angle for every group, whatever its gradients.

    Use this when you want the angle of a rotational optimizer, or one to compare a training run with.

    angle = sqrt(pi / 2) sqrt(2 eta lambda) s,   radius = eta sqrt(d) / angle,
    s^2 = (1 - b1)^2 + b1^2 (1 - b2) / (1 + b2)

    This holds for gradients that are noise, orthogonal to x and uncorrelated from step to step. Every
    coordinate moves by eta, so a step has the length eta sqrt(d), and s is the length of
    b1 m + (1 - b1) g in units of that of g.

    Args:
      learning_rate: eta.
      weight_decay: lambda of the decoupled decay, as in `optax.lion`.
      size: d, the number of coordinates of a group. The angle does not depend on it.
      b1: the share of the momentum in the sign.
      b2: decay of the momentum.

    Returns:
      An `Equilibrium`: the angle of one step in radians, and the radius.

    Raises:
      ValueError: if an argument is a schedule, or negative.

    >>> so.analysis.lion_equilibrium(1e-4, 1.0, size=576)
    Equilibrium(angle=Array(0.002, dtype=float32), radius=Array(1.142, dtype=float32))

    Source: Kosson, Messmer and Jaggi, "Rotational equilibrium: how weight decay balances learning across
    neural networks" (2024).
    """
    eta, lam, d, b1, b2 = _convert_to_floats(learning_rate, weight_decay, size, b1, b2)
    share = jnp.sqrt((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2))
    angle = jnp.sqrt(jnp.pi * eta * lam) * share
    return Equilibrium(angle, eta * jnp.sqrt(d) / angle)


def _convert_to_floats(*values: jax.typing.ArrayLike) -> list[jax.Array]:
    for x in values:
        reject_schedule("equilibrium", x)
        if not isinstance(x, Tracer) and np.any(np.asarray(x) < 0):
            raise ValueError(f"equilibrium: {x!r} is negative, and there is no equilibrium")
    return [jnp.asarray(x, jnp.result_type(float)) for x in values]
