"""`find_spheres` and `survey_spheres`: random probes, and the verdicts that follow from them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._discovery.evidence import LARGER
from spherical_optax._discovery.radial_sums import make_radial_sums
from spherical_optax._discovery.random_points import Function, make_seeds
from spherical_optax._discovery.scaling import POINTS, find_changing
from spherical_optax._discovery.siblings import Finding, Siblings, group_by_parent
from spherical_optax._discovery.text_table import format_table
from spherical_optax._discovery.warn import warn, warn_of_running_averages

# Three gradients with every array at its natural radius. They leave a few arrays that may be on spheres.
NATURAL_PROBES = 3

# Then seven gradients in which some of these arrays are at LARGER times their radius. A row is a probe
# and a column is an array; the eighth array is in the first column again, and so on. The rows are the
# lines of the Fano plane: each array is enlarged in three probes, and any two arrays from different
# columns are enlarged together in exactly one. Never enlarge everything at once: a saturated softmax
# makes query and key look invariant.
LINES = np.array(
    [
        [1, 0, 0, 0, 1, 0, 1],
        [1, 1, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1, 1],
    ],
    dtype=bool,
)

# A figure that would be zero comes out below this, in float32 and with bfloat16 or float16 on the way.
ROUNDING, LOW_ROUNDING = 2e-4, 5e-2


@dataclasses.dataclass(frozen=True)
class Survey:
    """The spheres that were found, and the evidence; prints as a table.

    Attributes:
      spheres: a tree shaped like the parameters.
      findings: for every real parameter array its `path`, `shape` and `sphere`, the radial figure at the
        `natural` and the `large` radius, and the `verdict`: "sphere", "no", "no influence" (the gradient
        vanishes, as that of a bias in front of BatchNorm does), "undecided", "L2 penalty" (the gradient
        has the same part along the parameters in all groups) or "not finite".
    """

    spheres: Spheres
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        header = ("parameter", "shape", "sphere", "radial figure", "at 10 x radius", "verdict")
        rows = [(f.path, f.shape, f.sphere, f.natural, f.large, f.verdict) for f in self.findings]
        return format_table(header, rows)


def find_spheres(
    fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    vectors: bool = False,
) -> Spheres:
    r"""The finest spheres under which a function is radially invariant, found by measurement.

    Use this when you do not want to work out by hand which parameters of a network are normalised, and
    in which groups. `survey_spheres` shows the evidence, and `check_spheres` tests the answer.

    What `fn` has to be: the function of the parameters that is trained, for one fixed batch and with
    everything as in training. BatchNorm is in training mode, and dropout has a fixed key. Images have
    the size of the training images, and no penalty on the weights is part of `fn`. The batch has eight
    examples or more, of real data or noise: constant images have no variance to normalise by, and with
    two images, BatchNorm maps every feature to +1 and -1, so that only a sign is left. The outputs are
    logits or loss or any tree of both, but not new running statistics, which do depend on the scale of
    the weights.

    What it costs: one compilation and at most ten gradients of `fn`; with a `stop_gradient` in `fn` one
    more compilation, and a few evaluations.

    What is not looked for:

      - ties across modules, as of the two layers in LayerNorm(Dense(x) + Dense(y)); a module is the
        arrays with one parent in the tree;
      - ties of more than five arrays (three in a module of more than five arrays, two in one of more
        than eight);
      - arrays of which only a part is on spheres.

    Where it may be wrong: gradients decide. With a `stop_gradient` inside a normalisation layer, as in
    batch renormalisation, a gradient may be tangential although `fn` is not invariant, and such groups
    come out on spheres. If there is a `stop_gradient` or a derivative defined by hand, `fn` is therefore
    also evaluated at scaled parameters, and a warning names the arrays with which it changes.

    How it decides: on every invariant group <grad L(x), x> = 0 (Lemma 1, Eq. 2), and one gradient shows
    this product for all groups at once. Gradients g of random contractions of the outputs are taken at
    random points x near `params`. The radial figure of a group,

        |sum(x g)| / sqrt(sum((x g)^2)),

    is about |N(0, 1)| if the group is not invariant. If it is, the figure is rounding, and a remainder
    that the eps of a normalisation layer leaves. (For entries of one size the figure is the cosine of x
    and g times sqrt(d), and a large number d of coordinates does not make it small. A bias among the
    weights of a kernel counts by its effect.)

    The candidates are every choice of index axes, blocks of one of them, and ties among the arrays of
    one module. Each is measured in seven probes at the natural radius and three at ten times that, where
    an eps is drowned. It is on spheres if its figure is below `tol` in each of the three, small in the
    seven, and falls in between to rounding or with the square of the radius, as an eps does. The figure
    of a nonlinearity that saturates, or of a branch that drowns its shortcut, falls with the radius
    only. If the figures were independent and distributed like |N(0, 1)|, a
    candidate of one group would pass with a probability below 1e-12; with more groups it is less likely
    still.

    Args:
      fn: the function of the parameters, as described above.
      params: the parameters, of any radius; zeros (a BatchNorm scale that starts at zero) are moved away
        from zero before measuring. In bfloat16 or float16 they are handed to `fn` in float32 if it takes
        them in float32.
      key: random key.
      tol: bound on the radial figure. Where `fn` computes in bfloat16 or float16 inside, it is at least
        5e-2; rounding may then leave a tied bias undecided.
      vectors: also find groups made of vectors alone. Scale and bias of a BatchNorm whose output goes
        through ReLU and a layer without bias to the next normalisation are truly invariant together, but
        usually left to plain Adam. An array with one axis longer than 1 is a vector.

    Returns:
      A tree shaped like `params` of `Sphere | None`, which every `spheres` argument takes. An array
      whose figure is between yes and no is left off the spheres and logged as a warning; see
      `survey_spheres` for the evidence.

    Raises:
      ValueError: if there are no real parameters, or they have no values; if `fn` is not a function,
        returns no real array, or its gradient is finite at none of the points; if `tol` is not in
        (0, 1); or if `key` is not one random key.

    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> def fn(params):  # a dense layer and BatchNorm
    ...     y = x @ params["kernel"] + params["bias"]
    ...     return (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + 1e-5)
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros((1, 3))}
    >>> so.find_spheres(fn, params, key=jax.random.key(1))
    {'bias': None, 'kernel': Sphere(index_axes=(-1,), blocks=None, tie=None)}

    Source: Lemma 1 of "A spherical analysis of Adam with Batch Normalization".
    """
    _require_tolerance(tol)
    survey, changing = _survey(fn, params, key, tol, vectors)
    warn(survey.findings, changing)
    warn_of_running_averages(params)
    return survey.spheres


def survey_spheres(
    fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    tol: float = 1e-2,
    vectors: bool = False,
) -> Survey:
    """The spheres that `find_spheres` finds, with the figures of every parameter; prints as a table.

    Use this when you want to see why a parameter is on a sphere or off the spheres. Arguments, errors
    and the measured figure (from Lemma 1, Eq. 2) are those of `find_spheres`.

    Returns:
      A `Survey`: `.spheres`, a tree shaped like `params`, and `.findings`, one for each real array.

    Raises:
      ValueError: as `find_spheres`.

    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> def fn(params):  # a dense layer and LayerNorm without a bias
    ...     y = x @ params["kernel"]
    ...     return params["scale"] * y / jnp.sqrt(jnp.mean(y**2, 1, keepdims=True) + 1e-6)
    >>> params = {"kernel": jnp.ones((4, 3)), "scale": jnp.ones((1, 3))}
    >>> survey = so.survey_spheres(fn, params, key=jax.random.key(1))
    >>> [(f.path, f.verdict) for f in survey.findings]
    [('kernel', 'sphere'), ('scale', 'no')]

    Source: Lemma 1 of "A spherical analysis of Adam with Batch Normalization".
    """
    _require_tolerance(tol)
    return _survey(fn, params, key, tol, vectors)[0]


def _survey(
    fn: Callable[[Any], Any], params: Any, key: jax.Array, tol: float, vectors: bool
) -> tuple[Survey, list[str]]:
    """The survey, and the paths of arrays on spheres under whose scale `fn` is not invariant."""
    function = Function("find_spheres", fn, params)
    families = group_by_parent(function.paths, function.arrays, vectors)
    probes = NATURAL_PROBES + len(LINES)
    seeds = make_seeds("find_spheres", key, (probes + POINTS, 2))
    # Gradients that are not finite are left out later, without NumPy's warnings about them.
    with np.errstate(invalid="ignore", over="ignore"):
        _probe_natural_radius(function, families, seeds[:NATURAL_PROBES])
        _probe_larger_radius(function, families, seeds[NATURAL_PROBES:probes])
        findings = _judge(function, families, tol)
        spheres = _to_tree(function, findings)
        changing = find_changing(function, spheres, params, seeds[probes:])
    if all(f.verdict == "not finite" for f in findings.values()):
        raise ValueError(
            "find_spheres: the gradient of fn is finite at none of the random points near params. Check "
            "that fn(params) is finite, and that fn neither divides by zero nor takes its root"
        )
    return Survey(spheres, tuple(findings.values())), changing


def _require_tolerance(tol: Any) -> None:
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"find_spheres: tol is {tol!r}, not a number in (0, 1)")


def _probe_natural_radius(
    function: Function, families: list[Siblings], seeds: Iterable[np.ndarray]
) -> None:
    """Probes with every array at its natural radius."""
    for seed in seeds:
        _probe(function, families, seed, large=np.zeros(len(function.arrays), bool))


def _probe_larger_radius(
    function: Function, families: list[Siblings], seeds: Iterable[np.ndarray]
) -> None:
    """Probes by LINES those arrays that may be on spheres; nothing if there are none."""
    promising = sorted(set().union(*(siblings.find_promising() for siblings in families)))
    if not promising:
        return
    design = np.zeros((len(LINES), len(function.arrays)), bool)
    design[:, promising] = LINES[:, np.arange(len(promising)) % len(LINES)]
    for seed, large in zip(seeds, design, strict=True):
        _probe(function, families, seed, large)


def _probe(
    function: Function, families: list[Siblings], seed: np.ndarray, large: np.ndarray
) -> None:
    """One gradient at a random point, with the arrays in `large` at LARGER times their radius."""
    point_seed, cotangent_seed = seed
    x = function.draw_point(point_seed, np.where(large, LARGER, 1.0).tolist())
    g = function.compute_gradient(x, cotangent_seed)
    sums = make_radial_sums(x, g)
    for siblings in families:
        siblings.measure(sums, large)


def _judge(function: Function, families: list[Siblings], tol: float) -> dict[int, Finding]:
    """The findings in the order of the arrays."""
    rounding = LOW_ROUNDING if function.rounds else ROUNDING
    tol = max(tol, rounding) if function.rounds else tol
    findings: dict[int, Finding] = {}
    for siblings in families:
        findings.update(siblings.judge(tol, rounding))
    return {i: findings[i] for i in sorted(findings)}


def _to_tree(function: Function, findings: dict[int, Finding]) -> Spheres:
    """The spheres in the structure of the parameters, with None for leaves that are no real arrays."""
    specs: list[Sphere | None] = [None] * len(function.leaves)
    for i, finding in findings.items():
        specs[function.real[i]] = finding.sphere
    return jax.tree.unflatten(function.treedef, specs)
