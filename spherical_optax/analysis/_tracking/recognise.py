"""Recognises Adam and SGD by the moments in their state, which give the a and the b of their step.

The states of this package declare their moments by `MOMENTS`, and a user's states may do the same (see
`spherical_optax._core.moments`). Optax's states are listed here. The moments alone tell neither b1 nor
eps: `probe` finds these. `measure` then tests whether each update has the direction of a / b.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.groups import Groups
from spherical_optax._core.moments import Moments, get_moments
from spherical_optax._core.paths import Path, list_leaves

# The states of Optax that hold moments.
OPTAX_MOMENTS: dict[type, Moments] = {
    optax.ScaleByAdamState: Moments(average="mu", square="nu"),
    optax.TraceState: Moments(sum="trace"),
}
# The states of Optax that change neither a nor b, and their fields with arrays that may be ignored. An
# array in any other field may be a momentum too. A state of any other class, such as that of
# `optax.apply_if_finite`, may belong to an optimizer that does anything.
OPTAX_NEUTRAL: dict[type, tuple[str, ...]] = {
    optax.EmptyState: (),
    optax.MaskedNode: (),
    optax.MaskedState: (),
    optax.MultiStepsState: ("acc_grads",),
    optax.transforms.PartitionState: (),
    optax.schedules.InjectHyperparamsState: (),
    optax.schedules.InjectStatefulHyperparamsState: (),
}


class Recognised(NamedTuple):
    """What the a and the b of one leaf are made of."""

    elementwise: bool  # b varies within a group: it is sqrt(v) + eps
    has_momentum: bool  # a comes from a moment in the state; if false, a is the gradient
    averaged: bool  # a is m / (1 - b1); if false, a is m
    node: int  # the number of the state that holds the first moment, -1 without one


class FoundMoments(NamedTuple):
    """The moments in a state, by the path of their parameter."""

    first: dict[Path, Any]
    second: dict[Path, Any]  # one number per coordinate or per group
    averaged: set[Path]  # the paths at which the first moment is an average and not a sum
    node: dict[Path, int]


def recognise(state: Any, params: Any, groups: Groups, trust: bool) -> list[Recognised | None]:
    """For each leaf what its a and b are made of, None where that is not known.

    Args:
      state: the optimizer state, or its shapes.
      params: tree of parameters.
      groups: spheres matched with `params`.
      trust: whether states of unknown classes may be present that hold numbers only, and whether
        declared states may hold large arrays that are no moments.
    """
    moments = find_moments(state)
    if moments is None or not _is_understood(state, params, trust):
        return [None] * len(groups.leaves)
    return agree_in_ties(
        [_recognise_leaf(path, x, moments) for path, x in list_leaves(params)], groups
    )


def agree_in_ties(found: list[Recognised | None], groups: Groups) -> list[Recognised | None]:
    """Tied leaves form their groups together, and have one rate or none.

    A bias in a tie may have one entry per group: one second moment per group then has the shape of one
    per coordinate.
    """
    found = list(found)
    for tie in groups.ties:
        elementwise = all((leaf := found[i]) is None or leaf.elementwise for i in tie)
        all_known = all(found[i] is not None for i in tie)
        for i in tie:
            leaf = found[i]
            found[i] = leaf._replace(elementwise=elementwise) if all_known and leaf else None
    return found


def find_moments(state: Any) -> FoundMoments | None:
    """The moments in a state, None if two of a kind belong to one parameter."""
    found = FoundMoments({}, {}, set(), {})
    for number, node in enumerate(_iterate_states(state)):
        names = get_moment_names(node) or Moments()
        for name, into in (
            (names.average, found.first),
            (names.sum, found.first),
            (names.square, found.second),
        ):
            arrays = dict(list_arrays(getattr(node, name))) if name else {}
            if not into.keys().isdisjoint(arrays):
                return None
            into.update(arrays)
            found.node.update(dict.fromkeys(arrays, number))
            if name == names.average:
                found.averaged.update(arrays)
    return found


def get_leaf_moments(state: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """First and second moments in a state, one per leaf of `params`, None where there is none."""
    found = find_moments(state)
    assert found is not None
    paths = [path for path, _ in list_leaves(params)]
    return [found.first.get(p) for p in paths], [found.second.get(p) for p in paths]


def get_moment_names(node: Any) -> Moments | None:
    """The fields of a state that hold moments; None if its class is neither listed nor declares them."""
    names = OPTAX_MOMENTS.get(type(node)) or get_moments(node)
    if not is_state(node) or not isinstance(names, Moments):
        return None
    if missing := [name for name in names if name and name not in node._fields]:
        raise ValueError(
            f"track: MOMENTS of {type(node).__name__} names {missing[0]!r}, which is none of its fields "
            f"{', '.join(node._fields)}"
        )
    return names


def list_arrays(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths, without those that are None."""
    return [(path, x) for path, x in list_leaves(tree, lambda _: False) if x is not None]


def _recognise_leaf(path: Path, x: Any, moments: FoundMoments) -> Recognised | None:
    v = moments.second.get(path)
    if x is None or (v is not None and path not in moments.first):
        return None
    elementwise = v is not None and jnp.shape(v) == jnp.shape(x)
    node = moments.node.get(path, -1)
    return Recognised(elementwise, path in moments.first, path in moments.averaged, node)


def is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _iterate_states(state: Any) -> Iterator[Any]:
    """Yields all named tuples in a state, each before those inside it."""
    if is_state(state):
        yield state
    if isinstance(state, tuple | list):
        for child in state:
            yield from _iterate_states(child)
    elif isinstance(state, dict):
        for child in state.values():
            yield from _iterate_states(child)


def _is_understood(state: Any, params: Any, trust: bool) -> bool:
    """Whether every array in the state is a moment, or cannot be one."""
    understood = 0
    for node in _iterate_states(state):
        names = get_moment_names(node)
        if names is None:
            neutral = OPTAX_NEUTRAL.get(type(node), () if node._fields == ("count",) else None)
            if neutral is None and not trust:
                return False
            understood += sum(_count_arrays(getattr(node, name)) for name in neutral or ())
            continue
        for name in node._fields:
            if name in names:
                understood += _count_arrays(getattr(node, name))
            elif trust or _is_small(getattr(node, name), params):
                understood += len(_list_own_arrays(getattr(node, name)))
    return understood == _count_arrays(state)


def _count_arrays(tree: Any) -> int:
    """The number of arrays in a tree; plain numbers do not count."""
    return sum(jnp.ndim(x) > 0 for x in jax.tree.leaves(tree))


def _list_own_arrays(field: Any) -> list[Any]:
    """The arrays in a field of a state, without those in states inside it."""
    leaves = jax.tree.leaves(field, is_leaf=is_state)
    return [x for x in leaves if not is_state(x) and jnp.ndim(x) > 0]


def _is_small(field: Any, params: Any) -> bool:
    """Whether the arrays of a field hold fewer numbers than the parameters, such as one per group.

    Arrays as large as the parameters may be a momentum: an inner transformation may keep it in a bare
    tree, such as the b of `so.quotient(a, b)`.
    """
    numbers = _count_numbers(_list_own_arrays(field))
    return numbers == 0 or numbers < _count_numbers(jax.tree.leaves(params))


def _count_numbers(arrays: list[Any]) -> int:
    return sum(math.prod(jnp.shape(x)) for x in arrays)
