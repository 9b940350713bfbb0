"""Which parameters of a function are radially invariant, found by measurement."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._discovery.candidates import LARGER
from spherical_optax._discovery.random_points import Function, fast_key
from spherical_optax._discovery.siblings import Finding, split
from spherical_optax._discovery.text_table import figure, table

_logger = logging.getLogger("spherical_optax")

# Gradients with everything at its natural radius; then seven, each with some of the arrays that may be
# on a sphere at a larger one. The lines of the Fano plane say which: every array is there in three of
# them, and two arrays (but every seventh) together in only one. Scaled together, what is not invariant
# may look so: query and key of a softmax that saturates.
NATURAL_PROBES = 3
LINES = np.array([[(probe - array) % 7 in (0, 1, 3) for array in range(7)] for probe in range(7)])

# What rounding leaves of a figure that would be zero, in float32 and with bfloat16 on the way.
ROUNDING, LOW_ROUNDING = 2e-4, 5e-2


@dataclasses.dataclass(frozen=True)
class Survey:
    """The spheres that were found, and the evidence; prints as a table.

    Attributes:
      spheres: a tree shaped like the parameters.
      findings: for every real parameter array its `path`, `shape` and `sphere`, the radial figure at the
        `natural` and the `large` radius, and the `verdict`: "sphere", "no", "no influence" (its
        gradient vanishes: a bias in front of BatchNorm), "undecided" or "not finite".
    """

    spheres: Spheres
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        header = ("parameter", "shape", "sphere", "radial figure", "at 10 x radius", "verdict")
        rows = [(f.path, f.shape, f.sphere, f.natural, f.large, f.verdict) for f in self.findings]
        return table(header, rows)


def find_spheres(
    fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    vectors: bool = False,
) -> Spheres:
    r"""The finest spheres under which a function is radially invariant, measured.

    By Lemma 1, [2], <grad L(x), x> = 0 on every invariant group, so one gradient shows the radial
    derivative of all groups at once. At random points near `params`, with random contractions of the
    outputs, the radial figure |sum(x g)| / sqrt(sum((x g)^2)) of a group is about |N(0, 1)|, unless the
    group is invariant: then it is rounding, and what the eps of a normalisation layer leaves. (Where
    entries are of one size it is the cosine of x and g times sqrt(d), which d, the number of
    coordinates, does not make small; a bias among the weights of a kernel counts for what it does.)

    Candidates are every choice of index axes, blocks of one of them, and ties among the arrays of one
    module. One is on spheres if its figure is below `tol` at ten times the radius, where an eps is
    drowned, in each of three probes, and small at the natural radius in the seven others, and if it
    falls in between to rounding or as an eps does, with the square of the radius: what saturates, or
    drowns a shortcut, falls with the radius. Were its figures independent |N(0, 1)|, a candidate of one
    group would pass with a probability below 1e-12, of more groups with less.

    Costs one compilation and at most ten gradients of `fn`.

    Not looked for: ties across modules, as of the two layers in LayerNorm(Dense(x) + Dense(y)), of more
    than five arrays (three in a module of more than five arrays, two of more than eight), and arrays of
    which only a part is on spheres. Since it is the gradient that is measured, a `stop_gradient` inside
    a normalisation layer, as in batch renormalisation, may leave groups on spheres whose gradient is
    tangential though the function is not invariant: `check_spheres` tells.

    Args:
      fn: the function of the parameters that is trained: its outputs, logits or loss or any tree of
        both, for one fixed batch. Everything as in training: BatchNorm in training mode, a fixed key for
        dropout, a batch of eight or more of real data or noise (constant images have no variance to
        normalise by, and two images no more than its sign). Not among the outputs: new running
        statistics, which do depend on the scale of the weights.
      params: the parameters, of any radius; zeros (a BatchNorm scale that starts at zero) are moved away
        from zero before measuring. In bfloat16 or float16 they are handed to `fn` in float32 if it takes
        them so.
      key: random key.
      tol: bound on the radial figure. Where `fn` computes in bfloat16 or float16 inside, at least 5e-2;
        rounding may then leave a bias that is tied undecided.
      vectors: also find groups made of vectors alone. Scale and bias of a BatchNorm whose output goes
        through ReLU and a layer without bias to the next normalisation are truly invariant together, but
        usually left to plain Adam. Axes of length 1 do not make an array more than a vector.

    Returns:
      A tree shaped like `params` of `Sphere | None`: what every `spheres` argument takes. What lies
      between yes and no is logged as a warning with its figure and left off the spheres; see
      `survey_spheres` for the evidence.

    Raises:
      ValueError: if there are no real parameters, `fn` returns no real array, its gradient is finite
        nowhere, or `tol` is not in (0, 1).

    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> def fn(params):  # a dense layer and BatchNorm
    ...     y = x @ params["kernel"] + params["bias"]
    ...     return (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + 1e-5)
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros((1, 3))}
    >>> find_spheres(fn, params, key=jax.random.key(1))
    {'bias': None, 'kernel': Sphere(index_axes=(-1,), blocks=None, tie=None)}

    Source: Lemma 1 of "A spherical analysis of Adam with Batch Normalization".
    """
    survey = survey_spheres(fn, params, key=key, tol=tol, vectors=vectors)
    for f in survey.findings:
        if f.verdict == "not finite":
            _logger.warning(
                "find_spheres: %r of shape %s is left off the spheres: its gradient is not finite at "
                "any of the random points",
                *(f.path, f.shape),
            )
        if f.verdict == "undecided":
            _logger.warning(
                "find_spheres: %r of shape %s is undecided and left off the spheres: its radial figure "
                "is %s at its radius, %s at 10 times that. If it is on one, give it a so.Sphere",
                *(
                    f.path,
                    f.shape,
                    figure(f.natural) or "not finite",
                    figure(f.large) or "not finite",
                ),
            )
    if all(f.sphere is None for f in survey.findings):
        _logger.warning(
            "find_spheres: no parameter is on a sphere. If there is a normalisation layer: is it in "
            "training mode in fn, and are the inputs other than constant?"
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
    """What `find_spheres` finds, with the figures of every parameter; prints as a table.

    Arguments and errors as for `find_spheres`.

    Returns:
      A `Survey`: `.spheres` and `.findings`.

    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> def fn(params):  # a dense layer and LayerNorm without a bias
    ...     y = x @ params["kernel"]
    ...     return params["scale"] * y / jnp.sqrt(jnp.mean(y**2, 1, keepdims=True) + 1e-6)
    >>> params = {"kernel": jnp.ones((4, 3)), "scale": jnp.ones((1, 3))}
    >>> [(f.path, f.verdict) for f in survey_spheres(fn, params, key=jax.random.key(1)).findings]
    [('kernel', 'sphere'), ('scale', 'no')]

    Source: as for `find_spheres`.
    """
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"find_spheres: tol is {tol!r}, not a number in (0, 1)")
    function = Function("find_spheres", fn, params)
    modules = split(function.paths, function.arrays, vectors)
    keys = jax.random.split(fast_key("find_spheres", key), NATURAL_PROBES + len(LINES))

    def probe(key: jax.Array, large: np.ndarray) -> None:
        point_key, cotangent_key = jax.random.split(key)
        x = function.point(point_key, np.where(large, LARGER, 1.0).tolist())
        g = function.gradient(x, cotangent_key)
        for module in modules:
            module.measure(x, g, large)

    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite does not count
        natural = np.zeros(len(function.arrays), bool)
        for k in keys[:NATURAL_PROBES]:
            probe(k, natural)
        promising = sorted(set().union(*(module.promising() for module in modules)))
        if promising:
            design = np.zeros((len(LINES), len(natural)), bool)
            design[:, promising] = LINES[:, np.arange(len(promising)) % len(LINES)]
            for k, large in zip(keys[NATURAL_PROBES:], design, strict=True):
                probe(k, large)
        rounding = LOW_ROUNDING if function.rounds else ROUNDING
        tol = max(tol, rounding) if function.rounds else tol
        found = dict(sorted(f for module in modules for f in module.findings(tol, rounding)))
    if all(f.verdict == "not finite" for f in found.values()):
        raise ValueError(
            "find_spheres: the gradient of fn is finite at none of ten random points near params; check "
            "that fn(params) is finite, and for what it divides by or takes the root of"
        )
    specs: list[Sphere | None] = [None] * len(function.leaves)
    for i, finding in found.items():
        specs[function.real[i]] = finding.sphere
    return Survey(jax.tree.unflatten(function.treedef, specs), tuple(found.values()))
