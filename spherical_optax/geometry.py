r"""Geometry of the unit sphere of every group, on trees.

Notation of the paper: x in R^d is a group of parameters, r = ||x|| its radius, u = x / r its direction,
and q_perp = q - <q, u> u the tangential part of a vector q at u. `spheres` describes how each leaf
splits into groups (see `spherical_optax.Sphere`).

A group-sized tree has one number per group: the shape of the parameter with the summed axes kept at
length 1, such as `(1, 1, 1, out)` for a `(kh, kw, in, out)` kernel, and None off the spheres. Sums over
a group are taken in at least float32. Leaves off the spheres are flat space: no function projects or
transports there.

Every function is safe at zero, in value and in gradient: a group of radius 0 has no direction, and
stays as it is. Because squares are summed, lengths in float32 have to lie between about 1e-18 and 1e18.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.projection import compute_retraction_factor, remove_radial
from spherical_optax._core.safe_math import divide_or_one, divide_or_zero, is_zero, sqrt, upcast
from spherical_optax._core.shapes import Params, PerGroup
from spherical_optax._core.sphere import Spheres

__all__ = [
    "angle",
    "direction",
    "dot",
    "exp",
    "log",
    "norm",
    "project",
    "retract",
    "scale",
    "transport",
]


def __dir__() -> list[str]:
    """The ten functions, without the modules that they are made with."""
    return __all__


def dot(x: Params, y: Params, spheres: Spheres) -> PerGroup:
    """Inner product <x, y> within each group.

    Use this when you need squared lengths, cosines or radial parts per group.

    Args:
      x: tree of arrays.
      y: tree like `x`.
      spheres: how the leaves split into groups.

    Returns:
      A group-sized tree, in at least float32.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> x = {"w": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> so.geometry.dot(x, x, so.Sphere())
    {'w': Array([[25.,  4.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    return match(spheres, x).sum(lambda a, b: a * b, x, y)


def norm(x: Params, spheres: Spheres) -> PerGroup:
    """Radius r = ||x|| of each group; its gradient at 0 is 0.

    Use this when you want to watch the radii of weights, or the lengths of gradients and steps.

    Args:
      x: tree of arrays.
      spheres: how the leaves split into groups.

    Returns:
      A group-sized tree, in at least float32.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> so.geometry.norm({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, so.Sphere())
    {'w': Array([[5., 0.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, x)
    return groups.map_per_group(sqrt, dot(x, x, groups))


def scale(x: Params, factors: PerGroup, spheres: Spheres) -> Params:
    """Multiplies each group by its own number.

    Use this when you want to change radii or lengths and keep directions.

    Args:
      x: tree of arrays.
      factors: a group-sized tree.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `x`; leaves off the spheres unchanged.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> x = {"w": jnp.ones((2, 2))}
    >>> so.geometry.scale(x, {"w": jnp.array([[2.0, 3.0]])}, so.Sphere())
    {'w': Array([[2., 3.],
           [2., 3.]], dtype=float32)}
    """
    return match(spheres, x).map(lambda a, f: f * a, x, factors)


def direction(x: Params, spheres: Spheres) -> Params:
    """Point on the unit sphere u = x / r; a zero group stays zero.

    Use this when you want to compare weights without their radii.

    Args:
      x: tree of arrays.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `x`; leaves off the spheres unchanged.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> so.geometry.direction({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, so.Sphere())
    {'w': Array([[0.6, 0. ],
           [0.8, 0. ]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, x)
    return scale(x, groups.map_per_group(lambda r: divide_or_one(1.0, r), norm(x, groups)), groups)


def project(point: Params, vectors: Params, spheres: Spheres) -> Params:
    """Tangential part q_perp = q - <q, u> u of `vectors` at `point`.

    Use this when you want the part of a gradient or step that moves the point on its sphere.

    Args:
      point: tree of parameters x, of any radius.
      vectors: tree of vectors q, like `point`.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `vectors`; unchanged where `point` is zero and off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `vectors`.

    >>> x = {"w": jnp.array([[2.0], [0.0]])}
    >>> so.geometry.project(x, {"w": jnp.array([[5.0], [7.0]])}, so.Sphere())
    {'w': Array([[0.],
           [7.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, vectors)
    qx, xx = dot(vectors, point, groups), dot(point, point, groups)
    return groups.map(remove_radial, vectors, point, qx, xx)


def transport(start: Params, end: Params, vectors: Params, spheres: Spheres) -> Params:
    r"""Parallel transport of the tangential part of `vectors` along the great circle.

    Use this when you want to compare tangent vectors at two points, such as gradients of two steps.

    Gamma_u^w(m) = m - <m, w> / (1 + <u, w>) (u + w)

    Here m is tangent at u, and u and w are the directions of `start` and `end`. The radial part at
    `start` is dropped: it has no effect on the function of the network. The optimizers use a projection
    instead, which needs no old parameters: see `spherical_optax.ema`.

    Args:
      start: tree of points, of any radius.
      end: tree of points, of any radius.
      vectors: tree of vectors at `start`.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `vectors`, tangent at `end`, of the length of the tangential part. Vectors are
      unchanged where either point is zero, and off the spheres. At antipodes every great circle is
      shortest: there the result is the tangential part itself.

    Raises:
      ValueError: if `spheres` does not fit `vectors`.

    >>> u, w = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [2.0]])}
    >>> so.geometry.transport(u, w, {"w": jnp.array([[0.0], [3.0]])}, so.Sphere())
    {'w': Array([[-3.],
           [ 0.]], dtype=float32)}

    Source: section 4.2 and appendix D.2 of the paper.
    """
    groups = match(spheres, vectors)
    u, w = _compute_direction(start, groups), _compute_direction(end, groups)
    both = groups.map(lambda a, b: a + b, u, w)
    tangent = project(u, _upcast_tree(vectors), groups)
    # <m, w> = <m, u + w> and 1 + <u, w> = ||u + w||^2 / 2: this form is accurate near the antipode.
    bend = groups.map_per_group(
        lambda mw, ss, uu, ww: jnp.where(
            is_zero(uu) | is_zero(ww), 0.0, divide_or_zero(2 * mw, ss)
        ),
        dot(tangent, both, groups),
        dot(both, both, groups),
        dot(u, u, groups),
        dot(w, w, groups),
    )
    moved = groups.map(lambda m, s, c: m - c * s, tangent, both, bend)
    return groups.map(lambda _, m: m, vectors, moved)


def exp(point: Params, velocity: Params, spheres: Spheres) -> Params:
    """Exponential map Exp_u(v) = cos(||v||) u + sin(||v||) v / ||v||: the end of a geodesic.

    Use this when you want to move a point on the unit sphere by an exact angle.

    Args:
      point: tree of points u on the unit spheres.
      velocity: tree of tangent vectors v; their lengths are angles in radians.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `point`; `point + velocity` off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `point`.

    >>> u, v = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [jnp.pi / 2]])}
    >>> so.geometry.exp(u, v, so.Sphere())
    {'w': Array([[-0.],
           [ 1.]], dtype=float32)}

    Source: Theorem 2 of the paper, equation [10].
    """
    groups = match(spheres, point)
    length = norm(velocity, groups)
    sinc = groups.map_per_group(lambda n: divide_or_one(jnp.sin(n), n), length)
    return groups.map(
        lambda u, v, n, s: jnp.cos(n) * u + s * v, point, velocity, length, sinc, off=_add_step
    )


def log(start: Params, end: Params, spheres: Spheres) -> Params:
    """Velocity of the geodesic that reaches the direction of `end` from that of `start` at time 1.

    Use this when you want the tangent vector between two points; its length is their angle in radians.

    log_u(w) = theta (w - <w, u> u) / ||w - <w, u> u||,  theta the angle between u and w

    Args:
      start: tree of points, of any radius.
      end: tree of points, of any radius.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `start`, tangent there. It is zero where a point is zero, and at antipodes, where the
      velocity is not determined; `end - start` off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `start`.

    >>> u, w = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [2.0]])}
    >>> so.geometry.log(u, w, so.Sphere())
    {'w': Array([[0.   ],
           [1.571]], dtype=float32)}

    Source: the inverse of the exponential map of Theorem 2 of the paper, equation [10].
    """
    groups = match(spheres, start)
    u, w = _compute_direction(start, groups), _compute_direction(end, groups)
    tangent = project(u, w, groups)
    factor = groups.map_per_group(divide_or_one, angle(start, end, groups), norm(tangent, groups))
    velocity = scale(tangent, factor, groups)
    return groups.map(lambda _, v, w: v, start, velocity, end, off=lambda x, _, y: y - x)


def retract(point: Params, velocity: Params, spheres: Spheres, radius: Any = None) -> Params:
    """Takes a straight step and returns to the sphere: R (x + v) / ||x + v||.

    Use this when a straight step, in place of a geodesic, should end at radius R.

    Args:
      point: tree of points x, of any radius.
      velocity: tree of vectors v.
      spheres: how the leaves split into groups.
      radius: R, a number or a group-sized tree; None keeps ||x||.

    Returns:
      A tree like `point`. The result is x + v where x, x + v or R is zero, and off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `point`.

    >>> x, v = {"w": jnp.array([[3.0], [0.0]])}, {"w": jnp.array([[0.0], [4.0]])}
    >>> so.geometry.retract(x, v, so.Sphere(), radius=10.0)
    {'w': Array([[6.],
           [8.]], dtype=float32)}

    Source: the second line of AdamG*, section 3.2 of the paper.
    """
    groups = match(spheres, point)
    xx = dot(point, point, groups)
    before = groups.map_per_group(sqrt, xx)
    radius = before if radius is None else groups.to_per_group(radius, before)
    yy = groups.sum(lambda x, v: jnp.square(x + v), point, velocity)
    factor = groups.map_per_group(compute_retraction_factor, radius, xx, yy)
    return groups.map(lambda x, v, f: f * (x + v), point, velocity, factor, off=_add_step)


def angle(start: Params, end: Params, spheres: Spheres) -> PerGroup:
    """Angle between the directions of two points, 2 atan2(||u - w||, ||u + w||), in radians.

    Use this when you want to know how far a group has turned. Unlike arccos <u, w>, this form is
    accurate for tiny angles and near pi.

    Args:
      start: tree of points, of any radius.
      end: tree of points, of any radius.
      spheres: how the leaves split into groups.

    Returns:
      A group-sized tree of angles in [0, pi]; 0 where a point is zero.

    Raises:
      ValueError: if `spheres` does not fit `start`.

    >>> x, y = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[1.0], [1e-3]])}
    >>> so.geometry.angle(x, y, so.Sphere())
    {'w': Array([[0.001]], dtype=float32)}

    Source: d_S of section 2.1 of the paper.
    """
    groups = match(spheres, start)
    u, w = _compute_direction(start, groups), _compute_direction(end, groups)
    apart = groups.sum(lambda a, b: jnp.square(a - b), u, w)
    along = groups.sum(lambda a, b: jnp.square(a + b), u, w)

    def measure_angle(apart, along, uu, ww):
        undefined = is_zero(uu) | is_zero(ww)
        radians = 2 * jnp.arctan2(sqrt(apart), jnp.where(undefined, 1.0, sqrt(along)))
        return jnp.where(undefined, 0.0, radians)

    return groups.map_per_group(measure_angle, apart, along, dot(u, u, groups), dot(w, w, groups))


def _upcast_tree(x: Any) -> Any:
    return jax.tree.map(upcast, x)


def _compute_direction(x: Any, groups: Groups) -> Any:
    """Computes `direction` in at least float32, whatever the dtype of the parameters."""
    return direction(_upcast_tree(x), groups)


def _add_step(x: jax.Array, v: jax.Array | None, *_: Any) -> jax.Array:
    """Takes a step in flat space, and none if Equinox has left out the update."""
    return x if v is None else x + jnp.asarray(v, jnp.result_type(x))
