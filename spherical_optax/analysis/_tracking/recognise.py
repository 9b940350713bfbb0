"""Which optimizers have an `a` and a `b` that are known: Adam and SGD, by the moments in their state.

An Optax optimizer is a pair of closures: nothing tells its b1 or eps. But its state names its moments,
and what it does with moments that we choose tells the rest: it is run on a tiny tree of the same
structure, at x = 0. Whether its real updates have the direction of a / b, `track` checks on each.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.groups import ArrayGroups, Groups
from spherical_optax._core.paths import Path, leaves_with_paths
from spherical_optax._core.safe_math import upcast
from spherical_optax._optimizers.adamg_star import MirroredRadiusState
from spherical_optax._optimizers.adamp import TangentialState
from spherical_optax._transforms.constraints import RetractState
from spherical_optax._transforms.momentum import EmaState, TraceState
from spherical_optax._transforms.quotient import QuotientState
from spherical_optax._transforms.second_moment import RmsState

# Moments and gradients of the coordinates of a small group. The first two tell b, for a second moment
# beside which eps does not show and for one beside which it does; the others test it.
_FIRST = (1.0, 1.0, -1.0, 2.0, 1.0, 0.0)
_SECOND = (1.0, 1e-16, 1e-4, 1e-8, 1e-12, 1e-6)
_GRADS = (0.0, 0.0, 0.0, 0.0, 0.0, 1e-2)
_WIDTH = len(_FIRST)

# States whose moments are read, by the names of their fields.
_MOMENTS: dict[type, tuple[str | None, str | None]] = {
    optax.ScaleByAdamState: ("mu", "nu"),
    optax.TraceState: ("trace", None),
    EmaState: ("ema", None),
    TraceState: ("trace", None),
    RmsState: (None, "nu"),
}
# Other states, with the fields whose arrays do not matter. Any other array may be a momentum too, and
# other states, such as that of `optax.apply_if_finite`, may do anything.
_NEUTRAL: dict[type, tuple[str, ...]] = {
    optax.EmptyState: (),
    optax.MaskedNode: (),
    optax.MaskedState: (),
    optax.MultiStepsState: ("acc_grads",),
    optax.transforms.PartitionState: (),
    optax.schedules.InjectHyperparamsState: (),
    optax.schedules.InjectStatefulHyperparamsState: (),
    MirroredRadiusState: ("radius_squared",),
    TangentialState: (),
    RetractState: ("kept",),
    QuotientState: (),
    EmaState: ("kept",),
    TraceState: ("kept",),
}


class Rule(NamedTuple):
    """What the a and b of a leaf are made of."""

    elementwise: bool  # b varies within a group
    momentum: bool  # a is in the state; else it is the gradient
    averaged: bool  # a is m / (1 - b1); else it is m
    node: int  # the part of the state that its moments are in


class Moments(NamedTuple):
    """What a state holds of a and b, by the path of the parameter."""

    first: dict[Path, Any]
    second: dict[Path, Any]  # per coordinate or per group
    averaged: set[Path]
    node: dict[Path, int]


class Response(NamedTuple):
    """Of one leaf: a = m / gain, and b is in proportion to sqrt(v) + eps."""

    gain: Any
    eps: Any


def rules(tx: optax.GradientTransformation, params: Any, groups: Groups) -> list[Rule | None]:
    """For each leaf what its a and b are made of, None where that is not known."""

    def run():
        tiny = _tiny(params, groups)
        return tx.update(tiny, tx.init(tiny), tiny)[1]

    nothing: list[Rule | None] = [None] * len(groups.leaves)
    try:
        real = jax.eval_shape(tx.init, params)
        program, small = jax.make_jaxpr(run, return_shape=True)()
    except Exception:  # it may need the loss, values, or arrays of a certain size
        return nothing
    if program.effects:  # prints and callbacks are for the real tree
        return nothing
    moments = _moments(real)
    # Labels that depend on sizes would treat the tiny tree otherwise.
    if moments is None or jax.tree.structure(real) != jax.tree.structure(small):
        return nothing
    found = [_rule(path, x, moments) for path, x in _leaves(params)]
    for tie in groups.ties:  # a bias may have as many groups as entries; all have one rate, or none
        together = all((rule := found[i]) is None or rule.elementwise for i in tie)
        whole = all(found[i] is not None for i in tie)
        for i in tie:
            rule = found[i]
            found[i] = rule._replace(elementwise=together) if whole and rule else None
    return found


def _if_scalar(own: Any, real: Any) -> Any:
    """The real one if it is one number, in the precision of its place: a parameter may be one too."""
    if jnp.ndim(real):
        return own
    inexact = all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (own, real))
    return jnp.asarray(real, jnp.result_type(own)) if inexact else real


def respond(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    found: list[Rule | None],
    groups: Groups,
) -> list[Response | None]:
    """The `Response` of each leaf at the step and with the hyperparameters of `state`."""
    tiny = _tiny(params, groups)
    grads, first, second = (_tiny(params, groups, v) for v in (_GRADS, _FIRST, _SECOND))
    # Counts, hyperparameters and whatever else is one number are those of the step in question.
    scalars = jax.tree.map(_if_scalar, tx.init(tiny), state)
    updates, after = tx.update(grads, _fill(scalars, first, second), tiny)
    columns = ([x for _, x in _leaves(updates)], *moments_of(after, tiny))

    # The leaves of one Adam have its b1 and eps in common: the others need not be compiled.
    answers: dict[int, Response] = {}
    leaves = zip(found, groups.leaves, _leaves(tiny), *columns, strict=True)
    for rule, leaf, (_, x), q, m, v in leaves:
        if rule is None or rule.node in answers or not rule.momentum or not _axis(leaf, x):
            continue
        axis = _axis(leaf, x)[0]
        v = _along(axis, v) if rule.elementwise else None
        answers[rule.node] = _response(_along(axis, q), _along(axis, m), v, rule.averaged)
    return [answers.get(rule.node, Response(1.0, 0.0)) if rule else None for rule in found]


def _response(q: jax.Array, m: jax.Array, v: jax.Array | None, averaged: bool) -> Response:
    """From the updates of a small group and the moments that they left; NaN if they are not m / b."""
    tolerance = 0.01 + 4 * max(float(jnp.finfo(y.dtype).eps) for y in (q, m))
    gain = 1 - m[0] if averaged else jnp.ones_like(m[0])
    gain, q, m = (upcast(y) for y in (gain, q, m))
    moved = q != 0
    b = m / jnp.where(moved, q, 1)
    if v is None:
        eps, expected = jnp.zeros_like(gain), b[0]
    else:
        # b is a line in sqrt(v), of which only offset over slope matters.
        root = jnp.sqrt(upcast(v)).astype(m.dtype)
        slope = (b[0] - b[1]) / (root[0] - root[1])
        there = slope != 0
        eps = jnp.maximum(b[1] / jnp.where(there, slope, 1) - root[1], 0)
        expected = slope * (root + eps)
    # At a learning rate of 0, nothing tells.
    fits = jnp.all(jnp.abs(q * expected - m) <= tolerance * jnp.abs(m)) | ~jnp.any(moved)
    return Response(jnp.where(fits, gain, jnp.nan), eps)


def moments_of(state: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """First and second moments of a state by leaf of `params`, None where it has none."""
    moments = _moments(state)
    assert moments is not None
    paths = [path for path, _ in _leaves(params)]
    return [moments.first.get(p) for p in paths], [moments.second.get(p) for p in paths]


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    return leaves_with_paths(tree, lambda x: x is None)[0]


def _nodes(state: Any) -> Iterator[Any]:
    """All named tuples of a state, the outer ones first."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        yield state
    if isinstance(state, tuple | list):
        for child in state:
            yield from _nodes(child)
    elif isinstance(state, dict):
        for child in state.values():
            yield from _nodes(child)


