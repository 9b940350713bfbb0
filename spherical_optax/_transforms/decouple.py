r"""Directions and magnitudes of the weights, which move at rates of their own: W = U prod_k phi(z_k)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import (
    OTHER_SPHERES,
    require_params,
    require_state,
    require_transformation,
)
from spherical_optax._core.boxes import box_like, open_boxes, with_open_boxes
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.paths import list_leaves
from spherical_optax._core.safe_math import is_zero, upcast
from spherical_optax._core.shapes import Params, PerGroup
from spherical_optax._core.sphere import Spheres

# W and U prod_k phi(z_k) are the same if they differ by less than this many units in the last place.
ROUNDING = 4


class DecoupleState(NamedTuple):
    """State of `decouple`. It declares no moments: those inside are of U and z, and not of W."""

    direction: optax.OptState  # of the optimizer of U
    magnitude: optax.OptState  # of the optimizer of z
    u: Params  # U, None where no gain acts
    z: Any  # for each of the gains a tree with one number per group, in at least float32


def identity(z: jax.Array) -> jax.Array:
    return z


def decouple(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    gains: Sequence[Spheres],
    *,
    phi: Callable[[jax.Array], jax.Array] = identity,
    start: Callable[[Params], tuple[Params, Sequence[PerGroup]]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits weights into directions and magnitudes, and optimizes each: W = U prod_k phi(z_k).

    Use this when the lengths of rows, columns or filters should be learnt at a rate of their own, as in
    weight normalisation, without a change to the network.

    dU = g prod_k phi(z_k),  dz_k = phi'(z_k) <U prod_{j != k} phi(z_j), g>

    g is the gradient of W, and z_k has one number per group of `gains[k]`. `direction` moves U along
    dU, and `magnitude` moves all z along dz. What comes out is the change of W that follows from both.

    The parameters count, and not the state, where both disagree: if W is not U prod_k phi(z_k) up to
    rounding, because a later transformation, a checkpoint or a user has changed it, U becomes W / prod_k
    phi(z_k) before the step.

    Args:
      direction: moves U, learning rate included. It also keeps U where it belongs, as in
        `optax.chain(optax.adam(1e-3), so.retract(so.Sphere(()), "initial"))`.
      magnitude: moves z, learning rate included, as in `optax.adam(1e-3)`. Its parameters are the tuple
        of trees z.
      gains: a tuple with the spheres of every z_k: `(so.Sphere(),)` is one gain per output, and
        `(so.Sphere(), so.Sphere((0,)))` are gains of the columns and the rows of a matrix. Leaves that
        are on none of them are moved by `direction` alone.
      phi: makes a gain of z, element by element, e.g. `jax.nn.softplus`.
      start: takes the parameters and returns (U, (z_1, ...)). None starts with U = W and phi(z_k) = 1.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. State: those of `direction` and
      `magnitude`, U in the dtypes of the parameters, and one number per group for each of the gains.

    Raises:
      ValueError: if `gains` is no tuple of spheres; in `init`, if gains do not fit the parameters, if
        `start` returns other trees, or if there is no `start` and phi is never 1; in `update`, if
        `params` is missing, or the state was made with other gains.

    >>> tx = so.decouple(optax.sgd(0.1), optax.sgd(0.01), (so.Sphere(),))
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> grads = {"kernel": jnp.array([[1.0], [0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> state.z
    ({'kernel': Array([[0.97]], dtype=float32)},)
    >>> updates  # U moves by (-0.1, 0), and z by -0.03
    {'kernel': Array([[-0.187],
           [-0.12 ]], dtype=float32)}

    Source: "magnitude-direction decoupling" (arXiv 2606.25971), with softplus gains of rows and columns;
    AngularMuown (arXiv 2606.23637); Salimans and Kingma, "Weight normalization" (2016).
    """
    move_u, move_z = (
        optax.with_extra_args_support(require_transformation("decouple", tx))
        for tx in (direction, magnitude)
    )
    if not isinstance(gains, tuple | list) or not gains:
        raise ValueError(
            f"decouple: gains is {gains!r}, not a tuple of spheres such as (so.Sphere(),)"
        )

    def init(params):
        x = jax.tree.map(jnp.asarray, open_boxes(params))
        all_groups = [match(spheres, x) for spheres in gains]
        u, z = start(x) if start else (x, _make_unit_gains(phi, all_groups, x))
        z = _check_start(all_groups, x, u, z)
        # A copy, because parameters and state may be donated, and no buffer may be donated twice.
        u = _map(all_groups, lambda u, w: jnp.array(u, w.dtype), u, x, off=lambda _, w: w)
        z = tuple(
            groups.make_state(values, params, off=lambda _: None)
            for groups, values in zip(all_groups, z, strict=True)
        )
        stored = _map(all_groups, lambda u: u, u, off=lambda _: None)
        in_u, in_z = move_u.init(box_like(params, u)), move_z.init(z)
        return DecoupleState(in_u, in_z, all_groups[0].box_state(stored, params), z)

    def update(updates, state, params=None, **extra_args):
        w = jax.tree.map(jnp.asarray, require_params(params))
        all_groups = [match_updates(spheres, updates, w) for spheres in gains]
        z = _read_z(all_groups, require_state(state, DecoupleState).z)
        factors = _compute_factors(phi, all_groups, z)
        gain = _compute_gain(all_groups, factors, w)
        u = _map(all_groups, _take_up, state.u, w, gain, off=lambda _, w, __: w)
        before = _map(all_groups, _multiply, u, gain, off=lambda *_: None)
        du = _map(
            all_groups,
            lambda g, f, u: (upcast(g) * f).astype(u.dtype),
            updates,
            gain,
            u,
            off=lambda g, *_: g,
        )
        dz = []
        for k, groups in enumerate(all_groups):
            others = _compute_gain(all_groups, factors, w, without=k)
            sums = groups.sum(lambda u, f, g: u * f * g, u, others, updates)
            dz.append(groups.map_per_group(lambda z, s: _differentiate(phi, z) * s, z[k], sums))
        u_step, in_u = move_u.update(du, state.direction, u, **extra_args)
        z_step, in_z = move_z.update(tuple(dz), state.magnitude, z, **extra_args)
        u: Any = optax.apply_updates(u, u_step)
        z: Any = optax.apply_updates(z, z_step)
        gain = _compute_gain(all_groups, _compute_factors(phi, all_groups, z), w)
        after = _map(all_groups, _multiply, u, gain, off=lambda *_: None)
        step = _map(
            all_groups,
            lambda _, *points: _compute_step(*points),
            u_step,
            w,
            before,
            after,
            off=lambda step, *_: step,
        )
        stored = _map(all_groups, lambda u, _: u, u, state.u, off=lambda _, before: before)
        z = tuple(
            groups.choose(after, before)
            for groups, after, before in zip(all_groups, z, state.z, strict=True)
        )
        return step, DecoupleState(in_u, in_z, stored, z)

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def _map(all_groups: Sequence[Groups], f: Callable[..., Any], *trees: Any, off: Any) -> Any:
    """Applies f to the leaves on which a gain acts, and `off` to the others."""
    groups = all_groups[0]
    acts = [
        any(each.leaves[i] is not None for each in all_groups) for i in range(len(groups.paths))
    ]
    leaves = zip(acts, *map(groups.list_leaves, trees), strict=True)
    return groups.unflatten([f(*xs) if on else off(*xs) for on, *xs in leaves])


