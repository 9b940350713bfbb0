"""Transformations that keep the updates tangent to the spheres, or the parameters on them.

Notation: x parameters of one group, r = ||x|| their radius, u = x / r, q the update of the group.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from spherical_optax import geometry
from spherical_optax._core.arguments import is_number, require_params
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_one, is_low_precision, is_zero, upcast
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like


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


def normalize(spheres: Spheres) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of each sphere to the length of its radius: q <- r q / ||q||.

    Use this when the learning rate should be the fraction of its radius by which every group moves.

    Args:
      spheres: how the leaves split into groups.

    Returns:
      A stateless `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off
      the spheres, in groups of one coordinate, and where the parameters or the updates are zero.

    Raises:
      ValueError: if `spheres` does not fit; in `update`, if `params` is missing.

    >>> tx = so.normalize(so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates = {"kernel": jnp.array([[30.0], [40.0]])}
    >>> tx.update(updates, tx.init(params), params)[0]
    {'kernel': Array([[1.2],
           [1.6]], dtype=float32)}

    Source: the update of "hyperball" optimizers, r q / ||q|| (see `hyperball`).
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        factor = groups.map_per_group(
            lambda r, q: jnp.where(is_zero(r), 1.0, divide_or_one(r, q)),
            geometry.norm(require_params(params), groups),
            geometry.norm(updates, groups),
        )
        return cast_like(geometry.scale(updates, factor, groups), params), state

    return optax.GradientTransformationExtraArgs(
        _make_checking_init(spheres), with_open_boxes(update)
    )


def _make_checking_init(spheres: Spheres) -> Callable[..., Any]:
    """Makes an `init` that keeps no state: it only checks that `spheres` fits the parameters."""

    def init(params):
        match(spheres, params)
        return optax.EmptyState()

    return init


class RetractState(NamedTuple):
    """State of `retract` with radius "initial"."""

    MOMENTS = Moments()

    kept: optax.Updates  # the radius per group at `init`


def retract(
    spheres: Spheres, radius: jax.typing.ArrayLike | Literal["current", "initial"] = "current"
) -> optax.GradientTransformationExtraArgs:
    """Changes the updates so that the parameters have radius R after `apply_updates`.

    Use this when weights should stay on spheres of fixed radius. It belongs at the end of a chain, after
    the learning rate: x + q <- R (x + q) / ||x + q||.

    Args:
      spheres: how the leaves split into groups.
      radius: R. "current" is the radius before the step. "initial" is the radius at `init`: the state
        holds it, and it does not drift in low precision. A number is one radius for all groups.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off the
      spheres, in groups of one coordinate, and where x, x + q or R is zero.

    Raises:
      ValueError: if `radius` is neither of the two words nor a positive number, or `spheres` does not
        fit the parameters; in `update`, if `params` is missing.

    >>> tx = optax.chain(optax.sgd(1.0), so.retract(so.Sphere(), 1.0))
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.4], [-0.8]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0.6],
           [0.8]], dtype=float32)}

    Source: the second line of AdamG*, section 3.2 of the paper.
    """
    if not _is_radius(radius):
        raise ValueError(
            f"retract: radius is {radius!r}, not 'current', 'initial' or a positive number"
        )
    keep = isinstance(radius, str) and radius == "initial"

    def init(params):
        groups = match(spheres, params).with_tangent_space()
        if not keep:
            return optax.EmptyState()
        return RetractState(groups.make_state(geometry.norm(params, groups), params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(spheres, updates, params).with_tangent_space()
        wanted: Any = None if isinstance(radius, str) else radius
        if keep:
            # A filter that starts at zero has no initial radius: it keeps its first radius above zero.
            wanted = groups.map_per_group(
                lambda kept, now: jnp.where(is_zero(kept), now, kept),
                groups.read_state("kept", state.kept),
                geometry.norm(require_params(params), groups),
            )
            state = RetractState(groups.choose(wanted, state.kept))
        # The target is computed in at least float32: a step in low precision is then rounded once.
        point = jax.tree.map(upcast, require_params(params))
        target = geometry.retract(point, updates, groups, wanted)
        if wanted is not None:
            target = _compensate_rounding(target, params, groups)
        step = groups.map(lambda x, q, y: y - x, params, updates, target, off=lambda x, q, _: q)
        return cast_like(step, params), state

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def _is_radius(radius: Any) -> bool:
    if isinstance(radius, str):
        return radius in ("current", "initial")
    if isinstance(radius, bool) or not is_number(radius) or jnp.ndim(radius):
        return False
    return isinstance(radius, Tracer) or 0 < float(radius) < float("inf")


def _compensate_rounding(target: Any, params: Any, groups: Groups) -> Any:
    """Rescales the target such that its rounded image has the wanted radius.

    bfloat16 rounds a small change of the radius away in every coordinate, if the change is less than
    half a unit in the last place, and the radius drifts by more than 1e-3. We therefore simulate the
    rounded point, rescale the target by the error of its radius, and keep the new target only in groups
    where its rounded radius is closer.
    """
    if not any(map(is_low_precision, jax.tree.leaves(params))):
        return target

    def measure_rounded(tree):
        return geometry.norm(jax.tree.map(_simulate_step, params, tree), groups)

    def keep_if_closer(wanted, before, after, factor):
        return jnp.where(jnp.abs(after - wanted) < jnp.abs(before - wanted), factor, 1.0)

    wanted, before = geometry.norm(target, groups), measure_rounded(target)
    factor = groups.map_per_group(divide_or_one, wanted, before)
    after = measure_rounded(geometry.scale(target, factor, groups))
    factor = groups.map_per_group(keep_if_closer, wanted, before, after, factor)
    return geometry.scale(target, factor, groups)


def _simulate_step(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + (y - x) as `optax.apply_updates` rounds it in the dtype of x.

    `reduce_precision` stands in for casts, because compilers may skip a cast down and up again.
    """
    if not is_low_precision(x):
        return y
    kind = jnp.finfo(x.dtype)
    round_to_dtype = functools.partial(
        jax.lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=kind.nmant
    )
    return round_to_dtype(upcast(x) + round_to_dtype(y - upcast(x)))
