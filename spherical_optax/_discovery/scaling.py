"""How much a function changes when groups of its parameters are scaled."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax._core.array_groups import ArrayGroups, reshard_like
from spherical_optax._core.matching import match
from spherical_optax._core.sphere import Spheres
from spherical_optax._discovery.random_points import Function

# Groups are scaled at this many random points, and one group by one of these factors at each: the random
# factors of a single group may both be near 1.
EXTREMES = (0.1, 10.0)
POINTS = len(EXTREMES)
# Relative changes of fn up to this are rounding, in float32 and with bfloat16 or float16 on the way.
ROUNDING, LOW_ROUNDING = 1e-3, 0.15
# Every radius is STEP times the one before, from 1. The effect of the eps of a normalisation layer falls
# by STEP^2 = 100 from one to the next, that of GELU or SiLU in front of one by STEP^1.5 = 32, and that
# of a shortcut that is drowned by STEP.
STEP, RADII = 10.0, (10.0, 100.0, 1000.0)
# A change below this is small beside 1, and that of an eps then falls as it does in the limit.
SMALL = 0.1

Tie = Mapping[int, ArrayGroups]  # how the arrays of a tie split, by the index of the array


class Scaling:
    """Relative changes of the outputs at random points, when groups are scaled.

    Attributes:
      rounded: whether `fn` computes in less than float32 on the way.
      rounding: relative changes up to this are rounding.
      leaves: how all arrays on spheres split, by their index.
    """

    def __init__(self, function: Function, ties: Sequence[Tie], seeds: np.ndarray):
        """Takes all arrays on spheres, and two seeds for each of the POINTS."""
        self._function = function
        self.rounded = function.rounds
        self.rounding = LOW_ROUNDING if self.rounded else ROUNDING
        self.leaves = {i: leaf for tie in ties for i, leaf in tie.items()}
        self._compute = jax.jit(self._compute_scaled)
        # Factors have the same shapes in every call: fn is then compiled once.
        self._ones = {i: np.ones(leaf.counts, np.float32) for i, leaf in self.leaves.items()}
        seeds = seeds.reshape(2 * POINTS, -1)
        self._points = [function.draw_point(seed) for seed in seeds[:POINTS]]
        self._seeds = seeds[POINTS:]
        self._before = [self._compute(x, self._ones) for x in self._points]

    def _compute_scaled(self, x: list[jax.Array], factors: dict[int, jax.Array]) -> list[jax.Array]:
        """The outputs, with every group of `leaves` times its factor."""
        x = list(x)
        for i, leaf in self.leaves.items():
            spread = leaf.spread(leaf.from_counts(factors[i].astype(x[i].dtype)))
            x[i] = x[i] * reshard_like(jnp.broadcast_to(spread, x[i].shape), x[i])
        return self._function.compute_outputs(x)

    def measure_change(self, tie: Tie, radius: float = 1.0, each: bool = False) -> float:
        """The largest relative change over points and outputs.

        The groups of these arrays start from `radius` times their radius, and each is multiplied by a
        random factor in [1/10, 10]. With `each`, every coordinate is.
        """
        changes = []
        points = zip(self._points, self._before, self._seeds, EXTREMES, strict=True)
        for x, before, seed, extreme in points:
            if radius != 1.0:
                before = self._compute(x, self._ones | _draw_factors(tie, radius))
            if each:
                after = self._compute(_scale_coordinates(x, tie, seed), self._ones)
            else:
                after = self._compute(x, self._ones | _draw_factors(tie, radius, seed, extreme))
            changes += [_compare(b, a) for b, a in zip(before, after, strict=True)]
        return float(np.max(changes))

    def is_explained_by_eps(
        self, tie: Tie, change: float, radii: Sequence[float] = RADII, tangential: bool = True
    ) -> bool:
        """Whether `change`, that at radius 1, falls with the square of the radius from one to the next.

        Where the eps is as large as the variance that it is added to, this is so at larger radii only:
        the first change that is SMALL decides. Rounding hides how fast it falls in low precision. And
        where the gradient is `tangential`, which that of a nonlinearity is not, a few of many groups may
        have an eps as large as their variance, so that the change falls more slowly at first.
        """
        before = change
        for radius in radii:
            after = self.measure_change(tie, radius)
            if self.rounded or tangential:
                if after < 3 * before / STEP**2 or (
                    radius == 100.0 and after < 0.1 * self.rounding
                ):
                    return True
            elif before < SMALL or radius == radii[-1]:
                return after < 1.6 * before / STEP**2 + 0.02 * self.rounding
            before = after
        return False


def find_changing(
    function: Function, spheres: Spheres, params: Any, seeds: np.ndarray
) -> list[str]:
    """The paths of arrays on spheres under whose scale `fn` changes, although no gradient says so.

    Only a `stop_gradient`, or a derivative that is defined by hand, makes gradients and outputs
    disagree. Without them nothing is evaluated.
    """
    ties = group_by_tie(function, spheres, params) if function.detaches else []
    if not ties:
        return []
    scaling = Scaling(function, ties, seeds)

    def changes(tie: Tie) -> bool:
        change = scaling.measure_change(tie)
        return change > scaling.rounding and not scaling.is_explained_by_eps(tie, change)

    if not changes(scaling.leaves):  # all at once, which is cheap
        return []
    return ["/".join(function.paths[i]) for tie in ties if changes(tie) for i in tie]


def group_by_tie(function: Function, spheres: Spheres, params: Any) -> list[Tie]:
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


def _draw_factors(
    tie: Tie, radius: float, seed: np.ndarray | None = None, extreme: float = 1.0
) -> dict[int, np.ndarray]:
    """A factor for every group: `radius`, times a random number if there is a seed.

    Tied arrays draw from the same seed, and thus get the same factor for each group. The random number
    of the first group is `extreme`.
    """

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if seed is None:
            return np.ones(shape)
        factors = _draw(seed, shape)
        factors.flat[:1] = extreme
        return factors

    return {i: (radius * draw(leaf.counts)).astype(np.float32) for i, leaf in tie.items()}


def _scale_coordinates(x: list[jax.Array], tie: Tie, seed: np.ndarray) -> list[Any]:
    """The arrays, with every coordinate of a tie times a random factor of its own."""
    x = list(x)
    for i in tie:
        factors = _draw([*seed, i], x[i].shape)
        x[i] = jax.device_put(np.asarray(x[i]) * factors.astype(x[i].dtype), x[i].sharding)
    return x


def _compare(before: jax.Array, after: jax.Array) -> float:
    """||after - before|| / ||before||, in float64; the numerator alone where `before` is zero."""
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size, change = np.linalg.norm(b), np.linalg.norm(a - b)
    return float(change / size) if size > 0 else float(change)
