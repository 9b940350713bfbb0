"""`check_spheres`: whether declared spheres are right, by the definition of invariance itself."""

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
from spherical_optax._discovery.radial_sums import RadialSums
from spherical_optax._discovery.random_points import Function, make_fast_key
from spherical_optax._discovery.siblings import NO_INFLUENCE
from spherical_optax._discovery.splits import normalize
from spherical_optax._discovery.text_table import format_table

# Gradients are taken at this many random points, and groups are scaled at this many others.
PROBES = 4
POINTS = 2
# Relative changes of fn up to this are rounding, in float32 and with bfloat16 or float16 on the way.
ROUNDING, LOW_ROUNDING = 1e-3, 0.15
# A gradient whose radial figure is below this is tangential.
TANGENTIAL = 1e-3
# At 100 times the radius the effect of a normalisation eps falls by 100^2, that of a drowned shortcut
# only by 100. A change that falls by more than 100^1.5 / 3 is due to an eps.
DROWNING = 100.0

PASSING_VERDICTS = ("invariant", "invariant but for eps", "no influence")


class Check(NamedTuple):
    """What was measured of one parameter array on spheres, together with the arrays it is tied to.

    Attributes:
      path, shape, sphere: its path with slashes, its shape and its declared sphere.
      change: the largest relative change of fn when the groups are scaled.
      cosine: the largest |<x, g>| / (||x|| ||g||) of the groups.
      verdict: see `check_spheres`.
      ok: whether the verdict passes.
    """

    path: str
    shape: tuple[int, ...]
    sphere: Sphere
    change: float
    cosine: float
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
        return format_table(header, rows) if rows else "no parameter is on a sphere"


