"""Whether a function is invariant under the spheres that are declared, by the definition itself."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from spherical_optax._core.groups import ArrayGroups
from spherical_optax._core.matching import assign_specs, match
from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._discovery.candidates import Candidate
from spherical_optax._discovery.radial_sums import Part, Sums
from spherical_optax._discovery.random_points import Function, fast_key
from spherical_optax._discovery.siblings import NO_INFLUENCE
from spherical_optax._discovery.text_table import table

PROBES = 4
POINTS = 2
# Relative changes of fn up to this are rounding, in float32 and with bfloat16 on the way.
ROUNDING, LOW_ROUNDING = 1e-3, 0.15
OK = ("invariant", "invariant but for eps", "no influence")
# At this many times the radius an eps matters less by its square, and a drowned shortcut by itself.
DROWNING = 100.0


class Check(NamedTuple):
    """What was measured of one parameter array on spheres, together with those it is tied to."""

    path: str
    shape: tuple[int, ...]
    sphere: Sphere
    change: float  # the largest relative change of fn
    cosine: float  # the largest |<x, g>| / (||x|| ||g||)
    verdict: str
    ok: bool


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check_spheres` found; prints as a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether fn is invariant under all of the spheres."""
        return all(check.ok for check in self.checks)

    def assert_ok(self) -> None:
        """Raises an AssertionError that names the parameters that are not invariant."""
        if wrong := tuple(check for check in self.checks if not check.ok):
            raise AssertionError(
                f"fn is not invariant under these spheres:\n{CheckReport(wrong)}\nTake them off, or "
                "let so.find_spheres find the right ones"
            )

    def __str__(self) -> str:
        header = ("parameter", "shape", "sphere", "change of fn", "radial cosine", "verdict")
        rows = [(c.path, c.shape, c.sphere, c.change, c.cosine, c.verdict) for c in self.checks]
        return table(header, rows) if rows else "no parameter is on a sphere"


def check_spheres(
    fn: Callable[[Any], Any], params: Any, spheres: Spheres, *, key: jax.Array
) -> CheckReport:
    """Whether a function is invariant when the groups that are declared are scaled.

    The definition itself, L(rho x) = L(x) for every rho > 0 (section 2.1), at random points near
    `params`: all groups of a parameter array (and of those it is tied to) are multiplied by random
    factors in [1/10, 10], and ||fn(scaled) - fn|| / ||fn|| is reported, the largest over points and
    outputs. Beside it the largest radial cosine |<x, g>| / (||x|| ||g||) over groups and probes, zero by
    Lemma 1.

    An eps in a normalisation layer breaks invariance where the weights are small; this is told apart by
    scaling at 100 times the radius, and passes.

    Costs four gradients, and about two evaluations of `fn` for each parameter array on spheres.

    Args:
      fn: function of the parameters, as for `find_spheres`.
      params: the parameters.
      spheres: what to check, as every `spheres` argument.
      key: random key.

    Returns:
      A report that prints as a table. `.ok`: whether all is invariant; `.assert_ok()` raises an
      AssertionError with the offending paths; `.checks`: a row per parameter array on spheres, with
      `path`, `shape`, `sphere`, `change`, `cosine`, `verdict` and `ok`. Verdicts that pass are
      "invariant", "invariant but for eps" and "no influence" (the gradient vanishes); the others are
      "NOT INVARIANT" (with a note if its gradient is tangential all the same), "NOT FINITE" and
      "GRADIENT NOT TANGENTIAL" (invariant, but the gradient has a radial part): a `stop_gradient` can
      do either.

    Raises:
      ValueError: if `spheres` does not fit `params`, there are no real parameters, or `fn` returns no
        real array.

    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> def fn(params):  # a dense layer and LayerNorm without scale and bias
    ...     y = x @ params["kernel"]
    ...     return y / jnp.sqrt(jnp.mean(y**2, 1, keepdims=True) + 1e-6)
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> check_spheres(fn, params, so.Sphere(()), key=jax.random.key(1)).ok
    True
    >>> check_spheres(fn, params, so.Sphere((-1,)), key=jax.random.key(1)).ok
    False

    Source: section 2.1 and Lemma 1 of "A spherical analysis of Adam with Batch Normalization".
    """
    function = Function("check_spheres", fn, params)
    specs = assign_specs(spheres, params)
    units = _units(function, spheres, params)
    gradient_key, key = jax.random.split(fast_key("check_spheres", key))
    if not units:
        return CheckReport(())
    with np.errstate(invalid="ignore", over="ignore"):
        for k in jax.random.split(gradient_key, PROBES):
            point_key, cotangent_key = jax.random.split(k)
            x = function.point(point_key)
            g = function.gradient(x, cotangent_key)
            sums = {i: Sums(*pair) for i, pair in enumerate(zip(x, g, strict=True))}
            for unit in units:
                unit.measure(sums)
        checks = {}
        scaling = _Scaling(function, key)
        for unit in units:
            change, verdict = _judge(scaling, unit)
            for i in unit.leaves:
                path, array = function.paths[i], function.arrays[i]
                spec = specs[path]
                assert spec is not None
                ok = verdict in OK
                checks[i] = Check(
                    "/".join(path), array.shape, spec, change, unit.cosine, verdict, ok
                )
    return CheckReport(tuple(checks[i] for i in sorted(checks)))


