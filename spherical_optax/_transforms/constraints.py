"""Transformations that keep the updates tangent to the spheres, or the parameters on them.

Notation: x parameters of one group, r = ||x|| their radius, u = x / r, q the update of the group.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._core.arguments import (
    require_decay,
    require_number,
    require_params,
    require_state,
)
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import (
    divide_or_one,
    is_zero,
    sqrt,
)
from spherical_optax._core.shapes import OfGroups
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import as_dtype, cast_like, correct_bias, drop_missing, mix


def project(spheres: Spheres) -> optax.GradientTransformationExtraArgs:
    """Removes the radial part of the updates: q_perp = q - <q, u> u on every sphere.

    Use this when a chain of your own should take tangential steps: the radial part of a step changes
    the radius, and thereby later effective learning rates, but not the function of the network.

    Args:
      spheres: how the leaves split into groups.

    Returns:
      A stateless `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off
      the spheres, in groups of one coordinate, and where the parameters are zero.

    Raises:
      ValueError: if `spheres` does not fit; in `update`, if `params` is missing.

    >>> tx = so.project(so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates = {"kernel": jnp.array([[5.0], [7.0]])}
    >>> tx.update(updates, tx.init(params), params)[0]
    {'kernel': Array([[0.],
           [7.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        return cast_like(geometry.project(require_params(params), updates, groups), params), state

    return optax.GradientTransformationExtraArgs(
        _make_checking_init(spheres), with_open_boxes(update)
    )


class NormalizeState(NamedTuple):
    """State of `normalize` with a `decay`."""

    MOMENTS = Moments()

    count: jax.typing.ArrayLike  # steps taken, int32
    nu: Any  # running mean of ||q||^2, one number per group


def normalize(
    spheres: Spheres,
    *,
    decay: jax.typing.ArrayLike | None = None,
    at_least: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of each sphere to the length of its radius: q <- r q / ||q||.

    Use this when the learning rate should be the fraction of its radius by which every group moves.

    With `decay` the divisor is no longer the length of this update, but the root of a running mean:

    q <- r q / sqrt(nu / (1 - decay^t)),   nu <- decay nu + (1 - decay) ||q||^2

    An update that is twice as long as usual then remains so, and rare gradients do not turn into full
    steps. With `at_least`, a fraction of the radius, updates are only lengthened:

    q <- max(1, at_least r / l) q,   l the divisor above

    Args:
      spheres: how the leaves split into groups.
      decay: rate of decay of the running mean, in [0, 1); None divides by the length itself.
      at_least: no update is shorter than this part of the radius; None makes all as long as the radius.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off the
      spheres, in groups of one coordinate, and where the parameters or the updates are zero. State: with
      `decay`, one number per group.

    Raises:
      ValueError: if `decay` or `at_least` is no number, or `spheres` does not fit; in `update`, if
        `params` is missing.

    >>> tx = so.normalize(so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates = {"kernel": jnp.array([[30.0], [40.0]])}
    >>> tx.update(updates, tx.init(params), params)[0]
    {'kernel': Array([[1.2],
           [1.6]], dtype=float32)}

    Source: the update of "hyperball" optimizers, r q / ||q|| (see `hyperball`); with `decay` that of
    rotational optimizers, Kosson, Messmer and Jaggi, "Rotational equilibrium: how weight decay balances
    learning across neural networks" (2024).
    """
    if decay is not None:
        require_decay("normalize", decay)
    if at_least is not None:
        require_number("normalize", "at_least", at_least)

    def init(params):
        groups = match(spheres, params).with_tangent_space()
        if decay is None:
            return optax.EmptyState()
        return NormalizeState(jnp.zeros([], jnp.int32), groups.make_zeros(params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        radius = geometry.norm(require_params(params), groups)
        squares = geometry.dot(updates, updates, groups)
        if decay is not None:
            require_state(state, NormalizeState)
            count = optax.safe_increment(state.count)
            nu = mix(squares, groups.read_state("nu", state.nu), decay, 1 - decay)
            state = NormalizeState(count, groups.choose(nu, state.nu))
            squares = correct_bias(drop_missing(squares, nu), decay, count)

        factor = groups.map_per_group(
            functools.partial(compute_length_factor, at_least=at_least), radius, squares
        )
        return cast_like(geometry.scale(updates, factor, groups), params), state

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def compute_length_factor(r: OfGroups, qq: OfGroups, at_least: Any = None) -> OfGroups:
    """r / ||q||, or max(1, at_least r / ||q||); 1 where r or q is zero."""
    factor = divide_or_one(r, sqrt(qq))
    if at_least is not None:
        factor = jnp.maximum(as_dtype(at_least, r.dtype) * factor, 1.0)
    return jnp.where(is_zero(r) | is_zero(sqrt(qq)), 1.0, factor)


def center(spheres: Spheres) -> optax.GradientTransformationExtraArgs:
    """Removes the mean over each group from the updates: q <- q - mean(q).

    Use this when the weights of every filter should keep their mean, as in weight standardisation.
    Unlike `optax.centralize`, whose axes are PyTorch's, it follows `spheres`. Called once on the
    parameters in place of updates, it centres these.

    Args:
      spheres: how the leaves split into groups; the mean is over all coordinates of a group, those in
        tied arrays included.

    Returns:
      A stateless `GradientTransformationExtraArgs`. It leaves updates unchanged off the spheres, and in
      groups of one coordinate.

    Raises:
      ValueError: if `spheres` does not fit.

    >>> tx = so.center(so.Sphere())
    >>> updates = {"kernel": jnp.array([[1.0], [3.0]])}
    >>> tx.update(updates, tx.init(updates))[0]
    {'kernel': Array([[-1.],
           [ 1.]], dtype=float32)}

    Source: Liu, Bernstein, Meister and Yue, "Learning by turning: neural architecture aware
    optimisation" (2021), for the weights; `zero_mean` of rotational optimizers (see `normalize`).
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        mean = groups.mean(groups.sum(lambda q: q, updates))
        centred = groups.map(lambda q, c: q - c, updates, mean)
        return cast_like(centred, params), state

    return optax.GradientTransformationExtraArgs(
        _make_checking_init(spheres), with_open_boxes(update)
    )


def _make_checking_init(spheres: Spheres) -> Callable[..., Any]:
    """Makes an `init` that keeps no state: it only checks that `spheres` fits the parameters."""

    def init(params):
        match(spheres, params)
        return optax.EmptyState()

    return init
