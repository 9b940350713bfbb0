"""Measures one step of any optimizer: radius, angle, effective learning rate and radial cosine."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from spherical_optax._core.compiler_hints import depend_on
from spherical_optax._core.groups import Groups
from spherical_optax._core.projection import remove_radial
from spherical_optax._core.safe_math import (
    divide_arrays,
    divide_or_one,
    divide_or_zero,
    sqrt,
    upcast,
)
from spherical_optax._core.trees import as_dtype
from spherical_optax.analysis._theory.one_step import compute_radial_cosine
from spherical_optax.analysis._tracking.probe import FittedDenominator, Given, fit_denominators
from spherical_optax.analysis._tracking.recognise import Recognised, get_leaf_moments


class TakenStep(NamedTuple):
    """What an optimizer was given at a step, and what it made of it."""

    params: Any
    grads: Any
    updates: Any
    before: Any  # its state
    after: Any


class Measured(NamedTuple):
    """What `track` measures of a step: group-sized trees, None off the spheres."""

    radius: Any
    angle: Any
    effective_lr: Any
    radial_cosine: Any


class _Arrays(NamedTuple):
    """The arrays of one leaf, or of several that are tied: one entry each."""

    x: list[Any]
    g: list[Any]
    q: list[Any]
    first: list[Any]
    second: list[Any]
    fits: list[Any]


class _Motion(NamedTuple):
    """An update q in parts along x and across x: one number per group, but for `tangent`."""

    xx: Any
    xq: Any
    radius: Any
    tangent: list[Any]  # q_perp
    length: Any  # ||q_perp||
    angle: Any


def measure_tracked_step(
    tx: optax.GradientTransformation,
    step: TakenStep,
    recognised: list[Recognised | None],
    groups: Groups,
    given: Given,
) -> Measured:
    """Measures a step of `tx`, array by array.

    The sums over one array wait for those over the array before it. An array then stays in the cache
    between its own sums.
    """
    # Measurements must not contribute to gradients through the training step.
    step = jax.tree.map(_stop_gradient, step)
    columns = _list_arrays(tx, step, recognised, groups, given)
    found = Measured(*([None] * len(groups.leaves) for _ in Measured._fields))
    last: Any = None
    for where, part in groups.parts():
        arrays = _Arrays(*([column[i] for i in where] for column in columns))
        q = _wait_for(last, _fill_with_zeros(arrays.q, arrays.x))
        motion = _measure_motion(arrays.x, q, part)
        last = detect_movement(motion.angle)
        rate: Any = [None] * len(where)
        if (leaf := recognised[where[0]]) is not None:
            rate = _measure_rate(arrays._replace(q=q), motion, leaf, part, last)
            last = detect_movement(rate)
        cosine = _measure_cosine(motion, part)
        values = Measured(motion.radius, motion.angle, rate, cosine)
        for column, of_part in zip(found, values, strict=True):
            for i, value in zip(where, of_part, strict=True):
                column[i] = value
    return Measured(*map(groups.unflatten, found))


def detect_movement(angles: Any) -> jax.Array:
    """1 if any group has moved, else 0."""
    moved = [jnp.any(angle != 0) for angle in jax.tree.leaves(angles)]
    is_traced = any(isinstance(x, Tracer) for x in moved)
    if (
        not is_traced
        and len({x.sharding.device_set == moved[0].sharding.device_set for x in moved}) > 1
    ):
        # Without jit, layers may be on different devices, and JAX combines none of their arrays.
        moved = [jax.device_put(x, moved[0].sharding) for x in moved]
    return jnp.any(jnp.stack(moved)).astype(jnp.int32) if moved else jnp.ones([], jnp.int32)


def _list_arrays(
    tx: optax.GradientTransformation,
    step: TakenStep,
    recognised: list[Recognised | None],
    groups: Groups,
    given: Given,
) -> _Arrays:
    """The arrays of all leaves. Moments are only looked up if any leaf on the spheres needs them."""
    x, g, q = map(groups.list_leaves, step[:3])
    first: list[Any] = [None] * len(x)
    second, fits = list(first), list(first)
    on_spheres = zip(recognised, groups.leaves, strict=True)
    if any(found for found, leaf in on_spheres if leaf is not None):
        first, second = get_leaf_moments(step.after, step.params)
        fits = list(fit_denominators(tx, step.params, step.before, recognised, groups, given))
    return _Arrays(x, g, q, first, second, fits)


def _measure_motion(x: list[Any], q: list[Any], part: Groups) -> _Motion:
    xx, xq = (part.sum(_multiply, *pair) for pair in ((x, x), (x, q)))
    radius = part.map_per_group(jnp.sqrt, xx)
    tangent, length = _take_tangent(q, x, xq, xx, part)
    angle = part.map_per_group(_compute_angle, length, xq, radius)
    return _Motion(xx, xq, radius, tangent, length, angle)


def _measure_rate(
    arrays: _Arrays, motion: _Motion, leaf: Recognised, part: Groups, last: jax.Array
) -> Any:
    """The effective learning rate of each group, from a / b and the angle that was measured."""
    step, b = _compute_step(arrays, motion, leaf, part, last)
    xp = part.sum(_multiply, arrays.x, step)
    tangent, length = _take_tangent(step, arrays.x, xp, motion.xx, part)
    along = part.sum(_multiply, tangent, motion.tangent)
    dtypes = [y.dtype for y in (*arrays.q, *arrays.first) if y is not None]
    noise = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    is_radial = functools.partial(_is_radial, noise)
    return part.map_per_group(
        functools.partial(_compute_rate, noise),
        along,
        length,
        motion.length,
        motion.radius,
        b,
        motion.angle,
        part.map_per_group(is_radial, length, xp, motion.radius),
        part.map_per_group(is_radial, motion.length, motion.xq, motion.radius),
    )


def _compute_step(
    arrays: _Arrays, motion: _Motion, leaf: Recognised, part: Groups, last: jax.Array
) -> tuple[list[Any], Any]:
    """a / b, and d^{-1/2} ||b||, the root mean square of b in each group."""
    fits: list[FittedDenominator] = arrays.fits
    moments = arrays.first if leaf.has_momentum else arrays.g
    moments = _wait_for(last, _fill_with_zeros(moments, arrays.x))
    a = [
        upcast(m) / as_dtype(jnp.where(fit.fits, fit.gain, jnp.nan), upcast(m).dtype)
        for m, fit in zip(moments, fits, strict=True)
    ]
    if not leaf.elementwise:
        return a, part.map_per_group(jnp.ones_like, motion.radius)
    b = [
        jnp.sqrt(upcast(v)) + as_dtype(fit.eps, upcast(v).dtype)
        for v, fit in zip(_wait_for(last, arrays.second), fits, strict=True)
    ]
    step = [divide_arrays(y, z.astype(y.dtype)) for y, z in zip(a, b, strict=True)]
    return step, part.map_per_group(sqrt, part.mean(part.sum(jnp.square, b)))


def _measure_cosine(motion: _Motion, part: Groups) -> Any:
    """<q, u> / ||q||, with ||q|| from its two parts."""

    def compute_length(across: jax.Array, xq: jax.Array, radius: jax.Array) -> jax.Array:
        return jnp.hypot(across, divide_or_zero(xq, radius))

    length = part.map_per_group(compute_length, motion.length, motion.xq, motion.radius)
    return compute_radial_cosine(motion.xq, motion.radius, length, part)


def _compute_rate(
    noise: float,
    along: Any,
    p: Any,
    q: Any,
    radius: Any,
    b: Any,
    angle: Any,
    p_is_radial: Any,
    q_is_radial: Any,
) -> jax.Array:
    """eta^e = tan(angle) / ||c_perp|| with c = r b a / b [11], where b alone is its root mean square.

    The angle accounts for everything else that scales the step or the point: a schedule, a clip of the
    norm, a decoupled decay, a retraction. It cannot account for a turn of the step: an update in another
    direction than a / b shows that the moments in the state do not give a and b. Its rate is NaN.

    Args:
      noise: the rounding of the update and of the momentum, relative.
      along: inner product of the tangential parts of a / b and of the update.
      p: length of the tangential part of a / b.
      q: length of the tangential part of the update.
      radius: ||x||.
      b: d^{-1/2} ||b||.
      angle: radians.
      p_is_radial: whether a / b has no tangential part beyond rounding; the rate is then 0.
      q_is_radial: the same of the update.
    """
    rate = divide_or_zero(jnp.tan(angle), radius * b * p)
    sine = sqrt(jnp.maximum(1 - jnp.square(divide_or_one(along, p * q)), 0.0))
    parallel = (along <= 0) & (sine < _tolerance(noise))
    still = p_is_radial | q_is_radial
    return jnp.where(still, 0.0, jnp.where(parallel | still, rate, jnp.nan))


def _tolerance(noise: float) -> float:
    """The angle, in radians, that an update may turn away from a / b."""
    return 0.01 + 4 * noise


def _is_radial(noise: float, across: Any, xy: Any, radius: Any) -> jax.Array:
    """Whether the tangential part of y, of length `across`, is nothing but rounding.

    Rounding turns the tangential part by noise |<y, u>| / across. A filter without a gradient, which
    weight decay alone moves along its radius, has no other. NaN is not radial.
    """
    along = jnp.abs(divide_or_zero(xy, radius))
    return (across == 0) | (across * _tolerance(noise) <= noise * along)


def _compute_angle(across: jax.Array, xq: jax.Array, radius: jax.Array) -> jax.Array:
    """The angle from x to x + q, for ||q_perp|| = across; 0 where the radius is 0."""
    has_direction = radius != 0
    along = 1 + divide_or_zero(divide_or_zero(xq, radius), radius)
    angle = jnp.arctan2(across, jnp.where(has_direction, radius, 1.0) * along)
    return jnp.where(has_direction, angle, 0.0)


def _take_tangent(
    y: list[Any], x: list[Any], xy: Any, xx: Any, part: Groups
) -> tuple[list[Any], Any]:
    """y_perp and its length.

    The length is summed anew: ||y||^2 minus the radial part has too few digits if y is nearly radial.
    """
    tangent = part.map(remove_radial, y, x, xy, xx)
    return tangent, part.map_per_group(jnp.sqrt, part.sum(jnp.square, tangent))


def _fill_with_zeros(leaves: list[Any], like: list[Any]) -> list[Any]:
    """Puts zeros where Equinox leaves out an update."""
    return [jnp.zeros_like(y) if x is None else x for x, y in zip(leaves, like, strict=True)]


def _wait_for(last: jax.Array | None, tree: Any) -> Any:
    return depend_on(tree, last) if isinstance(last, Tracer) else tree


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * y


def _stop_gradient(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
