"""Splits the effective direction into past gradients and past L2 terms [16-17]."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spherical_optax import geometry
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import divide_or_zero
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import as_dtype


class MomentumParts(NamedTuple):
    """The two parts of c = (c_grad + lambda r^2 c_l2) / (b / (d^{-1/2} ||b||))."""

    c_grad: Any  # past gradients, tree like the parameters
    c_l2: Any  # past points, tree like the parameters


def decompose_momentum(
    params: Sequence[Any], grads: Sequence[Any], decay: jax.typing.ArrayLike, spheres: Spheres
) -> MomentumParts:
    r"""Splits r a, the momentum on the sphere, into past gradients and past L2 terms.

    Use this when you want to know how much of the direction of a step comes from weight decay.

    c_grad = grad L(u_k) + sum_{i<k} beta^{k-i} (r_k / r_i) grad L(u_i)                     [17]
    c_l2   = u_k         + sum_{i<k} beta^{k-i} (r_i / r_k) u_i

    Then r_k a_k = c_grad + lambda r_k^2 c_l2 for a_k = beta a_{k-1} + grad L(x_k) + lambda x_k [4].

    Args:
      params: x_0, ..., x_k: a sequence of trees, the oldest first.
      grads: grad L(x_0), ..., grad L(x_k): a sequence of trees, without the L2 terms.
      decay: beta (b1 of Adam, the momentum of SGD-M).
      spheres: how the leaves split into groups.

    Returns:
      `MomentumParts`, trees like x_k. Off the spheres every radius counts as 1: the parts are the sums
      of beta^{k-i} grad L(x_i) and of beta^{k-i} x_i.

    Raises:
      ValueError: if `params` or `grads` is no sequence or empty, if their lengths differ, or if
        `spheres` does not fit.

    >>> x = [{"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [2.0]])}]
    >>> g = [{"w": jnp.array([[0.0], [3.0]])}, {"w": jnp.array([[1.0], [0.0]])}]
    >>> so.analysis.decompose_momentum(x, g, 0.5, so.Sphere()).c_grad
    {'w': Array([[2.],
           [3.]], dtype=float32)}

    Source: [16-17] and appendix D.1.
    """
    if not all(isinstance(trees, Sequence) for trees in (params, grads)):
        raise ValueError(
            "decompose_momentum: give lists of trees, one of each per step, oldest first"
        )
    if not params or len(params) != len(grads):
        raise ValueError(
            f"decompose_momentum: {len(params)} points and {len(grads)} gradients; "
            "give one of each per step, at least one"
        )
    groups = match(spheres, params[-1])
    radius = geometry.norm(params[-1], groups)
    past_grads, past_points = grads[0], params[0]
    for x, g in zip(params[1:], grads[1:], strict=True):
        past_grads, past_points = (
            jax.tree.map(lambda p, n: as_dtype(decay, jnp.result_type(p)) * p + n, past, now)
            for past, now in ((past_grads, g), (past_points, x))
        )
    # grad L(u_i) = r_i grad L(x_i) cancels every radius in the sums but the last.
    return MomentumParts(
        geometry.scale(past_grads, radius, groups),
        geometry.scale(
            past_points,
            groups.map_per_group(lambda r: divide_or_zero(1.0, r), radius),
            groups,
        ),
    )