def _compute_factors(
    phi: Callable[[jax.Array], jax.Array], all_groups: Sequence[Groups], z: Sequence[PerGroup]
) -> list[PerGroup]:
    """phi(z_k) for every k."""
    return [groups.map_per_group(phi, values) for groups, values in zip(all_groups, z, strict=True)]


def _compute_gain(
    all_groups: Sequence[Groups],
    factors: Sequence[PerGroup],
    like: Params,
    without: int | None = None,
) -> Params:
    """The product of the factors, for every entry of the arrays, without one of them."""
    gain = _map(all_groups, lambda x: jnp.ones_like(upcast(x)), like, off=lambda _: None)
    for k, (groups, factor) in enumerate(zip(all_groups, factors, strict=True)):
        if k != without:
            gain = groups.map_arrays(lambda x, f: x * f, gain, factor)
    return gain


def _multiply(u: jax.Array, gain: jax.Array) -> jax.Array:
    return upcast(u) * gain


def _compute_step(w: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """From W to U prod_k phi(z_k), and 0 where that has not moved: W may be a rounding off it."""
    return jnp.where(before == after, 0.0, after - upcast(w)).astype(w.dtype)


def _take_up(u: jax.Array, w: jax.Array, gain: jax.Array) -> jax.Array:
    """U, or W / gain where W is another number than U gain: it has then been changed from outside."""
    here, product = upcast(w), _multiply(u, gain)
    rounding = ROUNDING * float(jnp.finfo(w.dtype).eps)
    same = jnp.abs(here - product) <= rounding * jnp.maximum(jnp.abs(here), jnp.abs(product))
    outside = here / jnp.where(is_zero(gain), 1.0, gain)
    return jnp.where(same | is_zero(gain), u, outside.astype(u.dtype))


def _differentiate(phi: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    """phi'(z), element by element."""
    return jax.jvp(phi, (z,), (jnp.ones_like(z),))[1]


def _make_unit_gains(
    phi: Callable[[jax.Array], jax.Array], all_groups: Sequence[Groups], x: Params
) -> list[PerGroup]:
    """z with phi(z) = 1 for every group."""
    unit = _find_unit(phi)
    # Summed rather than made: dtype and sharding are then those of later sums.
    zeros = [groups.sum(lambda x: x, jax.tree.map(jnp.zeros_like, x)) for groups in all_groups]
    return [
        groups.map_per_group(lambda s: s + jnp.asarray(unit, s.dtype), tree)
        for groups, tree in zip(all_groups, zeros, strict=True)
    ]


def _find_unit(phi: Callable[[jax.Array], jax.Array]) -> float:
    """A number z with phi(z) = 1, by bisection."""

    def gap(z: float) -> float:
        with jax.ensure_compile_time_eval():
            return phi(jnp.asarray(z, jnp.result_type(float))).item() - 1.0

    grid = [1.0, *map(float, range(-50, 51))]  # 1 first: identity
    gaps = [gap(z) for z in grid]
    if 0.0 in gaps:
        return grid[gaps.index(0.0)]
    pairs = zip(grid[1:], grid[2:], gaps[1:], gaps[2:], strict=False)
    for low, high, at_low, at_high in pairs:
        if at_low * at_high < 0:
            for _ in range(80):
                middle = (low + high) / 2
                low, high = (middle, high) if gap(middle) * at_low > 0 else (low, middle)
            return (low + high) / 2
    raise ValueError(f"decouple: {phi!r} is 1 nowhere in [-50, 50]; give start")


def _check_start(
    all_groups: Sequence[Groups], x: Params, u: Params, z: Sequence[PerGroup]
) -> list[PerGroup]:
    """z of `start`, in at least float32; raises if U or z do not fit the parameters."""
    if len(z) != len(all_groups):
        raise ValueError(
            f"decouple: start returns {len(z)} trees of magnitudes for {len(all_groups)} gains"
        )

    def check(name: str, path: Any, value: Any, shape: Any) -> None:
        if jnp.shape(value) != shape:
            raise ValueError(
                f"decouple: {name} of start has shape {jnp.shape(value)} at {'/'.join(path)!r}, "
                f"not {shape}"
            )

    found = dict(list_leaves(u))
    for path, w in list_leaves(x):
        if w is not None:
            check("U", path, found.get(path), jnp.shape(w))
    checked = []
    for k, (groups, tree) in enumerate(zip(all_groups, z, strict=True)):
        values = dict(list_leaves(tree))
        for path, leaf in zip(groups.paths, groups.leaves, strict=True):
            if leaf is not None:
                check(f"z[{k}]", path, values.get(path), leaf.group_shape)
        checked.append(
            groups.unflatten(
                [
                    None if leaf is None else upcast(values[path])
                    for path, leaf in zip(groups.paths, groups.leaves, strict=True)
                ]
            )
        )
    return checked


def _read_z(all_groups: Sequence[Groups], z: Sequence[PerGroup]) -> tuple[PerGroup, ...]:
    if len(z) != len(all_groups):
        raise ValueError(
            f"decouple: the state has {len(z)} trees of magnitudes, and there are {len(all_groups)} "
            f"gains: {OTHER_SPHERES}"
        )
    return tuple(
        groups.read_state(f"z[{k}]", tree)
        for k, (groups, tree) in enumerate(zip(all_groups, z, strict=True))
    )