class _Unit:
    """One array on spheres, or all those of a tie, by their index."""

    def __init__(self, leaves: dict[int, ArrayGroups]):
        self.leaves, self.cosine, self.influence = leaves, 0.0, 0.0
        self.candidate = Candidate({i: _part(leaf) for i, leaf in leaves.items()})

    def measure(self, sums: dict[int, Sums]) -> None:
        self.cosine = max(self.cosine, self.candidate.measure(sums))
        most = max(s.influence for s in sums.values())
        if most > 0:
            here = max(sums[i].influence for i in self.leaves)
            self.influence = max(self.influence, here / most)


def _part(leaf: ArrayGroups) -> Part:
    """Axes of length 1 tell no groups apart."""
    long = [(axis, count) for axis, count in zip(leaf.axes, leaf.counts, strict=True) if count > 1]
    axes, counts = tuple(axis for axis, _ in long), tuple(count for _, count in long)
    blocks = counts[-1] if axes and counts[-1] < leaf.shape[axes[-1]] else None
    return Part(leaf.shape, axes, blocks)


def _units(function: Function, spheres: Spheres, params: Any) -> list[_Unit]:
    groups = match(spheres, params)
    tied = {i for tie in groups.ties for i in tie}
    alone = [[i] for i, leaf in enumerate(groups.leaves) if leaf is not None and i not in tied]
    number = {i: n for n, i in enumerate(function.real)}  # an empty array has none
    units = [
        {number[i]: leaf for i in unit if i in number and (leaf := groups.leaves[i]) is not None}
        for unit in [*groups.ties, *alone]
    ]
    return [_Unit(unit) for unit in units if unit]


def _judge(scaling: "_Scaling", unit: _Unit) -> tuple[float, str]:
    change = scaling.change(unit)
    if not math.isfinite(change):
        return change, "NOT FINITE"
    if change > scaling.rounding:
        # If it were the eps of a normalisation layer, then this would be smaller by 1e4.
        far = scaling.change(unit, DROWNING)
        if far < max(0.1 * scaling.rounding, 3 * change / DROWNING**1.5):
            return change, "invariant but for eps"
        tangential = unit.candidate.evidence.natural < 1e-3
        return change, "NOT INVARIANT" + (" (but gradient tangential)" if tangential else "")
    if unit.candidate.evidence.possible:
        return change, "invariant"
    if unit.influence < NO_INFLUENCE:
        return change, "no influence"
    reference = scaling.change(unit, each=True)
    if scaling.rounded and change < 0.1 * reference:  # and so is the gradient
        return change, "invariant"
    return change, "GRADIENT NOT TANGENTIAL" if change < 0.01 * reference else "NOT INVARIANT"


class _Scaling:
    """Relative changes of the outputs at random points, when one unit's groups are scaled."""

    def __init__(self, function: Function, key: jax.Array):
        self._function = function
        self.rounded = function.rounds
        self.rounding = LOW_ROUNDING if self.rounded else ROUNDING
        keys = jax.random.split(key, 2 * POINTS)
        self._points = [function.point(k) for k in keys[:POINTS]]
        self._before = [function.outputs(x) for x in self._points]
        self._keys = keys[POINTS:]

    def change(self, unit: _Unit, radius: float = 1.0, each: bool = False) -> float:
        """The largest over points and outputs; `each`: every coordinate by a factor of its own."""
        changes = []
        for x, before, key in zip(self._points, self._before, self._keys, strict=True):
            if radius != 1.0:
                before = self._function.outputs(self._scaled(x, unit, radius, None, each))
            after = self._function.outputs(self._scaled(x, unit, radius, key, each))
            changes += [_relative(b, a) for b, a in zip(before, after, strict=True)]
        return float(np.max(changes))

    def _scaled(self, x: list[jax.Array], unit: _Unit, radius: float, key: Any, each: bool) -> Any:
        x = list(x)
        for i, leaf in unit.leaves.items():
            if key is not None:
                draw = jax.random.fold_in(key, i) if each else key  # tied arrays draw the same
                x[i] = _times_random(x[i], draw, leaf, each)
            x[i] = x[i] * np.asarray(radius, x[i].dtype)
        return x


@functools.partial(jax.jit, static_argnames=("leaf", "each"))
def _times_random(x: jax.Array, key: jax.Array, leaf: ArrayGroups, each: bool) -> jax.Array:
    """Every group, or every coordinate, times a random factor in [1/10, 10]."""
    shape = x.shape if each else leaf.counts
    factors = 10.0 ** jax.random.uniform(key, shape, x.dtype, -1.0, 1.0)
    return x * (factors if each else leaf.spread(leaf.from_counts(factors)))


def _relative(before: jax.Array, after: jax.Array) -> float:
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size, change = np.linalg.norm(b), np.linalg.norm(a - b)
    return float(change / size) if size > 0 else float(change)
