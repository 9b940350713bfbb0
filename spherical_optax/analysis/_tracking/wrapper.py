"""Sees what any optimizer does on the spheres, and changes nothing in it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from spherical_optax import geometry
from spherical_optax._core.arguments import require_params, require_transformation
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import (
    divide_arrays,
    divide_or_one,
    divide_or_zero,
    sqrt,
    upcast,
)
from spherical_optax._core.sphere import Spheres
from spherical_optax.analysis._theory.one_step import radial_cosine
from spherical_optax.analysis._tracking import recognise
from spherical_optax.analysis._tracking.updates_from_state import replay


class TrackState(NamedTuple):
    """State of `track`: trees shaped like the parameters, None off the spheres."""

    inner_state: optax.OptState
    calls: jax.typing.ArrayLike  # of update so far, int32
    step: (
        jax.typing.ArrayLike
    )  # the call that was measured last, counted from 1; 0 before the first
    due: jax.typing.ArrayLike  # the call that will be measured next
    radius: Any  # ||x|| before that step
    angle: Any  # moved by it, radians
    effective_lr: Any  # eta^e of it; None where a and b are not known
    radial_cosine: Any  # <q, u> / ||q|| of its update q


def track(
    tx: Any,
    spheres: Spheres,
    *,
    every: int = 1,
    reduce: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps any optimizer and keeps what its steps do on the spheres; the updates stay as they are.

    radius = ||x||,   angle = arctan(eta^e ||c_perp||),   radial_cosine = <q, u> / ||q||
    effective_lr = eta^e = A / (1 - A <c, u>),  A = eta / (r^2 d^{-1/2} ||b||)                  [11]

    The first three are measured from x and the update q alone. The effective learning rate needs the a
    and b of x - eta a / b. It is there for `optax.adam`, `optax.adamw`, `optax.sgd` and the optimizers
    of this package, in chains, masks, partitions, with schedules and `optax.inject_hyperparams`, and
    None for what has other states. b1 and eps are read from how the optimizer responds to moments on a
    tiny tree, eta from the angle. Whenever a step is measured, this response has to be m / (sqrt(v) +
    eps), and each update has to lie along a / b, or its rate is NaN: with Nesterov's momentum, AdaMax,
    `eps_root`, gradients accumulated for SGD, a clip by value. What did not move has 0.

    Read it by name: `optax.tree.get(state, "angle")`, or `so.analysis.summary(state)`, which also works
    if a parameter has the name of a field. Wrap all of the optimizer: what a chain does behind `track`
    is not seen. Around `optax.MultiSteps`, the steps between those that move measure an angle of 0;
    inside it (`optax.MultiSteps(so.track(tx, spheres), 4)`) there are none.

    Args:
      tx: any Optax optimizer.
      spheres: how the leaves split into groups.
      every: measure the first step and then every so many. One that is measured takes a few passes over
        parameters and moments (`python -m benchmarks.speed` measures how long).
      reduce: None keeps one number per group, of keepdims shape; a function such as `jnp.median` keeps
        what it makes of them, one number per leaf.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. State: that of `tx`, and four numbers per
      group.

    Raises:
      ValueError: if `tx` is no optimizer, `every` not a positive integer or `reduce` no function; in
        `init` and `update` if `spheres` does not fit, in `update` if `params` is missing or `state` is
        not of `track`.

    >>> tx = so.track(optax.sgd(0.5), so.Sphere())
    >>> params = {"w": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"w": jnp.array([[0.0], [4.0]])}, tx.init(params), params)
    >>> optax.tree.get(state, "effective_lr"), optax.tree.get(state, "angle")
    ({'w': Array([[0.125]], dtype=float32)}, {'w': Array([[0.785]], dtype=float32)})

    Source: Theorem 2, [11], [12] and [14].
    """
    require_transformation("track", tx, "is no optimizer; write track(optax.adam(1e-3), spheres)")
    if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
        raise ValueError(f"track: every is {every!r}, not a positive integer")
    if reduce is not None and not callable(reduce):
        raise ValueError(f"track: reduce is {reduce!r}, not a function such as jnp.median")
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.with_extra_args_support(tx)
    known: dict[Any, list[Any]] = {}

    def rules(params: Any, groups: Groups) -> list[Any]:
        leaves = groups.treedef.flatten_up_to(params)
        key = (groups.treedef, *(x is None or (jnp.shape(x), jnp.result_type(x)) for x in leaves))
        if key not in known:
            known[key] = recognise.rules(inner, params, groups)
        return known[key]

    def radii(params: Any, groups: Groups) -> Any:
        return _reduced(reduce, geometry.norm(params, groups))

    def init(params):
        groups = match(spheres, params)
        inner_state = inner.init(params)
        # Arrays of their own, all of them: one that came twice could not be donated.
        calls, step = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if not groups.leaves:  # a placeholder of `optax.tree.map_params`
            due = jnp.ones([], jnp.int32)
            return TrackState(inner_state, calls, step, due, *(jnp.zeros([]) for _ in range(4)))
        radius = geometry.norm(params, groups)
        # From the parameters, as later: in `jax.shard_map` it then varies over the devices as they do.
        due = 1 + 0 * _moved(radius)
        angle, rate, cosine = (jax.tree.map(jnp.zeros_like, radius) for _ in range(3))
        rate = _only(rate, rules(params, groups), groups)
        kept = [_reduced(reduce, tree) for tree in (radius, angle, rate, cosine)]
        return TrackState(inner_state, calls, step, due, *kept)

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, TrackState):
            raise ValueError(
                f"track: the state is a {type(state).__name__}, not one of so.track; to go on from it, "
                "state = tracked.init(params)._replace(inner_state=state)"
            )
        params = require_params(params)
        groups = match(spheres, params)
        _check_shapes(state.radius, jax.eval_shape(lambda: radii(params, groups)))
        known = rules(params, groups)
        calls = optax.safe_increment(state.calls)
        now: Any = calls >= jnp.asarray(state.due)
        grads, before = updates, state.inner_state

        def look(updates):
            seen = _measure(inner, params, grads, updates, before, inner_state, known, groups)
            # What did not move, say because gradients are still being accumulated, is looked at again.
            due = calls + jnp.where(_moved(seen[1]) > 0, every, 1).astype(jnp.int32)
            return jnp.copy(calls), due, *(_reduced(reduce, tree) for tree in seen)

        updates, inner_state = inner.update(grads, before, params, **extra_args)
        last = state[2:]
        if not isinstance(calls, Tracer):
            seen = look(updates) if now else last
        else:
            # Not the updates themselves: at every step they would have to be in memory.
            again = replay(inner, grads, before, params, **extra_args) or (lambda _: updates)
            seen = jax.lax.cond(now, lambda: look(again(inner_state)), lambda: last)
            updates = _after(seen[1], updates)
        return updates, TrackState(inner_state, calls, *seen)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shapes(found: Any, expected: Any) -> None:
    """Or a condition would say that its branches differ."""
    leaves, old = jax.tree.leaves_with_path(expected), jax.tree.leaves(found)
    if len(leaves) != len(old):
        raise ValueError(
            f"track: the state has {len(old)} parameters on spheres, not the {len(leaves)} that "
            "`spheres` says; make a state with init"
        )
    for (path, leaf), x in zip(leaves, old, strict=True):
        if jnp.shape(x) != leaf.shape:
            raise ValueError(
                f"track: {jax.tree_util.keystr(path, simple=True, separator='/')!r} has radii of shape "
                f"{jnp.shape(x)} in the state, and {leaf.shape} by `spheres`; make a state with init"
            )


