"""Which parameters of a function are radially invariant, found by measurement."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spherical_optax._candidates import LARGER
from spherical_optax._modules import Finding, split
from spherical_optax._probes import Function, fast_key
from spherical_optax._spheres import Sphere, Spheres
from spherical_optax._table import figure, table

_logger = logging.getLogger("spherical_optax")

# Gradients with everything at the natural radius; then seven, each with some of the arrays that may be
# on a sphere at a larger radius. The lines of the Fano plane say which: every array is at the larger
# radius in three, and two arrays (but every seventh) are there together in only one. Scaled together,
# what is not invariant may look so: query and key of a softmax that saturates.
NATURAL_PROBES = 3
LINES = np.array([[(probe - array) % 7 in (0, 1, 3) for array in range(7)] for probe in range(7)])

# What bfloat16 on the way leaves of a figure that would be zero; float16 leaves less.
ROUNDING = 5e-2


@dataclasses.dataclass(frozen=True)
class Survey:
    """The spheres that were found, and the evidence; prints as a table."""

    spheres: Spheres
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        header = ("parameter", "shape", "sphere", "radial figure", "at 10 x radius", "verdict")
        rows = [
            (f.path, f.shape, f.sphere or "", figure(f.natural), figure(f.large), f.verdict)
            for f in self.findings
        ]
        return table(header, rows)


def find_spheres(
    fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    vectors: bool = False,
) -> Spheres:
    """TODO"""
    survey = survey_spheres(fn, params, key=key, tol=tol, vectors=vectors)
    for f in survey.findings:
        if f.verdict == "undecided":
            _logger.warning(
                "find_spheres: %s of shape %s is undecided and left off the spheres: its radial "
                "figure is %s, and %s at 10 times the radius",
                *(f.path, f.shape, figure(f.natural), figure(f.large)),
            )
    return survey.spheres


def survey_spheres(
    fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    vectors: bool = False,
) -> Survey:
    """TODO"""
    function = Function("find_spheres", fn, params)
    if function.rounds:
        tol = max(tol, ROUNDING)
    modules = split(function.paths, function.arrays, vectors)
    keys = jax.random.split(fast_key("find_spheres", key), NATURAL_PROBES + len(LINES))

    def probe(key: jax.Array, scaled: np.ndarray) -> None:
        point_key, cotangent_key = jax.random.split(key)
        x = function.point(point_key, [LARGER if large else 1.0 for large in scaled])
        g = function.gradient(x, cotangent_key)
        for module in modules:
            module.measure(x, g, scaled)

    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite does not count
        natural = np.zeros(len(function.arrays), bool)
        for k in keys[:NATURAL_PROBES]:
            probe(k, natural)
        promising = sorted(set().union(*(m.promising() for m in modules)))
        if promising:
            design = np.zeros((len(LINES), len(natural)), bool)
            design[:, promising] = LINES[:, np.arange(len(promising)) % len(LINES)]
            for k, scaled in zip(keys[NATURAL_PROBES:], design, strict=True):
                probe(k, scaled)
        specs: list[Sphere | None] = [None] * len(function.leaves)
        findings = {}
        for module in modules:
            for i, finding in module.findings(tol):
                specs[function.real[i]], findings[i] = finding.sphere, finding
    spheres = jax.tree.unflatten(function.treedef, specs)
    return Survey(spheres, tuple(findings[i] for i in sorted(findings)))