def _moments(state: Any) -> Moments | None:
    """None if there is anything in the state that is not understood."""
    moments = Moments({}, {}, set(), {})
    understood = 0
    for number, node in enumerate(_nodes(state)):
        names = _MOMENTS.get(type(node), (None, None))
        neutral = _NEUTRAL.get(type(node), () if node._fields == ("count",) else None)
        if not any(names) and neutral is None:
            return None
        understood += sum(_count(getattr(node, name)) for name in neutral or ())
        for name, into in zip(names, (moments.first, moments.second), strict=True):
            new = dict(_arrays(getattr(node, name))) if name else {}
            if not into.keys().isdisjoint(new):
                return None
            into.update(new)
            understood += _count(new)
            moments.node.update(dict.fromkeys(new, number))
        if isinstance(node, optax.ScaleByAdamState | EmaState):
            moments.averaged.update(path for path, _ in _arrays(getattr(node, names[0] or "")))
    return moments if understood == _count(state) else None


def _count(tree: Any) -> int:
    """How many arrays, numbers aside."""
    return sum(jnp.ndim(x) > 0 for x in jax.tree.leaves(tree))


def _arrays(tree: Any) -> list[tuple[Path, Any]]:
    return [(path, x) for path, x in leaves_with_paths(tree, lambda _: False)[0] if x is not None]


