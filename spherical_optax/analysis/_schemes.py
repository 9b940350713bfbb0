"""Which optimizers have an `a` and a `b` that are known: Adam and SGD, by the moments in their state.

An Optax optimizer is a pair of closures: nothing tells its b1 or eps. But its state names its moments,
and what it does with moments that we choose tells the rest: it is run on a tiny tree of the same
structure, with m = 1, no gradient and x = 0. Whether its real updates are then what a and b say, `track`
checks on each.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _adamg_star, _constraints, _momentum, _quotient
from spherical_optax._groups import Groups, Leaf, accurate
from spherical_optax._spheres import Path, named_leaves

_TINY = 1e-16  # a second moment beside which eps shows
_WIDTH = 3  # coordinates of a small group

# States beside the moments. Others, such as that of `optax.apply_if_finite`, may do anything.
_NEUTRAL = (
    optax.EmptyState,
    optax.MaskedNode,
    optax.MaskedState,
    optax.MultiStepsState,
    optax.transforms.PartitionState,
    optax.schedules.InjectHyperparamsState,
    optax.schedules.InjectStatefulHyperparamsState,
    _adamg_star.MirroredRadiusState,
    _constraints.RetractState,
    _quotient.QuotientState,
)


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
    real = jax.eval_shape(tx.init, params)
    moments = _moments(real)
    try:
        program, small = jax.make_jaxpr(run, return_shape=True)()
    except Exception:  # it may need the loss, or arrays of a certain size
        return nothing
    if program.effects:  # prints and callbacks are for the real tree
        return nothing
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


def respond(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    found: list[Rule | None],
    groups: Groups,
) -> list[Response | None]:
    """The `Response` of each leaf at the step and with the hyperparameters of `state`."""
    tiny = _tiny(params, groups)
    # Counts, hyperparameters and whatever else is one number are those of the step in question.
    scalars = jax.tree.map(lambda t, s: s if jnp.ndim(s) == 0 else t, tx.init(tiny), state)

    def run(v: float) -> list[Any]:
        def full(value: float) -> Callable[[Any], Any]:
            return lambda tree: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)

        updates, after = tx.update(tiny, _fill(scalars, full(1.0), full(v)), tiny)
        columns = ([x for _, x in _leaves(updates)], *moments_of(after, tiny))
        return [tuple(map(_corner, triple)) for triple in zip(*columns, strict=True)]

    usual, small = run(1.0), run(_TINY)
    # The leaves of one Adam have its b1 and eps in common: the others need not be compiled.
    first: dict[int, Response] = {}
    for rule, (q, m, v), (q_small, _, v_small) in zip(found, usual, small, strict=True):
        if rule is None or rule.node in first or not rule.momentum:
            continue
        gain = 1 - m if rule.averaged else jnp.ones_like(m)
        eps = jnp.zeros_like(gain)
        if v is not None and rule.elementwise:
            # m / q at two v: a line in sqrt(v), of which only offset over slope matters.
            still = (q == 0) | (q_small == 0)
            b, b_small = (m / jnp.where(still, 1, y.astype(m.dtype)) for y in (q, q_small))
            root, root_small = (jnp.sqrt(y.astype(m.dtype)) for y in (v, v_small))
            slope = (b - b_small) / (root - root_small)
            eps = b_small / jnp.where(still, 1, slope) - root_small
            eps = jnp.where(still, 0, jnp.maximum(eps, 0))
        first[rule.node] = Response(gain, eps)
    return [first.get(rule.node, Response(1.0, 0.0)) if rule else None for rule in found]


def moments_of(state: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """First and second moments of a state by leaf of `params`, None where it has none."""
    moments = _moments(state)
    assert moments is not None
    paths = [path for path, _ in _leaves(params)]
    return [moments.first.get(p) for p in paths], [moments.second.get(p) for p in paths]


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    return named_leaves(tree, lambda x: x is None)[0]


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

    for number, node in enumerate(_nodes(state)):

        def note(into: dict[Path, Any], tree: Any, number: int = number) -> bool:
            new = dict(_arrays(tree))
            twice = not into.keys().isdisjoint(new)
            into.update(new)
            moments.node.update(dict.fromkeys(new, number))
            return twice

        twice = False
        if isinstance(node, optax.ScaleByAdamState):
            twice = note(moments.first, node.mu) or note(moments.second, node.nu)
            moments.averaged.update(path for path, _ in _arrays(node.mu))
        elif isinstance(node, _momentum.EmaState):
            twice = note(moments.first, node.ema)
            moments.averaged.update(path for path, _ in _arrays(node.ema))
        elif isinstance(node, _quotient.RmsState):
            twice = note(moments.second, node.nu)
        elif isinstance(node, optax.TraceState | _momentum.TraceState):
            twice = note(moments.first, node.trace)
        elif not isinstance(node, _NEUTRAL) and node._fields != ("count",):  # a schedule's
            return None
        if twice:
            return None
    return moments


def _arrays(tree: Any) -> list[tuple[Path, Any]]:
    return [(path, x) for path, x in named_leaves(tree, lambda _: False)[0] if x is not None]


def _rule(path: Path, x: Any, moments: Moments) -> Rule | None:
    v = moments.second.get(path)
    if x is None or (v is not None and path not in moments.first):
        return None
    elementwise = v is not None and jnp.shape(v) == jnp.shape(x)
    node = moments.node.get(path, -1)
    return Rule(elementwise, path in moments.first, path in moments.averaged, node)


def _corner(x: Any) -> Any:
    return None if x is None else x[(0,) * jnp.ndim(x)]


def _tiny(params: Any, groups: Groups) -> Any:
    """Zeros with the structure of the parameters and one small group for each index of a block."""

    def shape(leaf: Leaf | None, x: Any) -> tuple[int, ...]:
        sizes = [1] * jnp.ndim(x)
        if leaf is not None and leaf.axes and leaf.counts[-1] != leaf.shape[leaf.axes[-1]]:
            sizes[leaf.axes[-1]] = leaf.counts[-1]
        for axis in _axis(leaf, x):
            sizes[axis] = _WIDTH
        return tuple(sizes)

    leaves = groups.treedef.flatten_up_to(params)
    return jax.tree.unflatten(
        groups.treedef,
        [
            None if x is None else accurate(jnp.zeros(shape(leaf, x), jnp.result_type(x)))
            for leaf, x in zip(groups.leaves, leaves, strict=True)
        ],
    )


def _axis(leaf: Leaf | None, x: Any) -> tuple[int, ...]:
    """The axis along which the small groups extend, if there is one; off the spheres the first."""
    if leaf is None:
        return tuple(range(jnp.ndim(x)))[:1]
    return leaf.summed[:1] if leaf.size > 1 else ()


def _fill(state: Any, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Any:
    """The state with other moments."""

    def fill(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(mu=first(node.mu), nu=second(node.nu))
        if isinstance(node, _momentum.EmaState):
            return node._replace(ema=first(node.ema))
        if isinstance(node, _quotient.RmsState):
            return node._replace(nu=second(node.nu))
        if isinstance(node, optax.TraceState | _momentum.TraceState):
            return node._replace(trace=first(node.trace))
        return node

    kinds = (optax.ScaleByAdamState, optax.TraceState, _momentum.EmaState)
    kinds = (*kinds, _momentum.TraceState, _quotient.RmsState)
    return jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, kinds))
