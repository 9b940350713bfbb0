"""`check_spheres`: whether declared spheres are right, by the definition of invariance itself."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from spherical_optax._core.matching import assign_specs
from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._discovery.candidates import Candidate
from spherical_optax._discovery.radial_sums import RadialSums, make_radial_sums
from spherical_optax._discovery.random_points import Function, make_seeds
from spherical_optax._discovery.scaling import POINTS, RADII, Scaling, Tie, group_by_tie
from spherical_optax._discovery.siblings import NO_INFLUENCE
from spherical_optax._discovery.splits import normalize
from spherical_optax._discovery.text_table import format_table

# Gradients are taken at this many random points.
PROBES = 4
# A gradient whose radial figure is below this is tangential.
TANGENTIAL = 1e-3

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

    The eps of a normalisation layer breaks invariance where the weights are small. Scaling at 10, 100
    and 1000 times the radius tells an eps apart, and it passes as "invariant but for eps". Where the eps
    is as large as the variance, `find_spheres` leaves the array off the spheres all the same: it
    would be invariant with larger weights, and is not yet. The radial cosine, which is then near 1,
    shows this.

    What it costs: four gradients, about two evaluations of `fn` for each parameter array on spheres,
    and two compilations of `fn`.

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
    >>> so.check_spheres(fn, params, so.Sphere(()), key=jax.random.key(1)).ok
    True
    >>> so.check_spheres(fn, params, so.Sphere((-1,)), key=jax.random.key(1)).ok
    False

    Source: section 2.1 and Lemma 1 of "A spherical analysis of Adam with Batch Normalization".
    """
    function = Function("check_spheres", fn, params)
    specs = assign_specs(spheres, params)
    scaled_together = list(map(_TiedArrays, group_by_tie(function, spheres, params)))
    seeds = make_seeds("check_spheres", key, (PROBES + POINTS, 2))
    if not scaled_together:
        return CheckReport(())
    # Results that are not finite get a verdict of their own, without NumPy's warnings about them.
    with np.errstate(invalid="ignore", over="ignore"):
        _probe(function, scaled_together, seeds[:PROBES])
        scaling = Scaling(function, [tie.leaves for tie in scaled_together], seeds[PROBES:])
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

    def __init__(self, leaves: Tie):
        self.leaves, self.cosine, self.influence = leaves, 0.0, 0.0
        self.candidate = Candidate({i: normalize(leaf) for i, leaf in leaves.items()})

    def measure(self, sums: list[RadialSums]) -> None:
        """Takes in one probe."""
        self.cosine = max(self.cosine, self.candidate.measure(sums))
        most = max(s.influence for s in sums)
        if most > 0:
            own = max(sums[i].influence for i in self.leaves)
            self.influence = max(self.influence, own / most)


def _probe(function: Function, scaled_together: list[_TiedArrays], seeds: np.ndarray) -> None:
    """Takes gradients at random points, and measures their radial parts."""
    for point_seed, cotangent_seed in seeds:
        x = function.draw_point(point_seed)
        sums = make_radial_sums(x, function.compute_gradient(x, cotangent_seed))
        for arrays in scaled_together:
            arrays.measure(sums)


def _judge(scaling: Scaling, arrays: _TiedArrays) -> tuple[float, str]:
    """The relative change of the outputs when the groups are scaled, and the verdict."""
    change = scaling.measure_change(arrays.leaves)
    if not math.isfinite(change):
        return change, "NOT FINITE"
    if change > scaling.rounding:
        return change, _judge_changed(scaling, arrays, change)
    return change, _judge_unchanged(scaling, arrays, change)


def _judge_changed(scaling: Scaling, arrays: _TiedArrays, change: float) -> str:
    """The outputs have changed: an eps explains it, or the groups are not invariant."""
    # The largest radius is for an eps as large as the variance. Where the gradient has a large radial
    # part, it would also pass a running average, which is added to the variance like an eps.
    possible = arrays.candidate.evidence.possible
    tangential = arrays.candidate.evidence.natural < TANGENTIAL
    radii = RADII if possible else RADII[:-1]
    if scaling.is_explained_by_eps(arrays.leaves, change, radii, tangential):
        return "invariant but for eps"
    return "NOT INVARIANT" + (" (but gradient tangential)" if tangential else "")


def _judge_unchanged(scaling: Scaling, arrays: _TiedArrays, change: float) -> str:
    """The outputs have not changed, but an array with little influence changes them little anyway.

    If the gradient has a radial part, the change is therefore compared with a reference: the change when
    every coordinate, in place of every group, is multiplied by a factor of its own.
    """
    if arrays.candidate.evidence.possible:
        return "invariant"
    if arrays.influence < NO_INFLUENCE:
        return "no influence"
    reference = scaling.measure_change(arrays.leaves, each=True)
    # In low precision the radial part of the gradient may be rounding, too.
    if scaling.rounded and change < 0.1 * reference:
        return "invariant"
    return "GRADIENT NOT TANGENTIAL" if change < 0.01 * reference else "NOT INVARIANT"
