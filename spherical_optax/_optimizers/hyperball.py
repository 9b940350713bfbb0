"""Hyperball optimizers: any direction, on spheres of fixed radius, with steps of a known angle."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from spherical_optax._core.arguments import (
    OTHER_SPHERES,
    require_params,
    require_parts,
    require_transformation,
)
from spherical_optax._core.array_groups import ArrayGroups, replicate, reshard_like
from spherical_optax._core.boxes import box_like, to_dictionaries, with_open_boxes
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.paths import list_leaves
from spherical_optax._core.safe_math import sqrt, upcast
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import cast_like
from spherical_optax._transforms.constraints import compute_length_factor
from spherical_optax._transforms.inner_products import compute_inner_products
from spherical_optax._transforms.learning_rate import scale_by_learning_rate
from spherical_optax._transforms.momentum import ema
from spherical_optax._transforms.quotient import quotient
from spherical_optax._transforms.retract import Radius, Retraction
from spherical_optax._transforms.second_moment import rms
from spherical_optax._transforms.weight_decay import add_decay_off_spheres


def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: Scalar,
    spheres: Spheres,
    radius: Radius = "current",
) -> Transformation:
    r"""Any direction on spheres of fixed radius: both the update and the weights are normalised.

    Use this when you have a direction, and want to set the angle of every step by the learning rate.

    x <- R n(x - eta R n(q)),  n(x) = x / ||x|| per group and q the updates of `inner`

    A tangential q turns every group by arctan(eta) in every step, whatever its gradient and radius. No
    q turns it by more than arcsin(eta), except for the rounding of low precision. Weight decay has no
    effect on these spheres. A group stays where it is if the length of x - eta R n(q) is lost to
    rounding: less than about 3 % of x in float32, or squares out of range.

    Args:
      inner: transformation that yields the direction, such as `optax.scale_by_adam()`,
        `optax.scale_by_lion()`, `optax.identity()`, or with transported momentum `so.ema(0.9, spheres,
        transport=True)`. It must not contain a learning rate: the sign of one, as in
        `optax.adam(1e-3)`, would reverse the direction.
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups. All other leaves, and groups of one coordinate, get the
        updates of `inner` times -eta. `so.Sphere(())` is a whole matrix, as published; `so.Sphere((0,))`
        separates the matrices of a stack (experts, scanned layers, heads).
      radius: R. "current" is the radius before the step. "initial" is the radius at `init`: the state
        holds it, and it does not drift in low precision. A number is one radius for all groups. Weights
        that are zero move freely; with "current" and "initial", they keep their first radius above zero.

    Returns:
      A `GradientTransformationExtraArgs`. State: that of `inner`, and one number per group with
      "initial".

    Raises:
      ValueError: if `inner` is no transformation, `radius` is neither of the two words nor a positive
        number, or `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.hyperball(optax.scale_by_sign(), 0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 0.0]])}
    >>> grads = {"kernel": jnp.array([[0.0, 7.0], [0.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[2.]], dtype=float32)}

    Source: Wen et al., "Fantastic pretraining optimizers and where to find them II: hyperball
    optimization" (2026).
    """
    inner = optax.with_extra_args_support(require_transformation("hyperball", inner))
    step: Any = _step_by_an_angle(learning_rate, spheres, radius)

    def init(params):
        return (inner.init(params), *step.init(params))

    def update(updates, state, params=None, **extra_args):
        inner_state, *states = require_parts("hyperball", state, 4)
        directions, inner_state = inner.update(updates, inner_state, params, **extra_args)
        steps, states = step.update(directions, tuple(states), params)
        return steps, (inner_state, *states)

    return optax.GradientTransformationExtraArgs(init, update)


def _step_by_an_angle(
    learning_rate: Scalar, spheres: Spheres, radius: Radius
) -> optax.GradientTransformationExtraArgs:
    """Steps and states of chain(normalize, scale_by_learning_rate, retract), without its array x + q.

    With q = -eta r n(d), ||x + q||^2 follows from <d, d>, <d, x> and <x, x>, one pass over the arrays.
    """
    rate, retraction = scale_by_learning_rate(learning_rate), Retraction(spheres, radius)

    def init(params):
        return optax.EmptyState(), rate.init(params), retraction.init(params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        normalize_state, rate_state, retract_state = state
        groups = match_updates(spheres, updates, params).with_tangent_space()
        products = compute_inner_products({"gg", "gx", "xx"}, groups, g=updates, x=params)
        radii = groups.map_per_group(sqrt, products.xx)
        factors = groups.map_per_group(compute_length_factor, radii, products.gg)
        factors, rate_state = rate.update(groups.choose(factors, updates), rate_state)
        steps, retract_state = retraction.update_multiple(
            updates, factors, retract_state, params, products, groups
        )
        return steps, (normalize_state, rate_state, retract_state)

    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


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

    Use this when you want Adam on spheres of fixed radius, without weight decay to tune there.

    x <- R n(x - eta R n(m / (sqrt(v) + eps))),  n(x) = x / ||x|| per group

    m and v are Adam's debiased moments, equations [8] and [9] of the paper.

    Args:
      learning_rate: eta, a number or a schedule; no step turns by more than arcsin(eta).
      spheres: how the leaves split into groups; all other leaves get AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root.
      radius: R, as in `hyperball`.
      weight_decay: a number or a schedule; decoupled, and only off the spheres.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: m and v, and one number per group with "initial".

    Raises:
      ValueError: under the conditions of `hyperball`.

    >>> tx = so.adamh(0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[4.0], [-3.0]])}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[5.]], dtype=float32)}

    Source: Wen et al. (2026), as in `hyperball`.
    """
    inner = optax.chain(
        _make_adam(b1, b2, eps, mu_dtype), add_decay_off_spheres(spheres, weight_decay)
    )
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

    Use this when you want Muon on spheres of fixed radius, without weight decay to tune there.

    x <- R n(x - eta R n(U V^T)),  n(x) = x / ||x|| per group and U S V^T the momentum as a matrix

    On spheres the last axis is the output of the matrix, as in Flax, and the other summed axes are its
    input. The remaining index axes tell the matrices of a stack apart. Leaves on no sphere or without
    input (a bias tied to its kernel) take Adam's direction at the same learning rate. For another
    layout or rate, compose `hyperball`, `optax.contrib.scale_by_muon` and `optax.partition`.

    Args:
      learning_rate: eta, a number or a schedule; no step turns by more than arcsin(eta).
      spheres: how the leaves split into groups; all other leaves get AdamW.
      beta: decay of Muon's momentum, which is Nesterov's.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: added outside the root in Adam's direction.
      radius: R, as in `hyperball`.
      weight_decay: a number or a schedule; decoupled, and only off the spheres.
      mu_dtype: dtype of the momenta; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: one momentum on the spheres, m and v elsewhere, and
      one number per group with "initial".

    Raises:
      ValueError: under the conditions of `hyperball`.

    >>> tx = so.muonh(0.1, so.Sphere(()))
    >>> params = {"kernel": jnp.eye(3)}
    >>> updates, _ = tx.update({"kernel": jnp.ones((3, 3))}, tx.init(params), params)
    >>> so.geometry.norm(optax.apply_updates(params, updates), so.Sphere(()))
    {'kernel': Array([[1.732]], dtype=float32)}

    Source: Wen et al. (2026), as in `hyperball`; Jordan et al., "Muon" (2024). The momentum is Jordan's
    form of Nesterov's, beta m + (1 - beta) grad. `optax.contrib.scale_by_muon`, which makes it
    orthogonal here, would use Dozat's form.
    """
    muon = optax.chain(
        ema(beta, nesterov=True, accumulator_dtype=mu_dtype), _orthogonalize(spheres)
    )
    adam = _make_adam(b1, b2, eps, mu_dtype)

    def partition(matrices):
        # A None gets a label too: otherwise the masks would not fit the parameters.
        labels = jax.tree.map(
            lambda matrix: "muon" if matrix else "adam", matrices, is_leaf=_is_matrix_or_none
        )
        # The labels are wrapped in a function, because an Equinox module as a tree may be callable.
        return optax.partition({"muon": muon, "adam": adam}, lambda _: labels)

    def init(params):
        params = to_dictionaries(params)  # `optax.partition` cannot mask the leaves of a FlatMap
        return partition(_find_matrices(spheres, params)).init(params)

    def update(updates, state, params=None, **extra_args):
        # The shapes are those of the parameters, because any of the updates may be missing.
        x = to_dictionaries(require_params(params))
        matrices = _find_matrices(spheres, x)
        _check_matrices(state, matrices)
        g = to_dictionaries(updates)
        found, state = partition(matrices).update(g, state, x, **extra_args)
        return box_like(updates, found), state

    directions = optax.GradientTransformationExtraArgs(init, update)
    inner = optax.chain(directions, add_decay_off_spheres(spheres, weight_decay))
    return hyperball(inner, learning_rate, spheres, radius)


def _check_matrices(state: Any, matrices: Any) -> None:
    """Raises if the state has Muon's momentum for other leaves: it was made with other spheres."""
    momentum = optax.tree.get(state.inner_states["muon"], "ema")
    found = {path for path, m in list_leaves(momentum) if m is not None}
    wanted = {path for path, matrix in list_leaves(matrices, _is_matrix_or_none) if matrix}
    if others := sorted(found ^ wanted):
        where = "the state only" if others[0] in found else "the spheres only"
        raise ValueError(
            f"muonh: {'/'.join(others[0])!r} is one of Muon's matrices in {where}: {OTHER_SPHERES}"
        )


def _is_matrix_or_none(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _make_adam(b1: Any, b2: Any, eps: Any, mu_dtype: Any) -> Transformation:
    return quotient(ema(b1, accumulator_dtype=mu_dtype), rms(b2, eps))


def _orthogonalize(spheres: Spheres) -> optax.GradientTransformation:
    """Replaces updates U S V^T by approximately U V^T: the Newton-Schulz iterations of Muon.

    This is `scale_by_muon` with beta = 0 and a fresh state, which has no momentum, until Optax exports
    `orthogonalize_via_newton_schulz`.
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        muon = scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers=lambda tree: _find_matrices(spheres, tree),
        )
        # A product of matrices needs them whole on every device. In float16, Muon's eps would be 0.
        whole = jax.tree.map(lambda x: replicate(upcast(x)), updates)
        with jax.numpy_dtype_promotion("standard"):
            found, _ = muon.update(whole, muon.init(whole))
        found = jax.tree.map(lambda x, y: reshard_like(y, x), updates, found)
        return cast_like(found, params), state

    init = optax.identity().init
    return optax.GradientTransformationExtraArgs(init, with_open_boxes(update))


def _find_matrices(spheres: Spheres, tree: Any) -> Any:
    """Finds the input and output axes of Muon's matrices; None for leaves that are no matrix."""

    def find_matrix(leaf: ArrayGroups | None) -> MuonDimensionNumbers | None:
        if leaf is None:
            return None
        output = len(leaf.shape) - 1
        inputs = tuple(axis for axis in leaf.summed if axis != output)
        longer = any(leaf.shape[axis] > 1 for axis in inputs)
        return MuonDimensionNumbers(inputs, output) if longer else None

    # Without `with_tangent_space`: it depends on ties, and a mask may have removed tied leaves.
    groups = match(spheres, tree)
    return groups.label(tree, find_matrix)