def _measure(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    updates: Any,
    before: Any,
    after: Any,
    rules: list[Any],
    groups: Groups,
) -> tuple[Any, Any, Any, Any]:
    """Radius, angle, effective learning rate and radial cosine: group-sized trees."""
    # Who differentiates through a training step does not mean what is measured of it.
    params, grads, updates, before, after = (
        jax.tree.map(_constant, tree) for tree in (params, grads, updates, before, after)
    )
    xs, gs, qs = (groups.treedef.flatten_up_to(tree) for tree in (params, grads, updates))
    n = len(xs)
    found: list[list[Any]] = [[None] * n for _ in range(4)]
    used = [rule for rule, leaf in zip(rules, groups.leaves, strict=True) if leaf is not None]
    firsts: list[Any] = [None] * n
    seconds, responses = list(firsts), list(firsts)
    if any(used):
        firsts, seconds = recognise.moments_of(after, params)
        responses = list(recognise.respond(tx, params, before, rules, groups))
    columns: list[list[Any]] = [xs, gs, qs, firsts, seconds, responses]
    turn: Any = None
    for where, part in groups.parts():
        x, g, q, m, v, response = ([column[i] for i in where] for column in columns)
        rule = rules[where[0]]
        # One array at a time: between its sums it would leave the cache otherwise.
        q = _in(turn, _filled(q, x))
        xx, xq = (part.sum(_product, *pair) for pair in ((x, x), (x, q)))
        radius = part.map_per_group(jnp.sqrt, xx)
        across, length = _tangent(q, x, xq, xx, part)
        angle = part.map_per_group(_angle, length, xq, radius)
        turn = _moved(angle)
        rate: Any = [None] * len(where)
        if rule is not None:
            a = _in(turn, _filled(m if rule.momentum else g, x))
            a = [upcast(y) / _as(s.gain, upcast(y)) for y, s in zip(a, response, strict=True)]
            b = part.map_per_group(jnp.ones_like, radius)
            if rule.elementwise:
                roots = [
                    jnp.sqrt(upcast(y)) + _as(s.eps, upcast(y))
                    for y, s in zip(_in(turn, v), response, strict=True)
                ]
                a = [divide_arrays(y, z.astype(y.dtype)) for y, z in zip(a, roots, strict=True)]
                b = part.map_per_group(sqrt, part.mean(part.sum(jnp.square, roots)))
            tangent, size = _tangent(a, x, part.sum(_product, x, a), xx, part)
            along = part.sum(_product, tangent, across)
            noise = max(
                float(jnp.finfo(y.dtype).eps) for y in (*q, *(z for z in m if z is not None))
            )
            rate = part.map_per_group(
                functools.partial(_rate, noise), along, size, length, radius, b, angle
            )
            turn = _moved(rate)
        total = part.map_per_group(_whole, length, xq, radius)
        cosine = radial_cosine(xq, radius, total, part)
        for column, values in zip(found, (radius, angle, rate, cosine), strict=True):
            for i, value in zip(where, values, strict=True):
                column[i] = value
    return tuple(jax.tree.unflatten(groups.treedef, column) for column in found)  # pyright: ignore


