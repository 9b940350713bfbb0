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
from spherical_optax._core.arguments import (
    is_constant_zero,
    is_number,
    require_decay,
    require_number,
    require_params,
    require_state,
)
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import (
    divide_or_one,
    is_low_precision,
    is_zero,
    sqrt,
    upcast,
)
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

        def compute_factor(r, qq):
            factor = divide_or_one(r, sqrt(qq))
            if at_least is not None:
                factor = jnp.maximum(as_dtype(at_least, r.dtype) * factor, 1.0)
            return jnp.where(is_zero(r) | is_zero(sqrt(qq)), 1.0, factor)

        factor = groups.map_per_group(compute_factor, radius, squares)
        return cast_like(geometry.scale(updates, factor, groups), params), state

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


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


class RetractState(NamedTuple):
    """State of `retract` with radius "initial"."""

    MOMENTS = Moments()

    kept: optax.Updates  # the radius per group at `init`


def retract(
    spheres: Spheres,
    radius: jax.typing.ArrayLike | Literal["current", "initial"] = "current",
    *,
    outward: jax.typing.ArrayLike = 0.0,
    inward: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Changes the updates so that the parameters have radius R after `apply_updates`.

    Use this when weights should stay on spheres of fixed radius, or near them. It belongs at the end of
    a chain, after the learning rate. With y = x + q,

    y <- (R + c (||y|| - R)) y / ||y||,   c = `outward` where ||y|| > R, else `inward`

    (0, 0) is the retraction, R y / ||y||, and (1, 1) is no constraint. (0, 1) with a number for R keeps
    the weights inside a ball; (0.5, 1) brakes their growth.

    Args:
      spheres: how the leaves split into groups.
      radius: R. "current" is the radius before the step. "initial" is the radius at `init`: the state
        holds it, and it does not drift in low precision. A number is one radius for all groups.
      outward: the part of a step out of the sphere that remains, from 0 to 1.
      inward: the part of a step into the sphere that remains, from 0 to 1.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. It leaves updates unchanged off the
      spheres, in groups of one coordinate, and where x, x + q or R is zero.

    Raises:
      ValueError: if `radius` is neither of the two words nor a positive number, if `outward` or `inward`
        is not in [0, 1], or if `spheres` does not fit the parameters; in `update`, if `params` is
        missing.

    >>> tx = optax.chain(optax.sgd(1.0), so.retract(so.Sphere(), 1.0))
    >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.4], [-0.8]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0.6],
           [0.8]], dtype=float32)}

    Source: the second line of AdamG*, section 3.2 of the paper. With `outward=0.5` and `inward=1.0` it
    is the "radial brake" of NVIDIA's Emerging-Optimizers.
    """
    if not _is_radius(radius):
        raise ValueError(
            f"retract: radius is {radius!r}, not 'current', 'initial' or a positive number"
        )
    for name, part in (("outward", outward), ("inward", inward)):
        require_number("retract", name, part)
        if not _is_part(part):
            raise ValueError(f"retract: {name} is {part!r}, not in [0, 1]")
    strict = is_constant_zero(outward) and is_constant_zero(inward)
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
            require_state(state, RetractState)
            # A filter that starts at zero has no initial radius: it keeps its first radius above zero.
            wanted = groups.map_per_group(
                lambda kept, now: jnp.where(is_zero(kept), now, kept),
                groups.read_state("kept", state.kept),
                geometry.norm(require_params(params), groups),
            )
            state = RetractState(groups.choose(wanted, state.kept))
        # The target is computed in at least float32: a step in low precision is then rounded once.
        point = jax.tree.map(upcast, require_params(params))
        if not strict:
            wanted = _leave_parts(point, updates, groups, wanted, outward, inward)
        target = geometry.retract(point, updates, groups, wanted)
        if wanted is not None:
            target = _compensate_rounding(target, params, groups)
        step = groups.map(lambda x, q, y: y - x, params, updates, target, off=lambda x, q, _: q)
        return cast_like(step, params), state

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def _is_part(part: Any) -> bool:
    return isinstance(part, Tracer) or (jnp.ndim(part) == 0 and 0 <= float(part) <= 1)


def _leave_parts(x: Any, q: Any, groups: Groups, wanted: Any, outward: Any, inward: Any) -> Any:
    """The radii R + c (||x + q|| - R), with R = `wanted`, or ||x|| if that is None."""
    before = geometry.norm(x, groups)
    wanted = before if wanted is None else groups.to_per_group(wanted, before)
    after = groups.sum(lambda x, q: jnp.square(x + q), x, q)

    def leave_part(r, yy):
        y = sqrt(yy)
        part = jnp.where(y > r, as_dtype(outward, r.dtype), as_dtype(inward, r.dtype))
        return r + part * (y - r)

    return groups.map_per_group(leave_part, wanted, after)


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