def _rule(path: Path, x: Any, moments: Moments) -> Rule | None:
    v = moments.second.get(path)
    if x is None or (v is not None and path not in moments.first):
        return None
    elementwise = v is not None and jnp.shape(v) == jnp.shape(x)
    node = moments.node.get(path, -1)
    return Rule(elementwise, path in moments.first, path in moments.averaged, node)


def _along(axis: int, x: jax.Array) -> jax.Array:
    """The first of the small groups."""
    return x[tuple(slice(None) if k == axis else 0 for k in range(jnp.ndim(x)))]


def _tiny(params: Any, groups: Groups, values: tuple[float, ...] = (0.0,) * _WIDTH) -> Any:
    """The structure of the parameters and, for each index of a block, one small group of the values."""

    def shape(leaf: ArrayGroups | None, x: Any) -> tuple[int, ...]:
        sizes = [1] * jnp.ndim(x)
        if leaf is not None and leaf.axes and leaf.counts[-1] != leaf.shape[leaf.axes[-1]]:
            sizes[leaf.axes[-1]] = leaf.counts[-1]
        for axis in _axis(leaf, x):
            sizes[axis] = _WIDTH
        return tuple(sizes)

    def filled(leaf: ArrayGroups | None, x: Any) -> jax.Array:
        found = jnp.zeros(shape(leaf, x), jnp.result_type(x))
        for axis in _axis(leaf, x):
            row = [_WIDTH if k == axis else 1 for k in range(jnp.ndim(x))]
            found = found + jnp.asarray(values, found.dtype).reshape(row)
        return upcast(found)

    leaves = groups.treedef.flatten_up_to(params)
    return jax.tree.unflatten(
        groups.treedef,
        [
            None if x is None else filled(leaf, x)
            for leaf, x in zip(groups.leaves, leaves, strict=True)
        ],
    )


def _axis(leaf: ArrayGroups | None, x: Any) -> tuple[int, ...]:
    """The axis along which the small groups extend, if there is one; off the spheres the first."""
    if leaf is None:
        return tuple(range(jnp.ndim(x)))[:1]
    return leaf.summed[:1] if leaf.size > 1 else ()


def _fill(state: Any, first: Any, second: Any) -> Any:
    """The state with other moments: by path, and 1 where there is one for a whole group."""

    def other(tree: Any, values: Any) -> Any:
        by_path = dict(_arrays(values))
        leaves, treedef = leaves_with_paths(tree, lambda _: False)
        found = [
            x
            if x is None or path not in by_path
            else by_path[path].astype(x.dtype)
            if by_path[path].shape == x.shape
            else jnp.ones_like(x)
            for path, x in leaves
        ]
        return jax.tree.unflatten(treedef, found)

    def fill(node: Any) -> Any:
        for name, values in zip(_MOMENTS.get(type(node), ()), (first, second), strict=False):
            node = node._replace(**{name: other(getattr(node, name), values)}) if name else node
        return node

    return jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, tuple(_MOMENTS)))