def _constant(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def _filled(leaves: list[Any], like: list[Any]) -> list[Any]:
    """Zeros for the updates that Equinox leaves out."""
    return [jnp.zeros_like(y) if x is None else x for x, y in zip(leaves, like, strict=True)]


def _tangent(y: list[Any], x: list[Any], xy: Any, xx: Any, part: Groups) -> tuple[list[Any], Any]:
    """y_perp and its length: not from ||y||^2, of which too little is left if y is nearly radial."""
    radial = part.map_per_group(divide_or_zero, xy, xx)
    tangent = part.map(lambda y, x, c: y - c * x, y, x, radial)
    return tangent, part.map_per_group(jnp.sqrt, part.sum(jnp.square, tangent))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * y


def _as(value: Any, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, like.dtype)


def _rate(noise: float, along: Any, p: Any, q: Any, radius: Any, b: Any, angle: Any) -> Any:
    """eta^e = tan(angle) / ||c_perp|| with c = r b p [11], where p = a / b and b its root mean square.

    Whatever scales the step or the point besides (a schedule, a clip of the norm, a decoupled decay, a
    retraction) is in the angle. What turns it is not: then a and b are not what the state says, and the
    rate is not known. `p` and `q` are the lengths of the tangential parts, `along` is their product.
    """
    rate = divide_or_zero(jnp.tan(angle), radius * b * p)
    # The sine of the angle between them, against the rounding of the update and the momentum.
    apart = sqrt(jnp.maximum(1 - jnp.square(divide_or_one(along, p * q)), 0.0))
    parallel = (along <= 0) & (apart < 0.01 + 4 * noise)
    return jnp.where((p == 0) | (q == 0), 0.0, jnp.where(parallel, rate, jnp.nan))


def _angle(across: jax.Array, xq: jax.Array, radius: jax.Array) -> jax.Array:
    """Of x + q to x, for q of length `across` beside x, and 0 for what is nowhere on the sphere."""
    there = radius != 0
    along = 1 + divide_or_zero(divide_or_zero(xq, radius), radius)
    return jnp.where(there, jnp.arctan2(across, jnp.where(there, radius, 1.0) * along), 0.0)


def _whole(across: jax.Array, xq: jax.Array, radius: jax.Array) -> jax.Array:
    """||q|| from its two parts."""
    return jnp.hypot(across, divide_or_zero(xq, radius))


def _only(tree: Any, rules: list[Any], groups: Groups) -> Any:
    leaves = groups.treedef.flatten_up_to(tree)
    return jax.tree.unflatten(
        groups.treedef,
        [x if rule is not None else None for x, rule in zip(leaves, rules, strict=True)],
    )


def _reduced(reduce: Callable[[jax.Array], jax.Array] | None, tree: Any) -> Any:
    return tree if reduce is None else jax.tree.map(reduce, tree)


def _moved(angles: Any) -> jax.Array:
    """1 if anything on the spheres has moved, else 0."""
    moved = [jnp.any(angle != 0) for angle in jax.tree.leaves(angles)]
    return jnp.any(jnp.stack(moved)).astype(jnp.int32) if moved else jnp.ones([], jnp.int32)


def _in(turn: Any, tree: Any) -> Any:
    return tree if turn is None else _after(turn, tree)


def _after(n: jax.Array, tree: Any) -> Any:
    """The tree, bit for bit, but not before the integer `n` is known.

    XLA copies what is overwritten in place while it is still to be read, unless the one follows from the
    other. The condition always holds, which only LLVM sees: there the selection is gone.
    """
    always = (n & 1) < 2

    def hold(x: Any) -> Any:
        return jax.lax.select(always, x, jnp.zeros_like(x)) if jnp.ndim(x) else x

    return jax.tree.map(hold, tree)
