"""How much a function changes when groups of its parameters are scaled."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._core.matching import match
from spherical_optax._core.sphere import Spheres
from spherical_optax._discovery.random_points import Function

# Groups are scaled at this many random points.
POINTS = 2
# Relative changes of fn up to this are rounding, in float32 and with bfloat16 or float16 on the way.
ROUNDING, LOW_ROUNDING = 1e-3, 0.15
# Every radius is STEP times the one before, from 1. The effect of the eps of a normalisation layer falls
# by STEP^2 from one to the next, and that of a shortcut that is drowned only by STEP.
STEP, RADII = 10.0, (10.0, 100.0, 1000.0)


class Scaling:
    """Relative changes of the outputs at random points, when groups are scaled.

    Attributes:
      rounded: whether `fn` computes in less than float32 on the way.
      rounding: relative changes up to this are rounding.
    """

    def __init__(self, function: Function, leaves: Mapping[int, ArrayGroups], seeds: np.ndarray):
        """Takes all arrays on spheres, and two seeds for each of the POINTS."""
        self._function = function
        self.rounded = function.rounds
        self.rounding = LOW_ROUNDING if self.rounded else ROUNDING
        self._points = [function.draw_point(seed) for seed in seeds[:POINTS]]
        self._seeds = seeds[POINTS:]
        # Factors have the same shapes in every call: fn is then compiled once.
        self._ones = [np.ones((1,) * x.ndim, np.float32) for x in function.arrays]
        for i, leaf in leaves.items():
            self._ones[i] = _to_array_axes(leaf, np.ones(leaf.counts))

    def measure_change(
        self, leaves: Mapping[int, ArrayGroups], radius: float = 1.0, each: bool = False
    ) -> float:
        """The largest relative change over points and outputs.

        The groups of these arrays, which are tied, start from `radius` times their radius, and each is
        multiplied by a random factor in [1/10, 10]. With `each`, every coordinate is.
        """
        changes = []
        compute = self._function.compute_outputs
        for x, seed in zip(self._points, self._seeds, strict=True):
            before = compute(x, self._make_factors(leaves, radius))
            if each:
                after = compute(_scale_coordinates(x, leaves, seed), self._ones)
            else:
                after = compute(x, self._make_factors(leaves, radius, seed))
            changes += [_compare(b, a) for b, a in zip(before, after, strict=True)]
        return float(np.max(changes))

    def is_explained_by_eps(
        self, leaves: Mapping[int, ArrayGroups], radii: Sequence[float] = RADII
    ) -> bool:
        """Whether the change falls with the square of the radius, from one of the radii to the next.

        Where the eps is as large as the variance that it is added to, this is so at larger radii only.
        """
        before = self.measure_change(leaves)
        for radius in radii:
            after = self.measure_change(leaves, radius)
            if after < 3 * before / STEP**2 or (radius == 100.0 and after < 0.1 * self.rounding):
                return True
            before = after
        return False

    def _make_factors(
        self, leaves: Mapping[int, ArrayGroups], radius: float, seed: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """A factor for every array: random ones for the groups of `leaves` if there is a seed."""
        factors = list(self._ones)
        for i, leaf in leaves.items():
            # Tied arrays draw from the same seed, and thus get the same factor for each group.
            drawn = np.ones(leaf.counts) if seed is None else _draw(seed, leaf.counts)
            factors[i] = _to_array_axes(leaf, radius * drawn)
        return factors


def find_changing(
    function: Function, spheres: Spheres, params: Any, seeds: np.ndarray
) -> list[str]:
    """The paths of arrays on spheres under whose scale `fn` changes, although no gradient says so.

    Only a `stop_gradient`, or a derivative that is defined by hand, makes gradients and outputs
    disagree. Without them nothing is evaluated.
    """
    ties = [] if not function.detaches else group_by_tie(function, spheres, params)
    leaves = {i: leaf for tie in ties for i, leaf in tie.items()}
    if not leaves:
        return []
    scaling = Scaling(function, leaves, seeds)

    def changes(tied: dict[int, ArrayGroups]) -> bool:
        change = scaling.measure_change(tied)
        return change > scaling.rounding and not scaling.is_explained_by_eps(tied)

    if not changes(leaves):  # all at once, which is cheap
        return []
    return ["/".join(function.paths[i]) for tied in ties if changes(tied) for i in tied]


def group_by_tie(function: Function, spheres: Spheres, params: Any) -> list[dict[int, ArrayGroups]]:
    """How the real arrays on spheres split, with those together that have to be scaled together."""
    groups = match(spheres, params)
    number = {i: n for n, i in enumerate(function.real)}  # an empty array has no number
    found = []
    for indices, _ in groups.parts():
        leaves = {
            number[i]: leaf
            for i in indices
            if i in number and (leaf := groups.leaves[i]) is not None
        }
        if leaves:
            found.append(leaves)
    return found


def _draw(seed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Random factors in [1/10, 10]."""
    return 10.0 ** np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def _to_array_axes(leaf: ArrayGroups, factors: np.ndarray) -> np.ndarray:
    """From one number per group, of the shape `leaf.counts`, to an array that broadcasts."""
    ascending = sorted(leaf.axes)
    factors = np.transpose(factors, [leaf.axes.index(axis) for axis in ascending])
    for k, axis in enumerate(ascending):
        factors = np.repeat(factors, leaf.shape[axis] // factors.shape[k], axis=k)
    return np.expand_dims(factors, leaf.summed).astype(np.float32)


def _scale_coordinates(
    x: list[jax.Array], leaves: Mapping[int, ArrayGroups], seed: np.ndarray
) -> list[Any]:
    """The arrays, with every coordinate of `leaves` times a random factor of its own."""
    x = list(x)
    for i in leaves:
        factors = _draw([*seed, i], x[i].shape)
        x[i] = jax.device_put(np.asarray(x[i]) * factors.astype(x[i].dtype), x[i].sharding)
    return x


def _compare(before: jax.Array, after: jax.Array) -> float:
    """||after - before|| / ||before||, in float64; the numerator alone where `before` is zero."""
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size, change = np.linalg.norm(b), np.linalg.norm(a - b)
    return float(change / size) if size > 0 else float(change)
