"""AdamP and SGDP: the radial part of the step removed, where the spheres are declared or guessed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._core.arguments import is_constant_zero, require_params, weight_decay_at
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_zero, sqrt
from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._core.trees import as_dtype, cast_like, drop_missing
from spherical_optax._transforms.momentum import ema, trace
from spherical_optax._transforms.quotient import quotient
from spherical_optax._transforms.second_moment import rms

Scalar = optax.ScalarOrSchedule
Transformation = optax.GradientTransformationExtraArgs


def adamp(
    learning_rate: Scalar,
    spheres: Spheres = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    mu_dtype: Any | None = None,
) -> Transformation:
    r"""AdamP: AdamW with the radial part of its steps removed on the spheres, and less decay there.

    p = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), element-wise as in Adam, then per group
    x <- x - eta (p - <p, u> u) - eta lambda wd_ratio x,  and elsewhere  x <- x - eta p - eta lambda x

    Without `spheres` they are guessed at every step as in the paper: every array of two axes or more
    is tested, first with its output channels (the last axis) as groups, then as one group, and counts
    as invariant if |cos(grad, x)| < delta / sqrt(d) in all of them, d coordinates each. One in twelve
    arrays with gradients of noise passes. With `spheres`, found or declared, nothing is guessed.

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; None guesses. A tree of None has no spheres: AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root; in the guess, the least length and what is added to ||x||.
      weight_decay: lambda, a number or a schedule; decoupled as in AdamW.
      delta: how small the cosine has to be.
      wd_ratio: factor of the weight decay on the spheres.
      nesterov: b1 m + (1 - b1) grad in place of m.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m and v.

    Raises:
      ValueError: if `spheres` does not fit the parameters; in `update`, if `params` is missing.

    >>> tx = so.adamp(0.1, so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates
    {'kernel': Array([[-0. ],
           [-0.1]], dtype=float32)}

    Source: Heo et al., "AdamP: slowing down the slowdown for momentum optimizers on scale-invariant
    weights" (2021), Algorithm 2 and section 3.2. Deviation: a group of one coordinate is never
    invariant.
    """
    direction = quotient(ema(b1, nesterov=nesterov, accumulator_dtype=mu_dtype), rms(b2, eps))
    return optax.chain(
        _tangential(direction, spheres, weight_decay, wd_ratio, delta, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgdp(
    learning_rate: Scalar,
    spheres: Spheres = None,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    weight_decay: Scalar = 0.0,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any | None = None,
) -> Transformation:
    """SGDP: SGD with momentum, and the radial part of its steps removed on the spheres.

    m <- momentum m + grad, and then `adamp`'s step with p = m and lambda / (1 - momentum).

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; None guesses as in `adamp`.
      momentum: decay of m; below 1 with weight decay.
      weight_decay: lambda, a number or a schedule; decoupled, times 1 / (1 - momentum).
      delta: how small the cosine has to be.
      wd_ratio: factor of the weight decay on the spheres.
      nesterov: p = grad + momentum m in place of m.
      eps: in the guess, the least length and what is added to ||x||.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m.

    Raises:
      ValueError: if `momentum` is 1 with weight decay, if `spheres` does not fit the parameters; in
        `update`, if `params` is missing.

    >>> tx = so.sgdp(0.1, so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates
    {'kernel': Array([[-0. ],
           [-0.4]], dtype=float32)}

    Source: Heo et al. (2021), Algorithm 1. As in their released code m itself loses its radial part,
    unless `nesterov`.
    """
    return optax.chain(
        _tangential(
            trace(momentum, nesterov=nesterov, accumulator_dtype=mu_dtype),
            spheres,
            _over_rest(weight_decay, momentum),
            wd_ratio,
            delta,
            eps,
            into_trace=not nesterov,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


class TangentialState(NamedTuple):
    """State of `adamp` and `sgdp` but for the learning rate's."""

    MOMENTS = Moments()

    count: jax.typing.ArrayLike  # steps taken, int32
    direction: optax.OptState


def _tangential(
    direction: Transformation,
    spheres: Spheres,
    weight_decay: Scalar,
    wd_ratio: Any,
    delta: Any,
    eps: Any,
    into_trace: bool = False,
) -> Transformation:
    """What `direction` gives without its radial part, and with decoupled weight decay.

    Args:
      direction: the transformation that yields p.
      spheres, weight_decay, wd_ratio, delta, eps: as in `adamp`.
      into_trace: the momentum of `direction` becomes what comes out, before weight decay.
    """

    def init(params):
        match(spheres, params)
        return TangentialState(jnp.zeros([], jnp.int32), direction.init(params))

    def update(updates, state, params=None, **extra_args):
        params = require_params(params)
        inner: Any
        steps, inner = direction.update(updates, state.direction, params, **extra_args)
        if into_trace:
            steps = drop_missing(updates, inner.trace)  # in its own dtype
        if spheres is None:
            steps, decay_factors = _guessed(updates, steps, params, wd_ratio, delta, eps)
        else:
            groups = match(spheres, steps).with_tangent_space()
            steps = geometry.project(params, steps, groups)
            decay_factors = jax.tree.map(lambda off: 1.0 if off else wd_ratio, groups.off())
        if into_trace:
            inner = inner._replace(trace=_or_else(steps, inner.trace))
        steps = cast_like(steps, params)
        decay = weight_decay_at(weight_decay, state.count)
        if decay is not None:
            steps = jax.tree.map(
                lambda p, x, r: None if p is None else p + as_dtype(decay * r, p.dtype) * x,
                steps,
                params,
                decay_factors,
                is_leaf=lambda x: x is None,
            )
        count = optax.safe_increment(state.count)
        return steps, TangentialState(count, inner)

    return Transformation(init, update)


def _guessed(
    grads: Any, steps: Any, params: Any, wd_ratio: Any, delta: Any, eps: Any
) -> tuple[Any, Any]:
    """`steps` without the radial part where the test passes, and the factors of the weight decay."""
    filters = match(lambda tree: jax.tree.map(_has_filters, tree), steps)
    filter_wise, layer_wise, neither = range(3)

    def invariant(gg, gx, xx, *, size):
        least = as_dtype(eps, gg.dtype)
        lengths = jnp.maximum(sqrt(gg), least) * jnp.maximum(sqrt(xx), least)
        cosine = divide_or_zero(jnp.abs(gx), lengths)
        return jnp.all(cosine < as_dtype(delta, gg.dtype) / size**0.5) if size > 1 else False

    def test(step, *sums):
        whole = invariant(*map(_total, sums), size=step.size)
        return jnp.where(
            invariant(*sums, size=step.size // max(sums[0].size, 1)),
            filter_wise,
            jnp.where(whole, layer_wise, neither),
        )

    def coefficient(found, px, xx):
        def of(px, xx):
            return divide_or_zero(px, (sqrt(xx) + as_dtype(eps, xx.dtype)) ** 2)

        by_layer = jnp.where(found == layer_wise, of(_total(px), _total(xx)), 0.0)
        return jnp.where(found == filter_wise, of(px, xx), by_layer)

    gg, gx = geometry.dot(grads, grads, filters), geometry.dot(grads, params, filters)
    px, xx = geometry.dot(steps, params, filters), geometry.dot(params, params, filters)
    found = filters.map_per_group(test, steps, gg, gx, xx)
    radial = filters.map_per_group(coefficient, found, px, xx)
    decay_factors = filters.map_per_group(
        lambda case: jnp.where(case == neither, 1.0, wd_ratio), found, off=lambda _: 1.0
    )
    return filters.map(lambda p, x, c: p - c * x, steps, params, radial), decay_factors


def _has_filters(x: Any) -> Sphere | None:
    return Sphere() if jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating) else None


def _total(sums: jax.Array) -> jax.Array:
    return jnp.sum(sums, keepdims=True)


def _or_else(tree: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda x, y: y if x is None else x, tree, other, is_leaf=lambda x: x is None
    )


def _over_rest(weight_decay: Scalar, momentum: Any) -> Scalar:
    """weight_decay / (1 - momentum)"""
    if is_constant_zero(weight_decay):
        return 0.0
    rest = 1 - momentum
    if is_constant_zero(rest):
        raise ValueError("sgdp: momentum is 1, so there is no weight_decay / (1 - momentum)")
    if callable(weight_decay):
        return lambda count: weight_decay(count) / rest
    return weight_decay / rest
