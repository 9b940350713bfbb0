"""Which optimizers have a known `a` and `b`, and how large b is: asked of the optimizer itself.

An Optax optimizer is a pair of closures: nothing tells its learning rate, b1 or eps. But its state names
its moments, and what it does with moments that we choose tells the rest. So `Scheme` runs it on a tiny
tree of the same structure: with m = 1, no gradient and x = 0 the update is -eta b1 / (1 - b1) / b, for
whatever schedule, mask, partition or injected hyperparameter. What does not then behave like
x - eta a / b on random moments has no known effective learning rate, whatever its state looks like.
"""

from typing import Any, NamedTuple

import optax

from spherical_optax import _adamg_star, _constraints, _momentum, _quotient
from spherical_optax._spheres import Path, named_leaves

# Steps at which an optimizer is tried, until it moves: schedules may begin at zero, and accumulation of
# gradients moves only at its last step.
COUNTS = (*range(17), 100, 1000, 10_000, 100_000)
TINY = 1e-16  # a second moment beside which eps shows
WIDTH = 3  # coordinates of a group: a tangent space of two dimensions shows directions
AGREE = 1e-3  # relative; float32 hyperparameters read from rounded responses reach 1e-5

# States that say nothing about a and b: of wrappers, schedules and retractions.
_NEUTRAL = (
    optax.EmptyState,
    optax.InjectHyperparamsState,
    optax.MaskedState,
    optax.MultiStepsState,
    optax.ScaleByScheduleState,
    optax.WrappedSchedule,
    optax.transforms.PartitionState,
    optax.schedules.InjectStatefulHyperparamsState,
    optax.schedules.WrappedScheduleState,
    _adamg_star.MirroredRadiusState,
    _constraints.RetractState,
    _quotient.QuotientState,
)


class Moments(NamedTuple):
    """What a state holds of a and b, by the paths of the parameters."""

    first: dict[Path, Any]  # m
    second: dict[Path, Any]  # v, per parameter or per group
    averaged: frozenset[Path]  # where m is an average, not a sum: a = m / (1 - b1)


class Rule(NamedTuple):
    """How one leaf gets its effective learning rate; static."""

    elementwise: bool  # b varies within a group
    momentum: bool  # a is in the state; else it is the gradient
    averaged: bool


def read(state: Any) -> Moments | None:
    """The moments of a state, None if anything in it is not understood."""
    first: dict[Path, Any] = {}
    second: dict[Path, Any] = {}
    averaged: set[Path] = set()
    twice: set[Path] = set()

    def note(into: dict[Path, Any], tree: Any) -> list[Path]:
        leaves = [(path, x) for path, x in named_leaves(tree, lambda _: False)[0]]
        twice.update(path for path, _ in leaves if path in into)
        into.update(leaves)
        return [path for path, _ in leaves]

    for node in _nodes(state):
        if isinstance(node, optax.ScaleByAdamState):
            averaged.update(note(first, node.mu))
            note(second, node.nu)
        elif isinstance(node, _momentum.EmaState):
            averaged.update(note(first, node.ema))
        elif isinstance(node, _quotient.RmsState):
            note(second, node.nu)
        elif isinstance(node, optax.TraceState | _momentum.TraceState):
            note(first, node.trace)
        elif not isinstance(node, _NEUTRAL):
            return None
    known = {p: m for p, m in first.items() if p not in twice}
    return Moments(known, second, frozenset(averaged)) if not twice else None
