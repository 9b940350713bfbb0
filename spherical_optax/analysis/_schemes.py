"""Which optimizers have a known `a` and `b`, and how large b is: asked of the optimizer itself.

An Optax optimizer is a pair of closures: nothing tells its learning rate, b1 or eps. But its state names
its moments, and what it does with moments that we choose tells the rest. So it is run on a tiny tree of
the same structure: with m = 1, no gradient and x = 0 its update is -eta a / b, whatever the schedule,
mask, partition or injected hyperparameter. What does not then behave like x - eta a / b on random
moments has no known effective learning rate, whatever its state looks like.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _adamg_star, _constraints, _momentum, _quotient
from spherical_optax._groups import Groups, Leaf, accurate
from spherical_optax._spheres import Path, named_leaves

# Steps at which an optimizer is tried until it moves: schedules may begin at zero, and accumulated
# gradients move it only now and then.
_STEPS = (*range(17), 100, 1000, 10_000, 100_000)
_TINY = 1e-16  # a second moment beside which eps shows
_WIDTH = 3  # coordinates of a group: two tangential ones, so that directions can differ
_AGREE = 0.02  # relative; above the rounding of a momentum in bfloat16

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
    """How the effective learning rate of a leaf is known."""

    elementwise: bool  # b varies within a group
    momentum: bool  # a is in the state; else it is the gradient
    averaged: bool  # a is m / (1 - b1); else it is m
    like: int  # the first leaf that responds the same, from the same moments


class Moments(NamedTuple):
    """What a state holds of a and b, by the path of the parameter."""

    first: dict[Path, Any]
    second: dict[Path, Any]  # per coordinate or per group
    averaged: set[Path]
    node: dict[Path, int]  # in which part of the state


class Response(NamedTuple):
    """Of one leaf: q = -a / (b / eta) - decay x, b / eta = slope sqrt(v) + offset, a = m / gain."""

    slope: jax.Array
    offset: jax.Array
    gain: jax.Array
    decay: jax.Array
    moves: jax.Array


def rules(tx: optax.GradientTransformation, params: Any, groups: Groups) -> list[Rule | None]:
    """For each leaf how its rate is known, None where it is not."""
    try:
        # All of it now, also while the optimizer is being compiled.
        with jax.ensure_compile_time_eval():
            tiny = _tiny(params, groups)
            moments = _moments(jax.eval_shape(tx.init, params))
            if moments is None:
                return [None] * len(groups.leaves)
            found = [_rule(path, x, moments) for path, x in _leaves(params)]
            for tie in groups.ties:  # a bias may have as many groups as entries
                together = all(rule is None or rule.elementwise for rule in (found[i] for i in tie))
                for i in tie:
                    rule = found[i]
                    found[i] = None if rule is None else rule._replace(elementwise=together)
            found = _tested(tx, tiny, found, moments, groups)
    except Exception:  # what cannot be run on a tiny tree is not known; the real one may well run
        return [None] * len(groups.leaves)
    for tie in groups.ties:  # the leaves of one sphere have one rate, or none
        if not all(found[i] for i in tie):
            found = [None if i in tie else rule for i, rule in enumerate(found)]
    return found


def predictable(state: Any, found: list[Rule | None], groups: Groups) -> bool:
    """Whether the updates follow from parameters and moments: Adam, AdamW and SGD-M of Optax."""
    ours = (_momentum.EmaState, _momentum.TraceState, _quotient.RmsState)
    if any(isinstance(node, ours) for node in _nodes(state)):
        return False  # some are followed by a retraction
    on = [rule for rule, leaf in zip(found, groups.leaves, strict=True) if leaf is not None]
    return bool(on) and all(rule is not None and rule.momentum for rule in on)


def respond(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    found: list[Rule | None],
    groups: Groups,
) -> list[Any]:
    """The `Response` of each leaf at the step, schedules and hyperparameters of `state`."""
    # Of leaves that respond the same only the first is asked: XLA drops the others.
    responses = _respond(tx, _tiny(params, groups), state)
    return [None if rule is None else responses[rule.like] for rule in found]


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
    if v is not None and path not in moments.first:
        return None
    elementwise = v is not None and jnp.shape(v) == jnp.shape(x)
    return Rule(elementwise, path in moments.first, path in moments.averaged, like=-1)


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


def _respond(tx: optax.GradientTransformation, tiny: Any, state: Any) -> list[Any]:
    # Counts, hyperparameters and whatever else is one number are those of the step in question.
    scalars = jax.tree.map(lambda t, s: s if jnp.ndim(s) == 0 else t, tx.init(tiny), state)

    def run(m: float, v: float, x: float = 0.0) -> list[tuple[Any, Any, Any]]:
        def full(value: float) -> Callable[[Any], Any]:
            return lambda tree: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)

        updates, after = tx.update(tiny, _fill(scalars, full(m), full(v)), full(x)(tiny))
        first, second = moments_of(after, tiny)
        updates = [x for _, x in _leaves(updates)]
        return [tuple(map(_corner, triple)) for triple in zip(updates, first, second, strict=True)]

    averaged = _moments(scalars)
    assert averaged is not None
    responses: list[Any] = []
    runs = zip(run(1.0, 1.0), run(1.0, _TINY), run(0.0, 1.0, x=1.0), strict=True)
    for (path, x), (usual, small, still) in zip(_leaves(tiny), runs, strict=True):
        if x is None or usual[0] is None:
            responses.append(None)
            continue
        one = jnp.ones((), x.dtype)
        (q, m, v), (q_small, _, v_small), (q_still, m_still, v_still) = usual, small, still
        m, m_still = (one if y is None else y.astype(x.dtype) for y in (m, m_still))
        gain = 1 - m if path in averaged.averaged else one
        moves = q != 0
        b, b_small = (
            jnp.where(moves, -m / gain / jnp.where(moves, y, 1), one) for y in (q, q_small)
        )
        slope, offset = 0 * one, b
        if v is not None:
            root, root_small, root_still = (
                jnp.sqrt(y.astype(x.dtype)) for y in (v, v_small, v_still)
            )
            slope = (b - b_small) / (root - root_small)
            offset = b_small - slope * root_small
            b = slope * root_still + offset
        responses.append(Response(slope, offset, gain, -q_still - m_still / gain / b, moves))
    return responses


def _corner(x: Any) -> Any:
    return None if x is None else x[(0,) * jnp.ndim(x)]


def _tested(
    tx: optax.GradientTransformation,
    tiny: Any,
    found: list[Rule | None],
    moments: Moments,
    groups: Groups,
) -> list[Rule | None]:
    """The rules that hold for random moments, at the first step that moves anything."""
    rng = np.random.default_rng(0)

    def normal(scale: float) -> Callable[[Any], Any]:
        return lambda tree: jax.tree.map(
            lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree
        )

    def positive(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), tree)

    params, grads = normal(1.0)(tiny), normal(1.0)(tiny)
    # The usual moments show what is done with the gradient besides, huge ones a clip of the updates.
    states = [_fill(tx.init(tiny), normal(scale), positive) for scale in (1.0, 1e6)]
    good: list[bool | None] = [None] * len(found)
    answers: list[list[Any]] = [[] for _ in found]
    for step in _STEPS:

        def at(x: Any, step: int = step) -> Any:
            counts = jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.integer)
            return jnp.full_like(x, step) if counts else x

        now: list[list[bool]] = [[] for _ in found]
        for state in (jax.tree.map(at, state) for state in states):
            responses = _respond(tx, tiny, state)
            updates, after = tx.update(grads, state, params)
            trees = [[x for _, x in _leaves(tree)] for tree in (params, grads, updates)]
            columns = zip(
                groups.leaves, found, responses, *trees, *moments_of(after, tiny), strict=True
            )
            for i, (leaf, rule, response, x, *rest) in enumerate(columns):
                answers[i].append(None if response is None else tuple(map(float, response)))
                if rule is None or x is None:
                    now[i].append(x is None)
                    continue
                error, moves = _error(rule, _axis(leaf, x), response, x, *rest)
                if moves:
                    now[i].append(bool(error < _AGREE))
        good = [(all(n) if n else None) if g is None else g for g, n in zip(good, now, strict=True)]
        if None not in good:
            break
    keys = [
        (moments.node.get(path), tuple(answer))
        for (path, _), answer in zip(_leaves(tiny), answers, strict=True)
    ]
    return [
        (rule or Rule(False, False, False, -1))._replace(like=keys.index(key)) if ok else None
        for rule, ok, key in zip(found, good, keys, strict=True)
    ]


def _error(
    rule: Rule,
    axes: tuple[int, ...],
    response: Response | None,
    x: Any,
    g: Any,
    q: Any,
    m: Any,
    v: Any,
) -> tuple[Any, Any]:
    """Relative deviation of an update q, up to a multiple of x, from what the rule says; if it moves."""
    if response is None or q is None:
        return jnp.inf, False
    if not axes:  # one coordinate: there is nothing but multiples of x
        return 0.0, jnp.any(q != 0)
    a = (m if rule.momentum else g).astype(x.dtype) / response.gain
    if rule.elementwise:
        a = a / (response.slope * jnp.sqrt(v.astype(x.dtype)) + response.offset)

    def tangential(y: jax.Array) -> jax.Array:
        dots = [jnp.sum(z * x, axis=axes, keepdims=True) for z in (y, x)]
        return y - dots[0] / dots[1] * x

    a, q = tangential(a), tangential(q)
    scale = -jnp.sum(a * q, axis=axes, keepdims=True) / jnp.sum(a * a, axis=axes, keepdims=True)
    deviation = jnp.max(jnp.abs(q + (1.0 if rule.elementwise else scale) * a))
    size = jnp.max(jnp.abs(q))
    against = jnp.all(scale >= 0)
    return jnp.where(against, deviation / jnp.where(size > 0, size, 1), jnp.inf), size > 0
