"""Transformations that keep updates, or the point after them, where the spheres are."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from spherical_optax import geometry
from spherical_optax._core.arguments import require_params
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_one, is_zero, upcast
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like


def project(spheres: Spheres) -> optax.GradientTransformationExtraArgs:
    """Removes the radial part of the updates: q_perp = q - <q, u> u on every sphere.

    Args:
      spheres: how the leaves split into groups.

    Returns:
      A stateless `GradientTransformationExtraArgs` that needs `params`. Off the spheres, in groups of
      one coordinate and where the parameters are zero, updates stay.

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
        groups = match(spheres, updates).with_tangent_space()
        return cast_like(geometry.project(require_params(params), updates, groups), params), state

    return optax.GradientTransformationExtraArgs(_checks(spheres), update)


def normalize(spheres: Spheres) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of each sphere to the length of its radius: q <- r q / ||q||.

    Followed by a learning rate, every group then moves by the same fraction of its radius.

    Args:
      spheres: how the leaves split into groups.

    Returns:
      A stateless `GradientTransformationExtraArgs` that needs `params`. Off the spheres, in groups of
      one coordinate, and where the parameters or the updates are zero, updates stay.

    Raises:
      ValueError: if `spheres` does not fit; in `update`, if `params` is missing.

    >>> tx = so.normalize(so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates = {"kernel": jnp.array([[30.0], [40.0]])}
    >>> tx.update(updates, tx.init(params), params)[0]
    {'kernel': Array([[1.2],
           [1.6]], dtype=float32)}

    Source: the update of "hyperball" optimizers, r q / ||q||.
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match(spheres, updates).with_tangent_space()
        factor = groups.map_per_group(
            lambda r, q: jnp.where(is_zero(r), 1.0, divide_or_one(r, q)),
            geometry.norm(require_params(params), groups),
            geometry.norm(updates, groups),
        )
        return cast_like(geometry.scale(updates, factor, groups), params), state

    return optax.GradientTransformationExtraArgs(_checks(spheres), update)


def _checks(spheres: Spheres) -> Callable[..., Any]:
    """Nothing to keep, but what does not fit is said at once."""

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
    """Changes the updates so that the point after `apply_updates` has the wanted radius.

    x + q <- R (x + q) / ||x + q||, so it belongs at the end of a chain, after the learning rate.

    Args:
      spheres: how the leaves split into groups.
      radius: R. "current" keeps whatever the radius is before the step; "initial" the radius at `init`,
        kept in the state, which does not drift in low precision; or a number.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. Off the spheres, in groups of one
      coordinate, and where x, x + q or R is zero, updates stay.

    Raises:
      ValueError: if `radius` is none of these, if `spheres` does not fit; in `update`, if `params` is
        missing.

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
        return RetractState(groups.as_state(geometry.norm(params, groups)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match(spheres, updates).with_tangent_space()
        wanted: Any = None if isinstance(radius, str) else radius
        if keep:
            # Zero-initialised filters keep the first radius that they get.
            wanted = groups.map_per_group(
                lambda kept, now: jnp.where(is_zero(kept), now, kept),
                state.kept,
                geometry.norm(require_params(params), groups),
            )
            state = RetractState(groups.as_state(wanted, state.kept))
        # In at least float32 until the very end: a step in low precision rounds once.
        point = jax.tree.map(upcast, require_params(params))
        target = geometry.retract(point, updates, groups, wanted)
        if wanted is not None:
            target = _against_rounding(target, params, groups)
        step = groups.map(lambda x, q, y: y - x, params, updates, target, off=lambda x, q, _: q)
        return cast_like(step, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_radius(radius: Any) -> bool:
    if isinstance(radius, str):
        return radius in ("current", "initial")
    if radius is None or isinstance(radius, bool) or callable(radius) or np.ndim(radius):
        return False
    return isinstance(radius, Tracer) or 0 < float(radius) < float("inf")


def _against_rounding(target: Any, params: Any, groups: Groups) -> Any:
    """Scales the target for what low precision will make of it, where that brings it nearer.

    A small change of the radius is less than half a unit in the last place of every coordinate. If
    all of them round it away the radius drifts: in bfloat16 by more than 1e-3.
    """

    def coarse(x):
        dtype = jnp.result_type(x)
        return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4

    if not any(map(coarse, jax.tree.leaves(params))):
        return target

    def landed(x, y):
        """x + (y - x) as `optax.apply_updates` adds in the dtype of x; no compiler may skip this."""
        if not coarse(x):
            return y
        kind = jnp.finfo(x.dtype)
        rounded = functools.partial(
            jax.lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=kind.nmant
        )
        return rounded(upcast(x) + rounded(y - upcast(x)))

    def length(tree):
        return geometry.norm(jax.tree.map(landed, params, tree), groups)

    goal, first = geometry.norm(target, groups), length(target)
    factor = groups.map_per_group(divide_or_one, goal, first)
    second = length(geometry.scale(target, factor, groups))
    factor = groups.map_per_group(
        lambda r, a, b, f: jnp.where(jnp.abs(b - r) < jnp.abs(a - r), f, 1.0),
        *(goal, first, second, factor),
    )
    return geometry.scale(target, factor, groups)