def check_spheres(
    fn: Callable[[Any], Any], params: Any, spheres: Spheres, *, key: jax.Array
) -> CheckReport:
    """Tests whether a function is invariant when the declared groups are scaled.

    Use this when you have written `spheres` by hand, or to test the answer of `find_spheres`; it fits
    into the tests of a model.

    A function is invariant if L(rho x) = L(x) for every rho > 0 (section 2.1). At random points near
    `params`, all groups of a parameter array, and of the arrays it is tied to, are multiplied by random
    factors in [1/10, 10]. The report has ||fn(scaled) - fn|| / ||fn||, the largest over points and
    outputs. Beside it is the largest radial cosine |<x, g>| / (||x|| ||g||) over groups and probes; an
    invariant group has a cosine of zero (Lemma 1, Eq. 2).

    The eps of a normalisation layer breaks invariance where the weights are small. Scaling at 100 times
    the radius tells an eps apart, and it passes.

    What it costs: four gradients, and about two evaluations of `fn` for each parameter array on spheres.

    Args:
      fn: function of the parameters, as for `find_spheres`.
      params: the parameters.
      spheres: the declared spheres, as in every `spheres` argument.
      key: random key.

    Returns:
      A report that prints as a table. `.ok` is whether all is invariant, and `.assert_ok()` raises an
      AssertionError with the offending paths. `.checks` has a row for each parameter array on spheres,
      with `path`, `shape`, `sphere`, `change`, `cosine`, `verdict` and `ok`.

      Verdicts that pass: "invariant", "invariant but for eps", and "no influence" (the gradient
      vanishes).

      Verdicts that fail: "NOT INVARIANT" (with a note if the gradient is tangential all the same), "NOT
      FINITE", and "GRADIENT NOT TANGENTIAL" (the outputs are invariant, but the gradient has a radial
      part). A `stop_gradient` in `fn` can make outputs and gradient disagree in either direction.

    Raises:
      ValueError: if `spheres` does not fit `params`; if there are no real parameters, or they have no
        values; if `fn` is not a function or returns no real array; or if `key` is not one random key.

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
    scaled_together = _group_by_tie(function, spheres, params)
    gradient_key, scaling_key = jax.random.split(make_fast_key("check_spheres", key))
    if not scaled_together:
        return CheckReport(())
    # Results that are not finite get a verdict of their own, without NumPy's warnings about them.
    with np.errstate(invalid="ignore", over="ignore"):
        _probe(function, scaled_together, gradient_key)
        scaling = _Scaling(function, scaling_key)
        checks: dict[int, Check] = {}
        for arrays in scaled_together:
            change, verdict = _judge(scaling, arrays)
            for i in arrays.leaves:
                sphere = specs[function.paths[i]]
                assert sphere is not None
                checks[i] = Check(
                    path="/".join(function.paths[i]),
                    shape=function.arrays[i].shape,
                    sphere=sphere,
                    change=change,
                    cosine=arrays.cosine,
                    verdict=verdict,
                    ok=verdict in PASSING_VERDICTS,
                )
    return CheckReport(tuple(checks[i] for i in sorted(checks)))


class _TiedArrays:
    """The arrays of one tie, or a single array on spheres, by their index.

    Attributes:
      leaves: how each array splits into groups.
      candidate: the same split, as `find_spheres` measures it.
      cosine: the largest radial cosine of all probes so far.
      influence: the largest influence of all probes so far, relative to that of any parameter.
    """

    def __init__(self, leaves: dict[int, ArrayGroups]):
        self.leaves, self.cosine, self.influence = leaves, 0.0, 0.0
        self.candidate = Candidate({i: normalize(leaf) for i, leaf in leaves.items()})

    def measure(self, sums: dict[int, RadialSums]) -> None:
        """Takes in one probe."""
        self.cosine = max(self.cosine, self.candidate.measure(sums))
        most = max(s.influence for s in sums.values())
        if most > 0:
            own = max(sums[i].influence for i in self.leaves)
            self.influence = max(self.influence, own / most)


def _group_by_tie(function: Function, spheres: Spheres, params: Any) -> list[_TiedArrays]:
    """The real arrays on spheres, with those together that have to be scaled together."""
    groups = match(spheres, params)
    number = {i: n for n, i in enumerate(function.real)}  # an empty array has no number
    found: list[_TiedArrays] = []
    for indices, _ in groups.parts():
        leaves = {
            number[i]: leaf
            for i in indices
            if i in number and (leaf := groups.leaves[i]) is not None
        }
        if leaves:
            found.append(_TiedArrays(leaves))
    return found


def _probe(function: Function, scaled_together: list[_TiedArrays], key: jax.Array) -> None:
    """Takes gradients at random points, and measures their radial parts."""
    for k in jax.random.split(key, PROBES):
        point_key, cotangent_key = jax.random.split(k)
        x = function.draw_point(point_key)
        g = function.compute_gradient(x, cotangent_key)
        sums = {i: RadialSums(x[i], g[i]) for i in range(len(x))}
        for arrays in scaled_together:
            arrays.measure(sums)


def _judge(scaling: "_Scaling", arrays: _TiedArrays) -> tuple[float, str]:
    """The relative change of the outputs when the groups are scaled, and the verdict."""
    change = scaling.measure_change(arrays)
    if not math.isfinite(change):
        return change, "NOT FINITE"
    if change > scaling.rounding:
        return change, _judge_changed(scaling, arrays, change)
    return change, _judge_unchanged(scaling, arrays, change)


def _judge_changed(scaling: "_Scaling", arrays: _TiedArrays, change: float) -> str:
    """The outputs have changed: an eps explains it, or the groups are not invariant."""
    far = scaling.measure_change(arrays, radius=DROWNING)
    if far < max(0.1 * scaling.rounding, 3 * change / DROWNING**1.5):
        return "invariant but for eps"
    tangential = arrays.candidate.evidence.natural < TANGENTIAL
    return "NOT INVARIANT" + (" (but gradient tangential)" if tangential else "")


def _judge_unchanged(scaling: "_Scaling", arrays: _TiedArrays, change: float) -> str:
    """The outputs have not changed, but an array with little influence changes them little anyway.

    If the gradient has a radial part, the change is therefore compared with a reference: the change when
    every coordinate, in place of every group, is multiplied by a factor of its own.
    """
    if arrays.candidate.evidence.possible:
        return "invariant"
    if arrays.influence < NO_INFLUENCE:
        return "no influence"
    reference = scaling.measure_change(arrays, each=True)
    # In low precision the radial part of the gradient may be rounding, too.
    if scaling.rounded and change < 0.1 * reference:
        return "invariant"
    return "GRADIENT NOT TANGENTIAL" if change < 0.01 * reference else "NOT INVARIANT"


class _Scaling:
    """Relative changes of the outputs at random points, when the groups of tied arrays are scaled."""

    def __init__(self, function: Function, key: jax.Array):
        self._function = function
        self.rounded = function.rounds
        self.rounding = LOW_ROUNDING if self.rounded else ROUNDING
        keys = jax.random.split(key, 2 * POINTS)
        self._points = [function.draw_point(k) for k in keys[:POINTS]]
        self._before = [function.compute_outputs(x) for x in self._points]
        self._keys = keys[POINTS:]

    def measure_change(self, arrays: _TiedArrays, radius: float = 1.0, each: bool = False) -> float:
        """The largest relative change over points and outputs.

        The groups start from `radius` times their radius. With `each`, every coordinate is multiplied by
        a factor of its own, and not every group.
        """
        changes = []
        for x, before, key in zip(self._points, self._before, self._keys, strict=True):
            if radius != 1.0:
                before = self._function.compute_outputs(_multiply(x, arrays, radius))
            scaled = _multiply(_scale_randomly(x, arrays, key, each), arrays, radius)
            after = self._function.compute_outputs(scaled)
            changes += [_compare(b, a) for b, a in zip(before, after, strict=True)]
        return float(np.max(changes))


def _multiply(x: list[jax.Array], arrays: _TiedArrays, factor: float) -> list[jax.Array]:
    """The arrays of a tie times one factor, and the others as they are."""
    x = list(x)
    for i in arrays.leaves:
        x[i] = x[i] * np.asarray(factor, x[i].dtype)
    return x


def _scale_randomly(
    x: list[jax.Array], arrays: _TiedArrays, key: jax.Array, each: bool
) -> list[jax.Array]:
    """The groups of tied arrays, or with `each` their coordinates, times random factors."""
    x = list(x)
    for i, leaf in arrays.leaves.items():
        # Tied arrays draw from the same key, and thus get the same factor for each group.
        draw = jax.random.fold_in(key, i) if each else key
        x[i] = _multiply_randomly(x[i], draw, leaf, each)
    return x


@functools.partial(jax.jit, static_argnames=("leaf", "each"))
def _multiply_randomly(x: jax.Array, key: jax.Array, leaf: ArrayGroups, each: bool) -> jax.Array:
    """Every group, or every coordinate, times a random factor in [1/10, 10]."""
    shape = x.shape if each else leaf.counts
    factors = 10.0 ** jax.random.uniform(key, shape, x.dtype, -1.0, 1.0)
    return x * (factors if each else leaf.spread(leaf.from_counts(factors)))


def _compare(before: jax.Array, after: jax.Array) -> float:
    """||after - before|| / ||before||, in float64; the numerator alone where `before` is zero."""
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size, change = np.linalg.norm(b), np.linalg.norm(a - b)
    return float(change / size) if size > 0 else float(change)
