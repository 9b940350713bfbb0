r"""Geometry of the unit sphere of every group, on trees.

Notation of the paper: x in R^d a group of parameters, r = ||x||, u = x / r, and q_perp = q - <q, u> u
the tangential part at u of a vector q. `spheres` says how each leaf splits into groups (see
`spherical_optax.Sphere`); sums over a group are taken in at least float32, and what is returned per
group has the shape of the parameter with the summed axes kept at length 1, so `(1, 1, 1, out)` for a
`(kh, kw, in, out)` kernel. Leaves off the spheres are flat space: nothing to project or transport there.

Everything is safe at zero, in value and in gradient: a group of radius 0 has no direction, and is
left as it is. Squares are summed, so in float32 lengths from about 1e-18 to 1e18 make sense.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import divide_or_one, divide_or_zero, is_zero, sqrt, upcast
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


def dot(x: Any, y: Any, spheres: Spheres) -> Any:
    """Inner product <x, y> within each group.

    Args:
      x: tree of arrays.
      y: tree like `x`.
      spheres: how the leaves split into groups.

    Returns:
      A group-sized tree: keepdims shapes, at least float32, None off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> x = {"w": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> dot(x, x, so.Sphere())
    {'w': Array([[25.,  4.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    return match(spheres, x).sum(lambda a, b: a * b, x, y)


def norm(x: Any, spheres: Spheres) -> Any:
    """Radius r = ||x|| of each group; its gradient at 0 is 0.

    Args and returns as for `dot`.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> norm({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, so.Sphere())
    {'w': Array([[5., 0.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, x)
    return groups.map_per_group(sqrt, dot(x, x, groups))


def scale(x: Any, factors: Any, spheres: Spheres) -> Any:
    """Multiplies each group by a number of its own: `factors` is group-sized.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> x = {"w": jnp.ones((2, 2))}
    >>> scale(x, {"w": jnp.array([[2.0, 3.0]])}, so.Sphere())
    {'w': Array([[2., 3.],
           [2., 3.]], dtype=float32)}
    """
    return match(spheres, x).map(lambda a, f: f * a, x, factors)


def direction(x: Any, spheres: Spheres) -> Any:
    """Point on the unit sphere u = x / r; a zero group stays zero.

    Returns:
      A tree like `x`; leaves off the spheres unchanged.

    Raises:
      ValueError: if `spheres` does not fit `x`.

    >>> direction({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, so.Sphere())
    {'w': Array([[0.6, 0. ],
           [0.8, 0. ]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, x)
    return scale(x, groups.map_per_group(lambda r: divide_or_one(1.0, r), norm(x, groups)), groups)


def project(point: Any, vectors: Any, spheres: Spheres) -> Any:
    """Tangential part q_perp = q - <q, u> u of `vectors` at `point`, which may have any radius.

    Args:
      point: tree of parameters x.
      vectors: tree of vectors q, like `point`.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `vectors`; unchanged where `point` is zero and off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `vectors`.

    >>> x = {"w": jnp.array([[2.0], [0.0]])}
    >>> project(x, {"w": jnp.array([[5.0], [7.0]])}, so.Sphere())
    {'w': Array([[0.],
           [7.]], dtype=float32)}

    Source: section 2.1 of the paper.
    """
    groups = match(spheres, vectors)
    qx, xx = dot(vectors, point, groups), dot(point, point, groups)
    return groups.map(lambda q, x, qx, xx: q - divide_or_zero(qx, xx) * x, vectors, point, qx, xx)


def transport(start: Any, end: Any, vectors: Any, spheres: Spheres) -> Any:
    r"""Parallel transport of the tangential part of `vectors` along the great circle.

    Gamma_u^w(m) = m - <m, w> / (1 + <u, w>) (u + w) for m tangent at u (section 4.2), with u and w the
    directions of `start` and `end`. The radial part at `start` is dropped: it says nothing about the
    function. The optimizers do not need this: see `spherical_optax.ema` for what they do instead.

    Args:
      start: tree of points, of any radius.
      end: tree of points, of any radius.
      vectors: tree of vectors at `start`.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `vectors`, tangent at `end`, of the length of the tangential part. Unchanged where
      either point is zero and off the spheres. At antipodes, where every great circle is shortest,
      the tangential part itself.

    Raises:
      ValueError: if `spheres` does not fit `vectors`.

    >>> u, w = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [2.0]])}
    >>> transport(u, w, {"w": jnp.array([[0.0], [3.0]])}, so.Sphere())
    {'w': Array([[-3.],
           [ 0.]], dtype=float32)}

    Source: section 4.2 and appendix D.2 of the paper.
    """
    groups = match(spheres, vectors)
    u, w = _unit(start, groups), _unit(end, groups)
    both = groups.map(lambda a, b: a + b, u, w)
    tangent = project(u, _float(vectors), groups)
    # <m, w> = <m, u + w> and 1 + <u, w> = ||u + w||^2 / 2, which keeps its digits near the antipode.
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


def exp(point: Any, velocity: Any, spheres: Spheres) -> Any:
    """Exponential map Exp_u(v) = cos(||v||) u + sin(||v||) v / ||v||: where the geodesic ends.

    Args:
      point: tree of points u on the unit spheres.
      velocity: tree of tangent vectors v, lengths in radians.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `point`; `point + velocity` off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `point`.

    >>> u, v = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [jnp.pi / 2]])}
    >>> exp(u, v, so.Sphere())
    {'w': Array([[-0.],
           [ 1.]], dtype=float32)}

    Source: Theorem 2, [10].
    """
    groups = match(spheres, point)
    length = norm(velocity, groups)
    sinc = groups.map_per_group(lambda n: divide_or_one(jnp.sin(n), n), length)
    return groups.map(
        lambda u, v, n, s: jnp.cos(n) * u + s * v, point, velocity, length, sinc, off=_straight
    )


def log(start: Any, end: Any, spheres: Spheres) -> Any:
    """Velocity at the direction of `start` whose geodesic reaches that of `end` at time 1.

    log_u(w) = theta (w - <w, u> u) / ||w - <w, u> u|| with theta the angle between them, in radians.

    Args:
      start: tree of points, of any radius.
      end: tree of points, of any radius.
      spheres: how the leaves split into groups.

    Returns:
      A tree like `start`, tangent there; zero where a point is zero, and at antipodes, where it is not
      determined; `end - start` off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `start`.

    >>> u, w = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [2.0]])}
    >>> log(u, w, so.Sphere())
    {'w': Array([[0.   ],
           [1.571]], dtype=float32)}

    Source: the inverse of the exponential map of Theorem 2, [10].
    """
    groups = match(spheres, start)
    u, w = _unit(start, groups), _unit(end, groups)
    tangent = project(u, w, groups)
    factor = groups.map_per_group(divide_or_one, angle(start, end, groups), norm(tangent, groups))
    velocity = scale(tangent, factor, groups)
    return groups.map(lambda _, v, w: v, start, velocity, end, off=lambda x, _, y: y - x)


def retract(point: Any, velocity: Any, spheres: Spheres, radius: Any = None) -> Any:
    """The straight step brought back to the sphere: R (x + v) / ||x + v||.

    Args:
      point: tree of points x, of any radius.
      velocity: tree of vectors v.
      spheres: how the leaves split into groups.
      radius: R, a number or a group-sized tree; None keeps ||x||.

    Returns:
      A tree like `point`. A group stays at x + v where x, x + v or R is zero, and off the spheres.

    Raises:
      ValueError: if `spheres` does not fit `point`.

    >>> x, v = {"w": jnp.array([[3.0], [0.0]])}, {"w": jnp.array([[0.0], [4.0]])}
    >>> retract(x, v, so.Sphere(), radius=10.0)
    {'w': Array([[6.],
           [8.]], dtype=float32)}

    Source: the second line of AdamG*, section 3.2 of the paper.
    """
    groups = match(spheres, point)
    before = norm(point, groups)
    if radius is None:
        radius = before
    elif jax.tree_util.all_leaves([radius]) and jnp.ndim(radius) == 0:
        radius = groups.map_per_group(lambda r: jnp.full_like(r, radius), before)
    after = groups.sum(lambda x, v: jnp.square(x + v), point, velocity)
    factor = groups.map_per_group(
        lambda wanted, r, yy: jnp.where(
            is_zero(wanted) | is_zero(r), 1.0, divide_or_one(wanted, sqrt(yy))
        ),
        radius,
        before,
        after,
    )
    return groups.map(lambda x, v, f: f * (x + v), point, velocity, factor, off=_straight)


def angle(start: Any, end: Any, spheres: Spheres) -> Any:
    """Angle between the directions of two points, 2 atan2(||u - w||, ||u + w||), in radians.

    In this form it keeps its digits for tiny angles and near pi, unlike arccos <u, w>.

    Returns:
      A group-sized tree in [0, pi], None off the spheres; 0 where a point is zero.

    Raises:
      ValueError: if `spheres` does not fit `start`.

    >>> x, y = {"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[1.0], [1e-3]])}
    >>> angle(x, y, so.Sphere())
    {'w': Array([[0.001]], dtype=float32)}

    Source: d_S of section 2.1 of the paper.
    """
    groups = match(spheres, start)
    u, w = _unit(start, groups), _unit(end, groups)
    apart = groups.sum(lambda a, b: jnp.square(a - b), u, w)
    along = groups.sum(lambda a, b: jnp.square(a + b), u, w)

    def of(a, b, uu, ww):
        nowhere = is_zero(uu) | is_zero(ww)
        return jnp.where(nowhere, 0.0, 2 * jnp.arctan2(sqrt(a), jnp.where(nowhere, 1.0, sqrt(b))))

    return groups.map_per_group(of, apart, along, dot(u, u, groups), dot(w, w, groups))


def _float(x: Any) -> Any:
    return jax.tree.map(upcast, x)


def _unit(x: Any, groups: Groups) -> Any:
    """Directions in the precision of the reductions, whatever the dtype of the parameters."""
    return direction(_float(x), groups)


def _straight(x: jax.Array, v: jax.Array | None, *_: Any) -> jax.Array:
    """A step in flat space; none where Equinox has left out the update."""
    return x if v is None else x + jnp.asarray(v, jnp.result_type(x))
