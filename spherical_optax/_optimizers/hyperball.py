"""Hyperball optimizers: any direction, on spheres whose radius stays and with steps of known angle."""

from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from spherical_optax._core.arguments import require_params, require_transformation
from spherical_optax._core.groups import ArrayGroups, replicate, reshard_like
from spherical_optax._core.matching import match
from spherical_optax._core.safe_math import upcast
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like
from spherical_optax._transforms.constraints import normalize, retract
from spherical_optax._transforms.momentum import ema
from spherical_optax._transforms.quotient import quotient
from spherical_optax._transforms.second_moment import rms
from spherical_optax._transforms.weight_decay import add_decay_off_spheres

Scalar = optax.ScalarOrSchedule
Radius = jax.typing.ArrayLike | Literal["current", "initial"]
Transformation = optax.GradientTransformationExtraArgs


def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: Scalar,
    spheres: Spheres,
    radius: Radius = "current",
) -> Transformation:
    r"""Any direction on spheres of fixed radius: both the update and the weights are normalised.

    x <- R n(x - eta R n(q)),  n(x) = x / ||x|| per group and q the updates of `inner`

    A tangential q turns every group by arctan(eta) in every step, whatever its gradient and radius, and
    none turns it by more than arcsin(eta), but for the rounding of low precision. Weight decay has
    nothing left to do there.

    Args:
      inner: what gives the direction, without a learning rate, whose sign would turn it:
        `optax.scale_by_adam()` and not `optax.adam(1e-3)`, `optax.scale_by_lion()`, `optax.identity()`,
        or with transported momentum `so.ema(0.9, spheres, transport=True)`.
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; the rest, and groups of one coordinate, take
        `inner`'s updates as they are, times -eta. `so.Sphere(())` is a whole matrix, as published;
        `so.Sphere((0,))` keeps the matrices of a stack (experts, scanned layers, heads) apart.
      radius: R. "current": what it is before the step; "initial": what it was at `init`, kept in the
        state, without drift in low precision; or a number. Weights that are zero move freely, and
        keep the radius that they get with the first two.

    Returns:
      A `GradientTransformationExtraArgs`. State: that of `inner`, and one number per group with
      "initial".

    Raises:
      ValueError: if `inner` is no transformation or `radius` none of these, if `spheres` does not fit
        the parameters; in `update`, if `params` is missing.

    >>> tx = so.hyperball(optax.scale_by_sign(), 0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 0.0]])}
    >>> grads = {"kernel": jnp.array([[0.0, 7.0], [0.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[2.]], dtype=float32)}

    Source: Wen et al., "Fantastic pretraining optimizers and where to find them II: hyperball
    optimization" (2026).
    """
    return optax.chain(
        require_transformation("hyperball", inner),
        normalize(spheres),
        optax.scale_by_learning_rate(learning_rate),
        retract(spheres, radius),
    )


def adamh(
    learning_rate: Scalar,
    spheres: Spheres,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    radius: Radius = "initial",
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """AdamH: `hyperball` with Adam's direction.

    x <- R n(x - eta R n(m / (sqrt(v) + eps))), with the debiased m and v of [8] and [9]

    Args:
      learning_rate: eta, a number or a schedule; no step turns by more than arcsin(eta).
      spheres: how the leaves split into groups; the rest gets AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      radius: R, as in `hyperball`.
      weight_decay: a number or a schedule; decoupled, and only off the spheres.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m and v, and one number per group with "initial".

    Raises:
      ValueError: as `hyperball`.

    >>> tx = so.adamh(0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[4.0], [-3.0]])}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[5.]], dtype=float32)}

    Source: Wen et al. (2026), as in `hyperball`.
    """
    inner = optax.chain(_adam(b1, b2, eps, mu_dtype), add_decay_off_spheres(spheres, weight_decay))
    return hyperball(inner, learning_rate, spheres, radius)


def muonh(
    learning_rate: Scalar,
    spheres: Spheres,
    beta: jax.typing.ArrayLike = 0.95,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    radius: Radius = "initial",
    weight_decay: Scalar = 0.0,
    mu_dtype: Any | None = None,
) -> Transformation:
    """MuonH: `hyperball` with Muon's direction, the momentum made orthogonal as a matrix.

    On spheres the last axis is the output of the matrix, as in Flax, the other summed axes its input,
    and the remaining index axes tell the matrices of a stack apart. What is on no sphere, or has no
    input (a bias tied to its kernel), takes Adam's direction at the same learning rate. For another
    layout or rate, compose `hyperball`, `optax.contrib.scale_by_muon` and `optax.partition`.

    Args:
      learning_rate: eta, a number or a schedule; no step turns by more than arcsin(eta).
      spheres: how the leaves split into groups; the rest gets AdamW.
      beta: decay of Muon's momentum, which is Nesterov's.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's, outside the root.
      radius: R, as in `hyperball`.
      weight_decay: a number or a schedule; decoupled, and only off the spheres.
      mu_dtype: dtype of the momenta; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: one momentum on the spheres, m and v elsewhere, and
      one number per group with "initial".

    Raises:
      ValueError: as `hyperball`.

    >>> tx = so.muonh(0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.eye(3)}
    >>> updates, _ = tx.update({"kernel": jnp.ones((3, 3))}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[1.732]], dtype=float32)}

    Source: Wen et al. (2026), as in `hyperball`; Jordan et al., "Muon" (2024), whose Nesterov
    momentum beta m + (1 - beta) grad this is. `optax.contrib.scale_by_muon`, which makes it orthogonal
    here, has Dozat's.
    """

    muon = optax.chain(
        ema(beta, nesterov=True, accumulator_dtype=mu_dtype), _orthogonalize(spheres)
    )
    adam = _adam(b1, b2, eps, mu_dtype)

    def by_shape(params):
        # A label also for a None, or the masks would not fit the parameters.
        labels = jax.tree.map(
            lambda matrix: "muon" if matrix else "adam",
            _matrices(spheres, params),
            is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
        )
        # As a function, because a tree of Equinox could be called itself.
        return optax.partition({"muon": muon, "adam": adam}, lambda _: labels)

    def init(params):
        return by_shape(params).init(params)

    def update(updates, state, params=None, **extra_args):
        # Not from the updates, among which any may be missing.
        return by_shape(require_params(params)).update(updates, state, params, **extra_args)

    directions = optax.GradientTransformationExtraArgs(init, update)
    inner = optax.chain(directions, add_decay_off_spheres(spheres, weight_decay))
    return hyperball(inner, learning_rate, spheres, radius)


def _adam(b1: Any, b2: Any, eps: Any, mu_dtype: Any) -> Transformation:
    return quotient(ema(b1, accumulator_dtype=mu_dtype), rms(b2, eps))


def _orthogonalize(spheres: Spheres) -> optax.GradientTransformation:
    """Muon without its momentum: U V^T, nearly, of the updates U S V^T."""

    def update(updates, params):
        muon = scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers=lambda tree: _matrices(spheres, tree),
        )
        # The products of matrices need them whole, and in float16 eps would be 0.
        whole = jax.tree.map(lambda x: replicate(upcast(x)), updates)
        with jax.numpy_dtype_promotion("standard"):
            found, _ = muon.update(whole, muon.init(whole))
        return cast_like(jax.tree.map(lambda x, y: reshard_like(y, x), updates, found), params)

    return optax.stateless(update)


def _matrices(spheres: Spheres, tree: Any) -> Any:
    """Which axes are the two sides of Muon's matrix; None where there is none."""

    def matrix(leaf: ArrayGroups | None) -> MuonDimensionNumbers | None:
        if leaf is None:
            return None
        output = len(leaf.shape) - 1
        inputs = tuple(axis for axis in leaf.summed if axis != output)
        longer = any(leaf.shape[axis] > 1 for axis in inputs)
        return MuonDimensionNumbers(inputs, output) if longer else None

    # Not `with_tangent_space`, which depends on ties, and thus on what a mask has left of the tree.
    groups = match(spheres, tree)
    return jax.tree.unflatten(groups.treedef, [matrix(leaf) for leaf in groups.leaves])
