"""AdamP and SGDP: they remove the radial part of the step on spheres, declared or guessed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._core.arguments import get_weight_decay, is_constant_zero, require_params
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.matching import match, match_updates
from spherical_optax._core.moments import Moments
from spherical_optax._core.safe_math import divide_or_zero, sqrt
from spherical_optax._core.shapes import Scalar, Transformation
from spherical_optax._core.sphere import Sphere, Spheres
from spherical_optax._core.trees import as_dtype, cast_like, drop_missing
from spherical_optax._transforms.learning_rate import scale_by_learning_rate
from spherical_optax._transforms.momentum import ema, trace
from spherical_optax._transforms.quotient import quotient
from spherical_optax._transforms.second_moment import rms


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
    r"""AdamP: AdamW that removes the radial part of its steps on the spheres, and decays less there.

    Use this when you want tangential steps, but the second moment and the weight decay of AdamW.

    p = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    x <- x - eta (p - <p, u> u) - eta lambda wd_ratio x    in every group, with u = x / ||x||
    x <- x - eta p - eta lambda x                          off the spheres

    With `spheres`, found or declared, nothing is guessed. Without them, every step guesses as in the
    paper: it tests every array of two axes or more, first with its output channels (the last axis) as
    groups, then as one group. The array counts as invariant if |cos(grad, x)| < delta / sqrt(d) in all
    groups of d coordinates each. On random gradients this is wrong for one array in twelve.

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; None guesses. A tree of None declares no
        spheres: the optimizer is then AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the root; in the guess, the least length in the cosine and the term added to
        ||x||.
      weight_decay: lambda, a number or a schedule; decoupled as in AdamW.
      delta: bound of the cosine in the guess; for experiments.
      wd_ratio: factor of the weight decay on the spheres.
      nesterov: use b1 m + (1 - b1) grad in place of m.
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
        _remove_radial_part(direction, spheres, weight_decay, Guess(delta, eps, wd_ratio)),
        scale_by_learning_rate(learning_rate),
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
    """SGDP: SGD with momentum that removes the radial part of its steps on the spheres.

    Use this when you train with SGD and momentum, and want tangential steps.

    m <- momentum m + grad

    The step is that of `adamp` with p = m, and with lambda / (1 - momentum) in place of lambda.

    Args:
      learning_rate: eta, a number or a schedule.
      spheres: how the leaves split into groups; None guesses as in `adamp`.
      momentum: decay of m; below 1 with weight decay.
      weight_decay: lambda, a number or a schedule; decoupled, times 1 / (1 - momentum).
      delta: bound of the cosine in the guess, as in `adamp`; for experiments.
      wd_ratio: factor of the weight decay on the spheres.
      nesterov: use p = grad + momentum m in place of p = m.
      eps: in the guess, the least length in the cosine and the term added to ||x||.
      mu_dtype: dtype of m; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State per parameter: m.

    Raises:
      ValueError: if `momentum` is 1 with weight decay, or `spheres` does not fit the parameters; in
        `update`, if `params` is missing.

    >>> tx = so.sgdp(0.1, so.Sphere())
    >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
    >>> updates
    {'kernel': Array([[-0. ],
           [-0.4]], dtype=float32)}

    Source: Heo et al. (2021), Algorithm 1. As in their released code, m itself loses its radial part,
    except with `nesterov`.
    """
    return optax.chain(
        _remove_radial_part(
            trace(momentum, nesterov=nesterov, accumulator_dtype=mu_dtype),
            spheres,
            _scale_weight_decay(weight_decay, momentum),
            Guess(delta, eps, wd_ratio),
            store_in_trace=not nesterov,
        ),
        scale_by_learning_rate(learning_rate),
    )


class TangentialState(NamedTuple):
    """State of `adamp` and `sgdp`, without that of the learning rate."""

    MOMENTS = Moments()

    count: jax.typing.ArrayLike  # steps taken, int32
    direction: optax.OptState


class Guess(NamedTuple):
    """The test of AdamP for invariant groups."""

    delta: Any  # a group of d coordinates is invariant if |cos(grad, x)| < delta / sqrt(d)
    eps: Any  # the least length in the cosine, and the term added to ||x|| in the projection
    wd_ratio: Any  # factor of the weight decay on invariant groups

    def are_invariant(self, gg: Any, gx: Any, xx: Any, *, size: int) -> Any:
        """Tests whether all groups of an array, of `size` coordinates each, are invariant."""
        if size < 2:
            return False
        least = as_dtype(self.eps, gg.dtype)
        lengths = jnp.maximum(sqrt(gg), least) * jnp.maximum(sqrt(xx), least)
        cosine = divide_or_zero(jnp.abs(gx), lengths)
        return jnp.all(cosine < as_dtype(self.delta, gg.dtype) / size**0.5)

    def divide_by_square(self, px: Any, xx: Any) -> Any:
        """Computes <p, x> / (||x|| + eps)^2, the factor of x in the radial part of p."""
        return divide_or_zero(px, (sqrt(xx) + as_dtype(self.eps, xx.dtype)) ** 2)


def _remove_radial_part(
    direction: Transformation,
    spheres: Spheres,
    weight_decay: Scalar,
    guess: Guess,
    store_in_trace: bool = False,
) -> Transformation:
    """Removes the radial part of the steps of `direction`, and adds decoupled weight decay.

    Args:
      direction: the transformation that yields p.
      spheres, weight_decay: as in `adamp`.
      guess: how to guess the spheres, if `spheres` is None; the factor of the weight decay in any case.
      store_in_trace: store the tangential step, before weight decay, as the momentum of `direction`.
    """

    def init(params):
        match(spheres, params)
        return TangentialState(jnp.zeros([], jnp.int32), direction.init(params))

    def update(updates, state, params=None, **extra_args):
        params = require_params(params)
        inner: Any
        steps, inner = direction.update(updates, state.direction, params, **extra_args)
        if store_in_trace:
            steps = drop_missing(updates, inner.trace)  # in the dtype of the momentum
        if spheres is None:
            steps, decay_factors = _project_guessed(updates, steps, params, guess)
        else:
            groups = match_updates(spheres, steps, params).with_tangent_space()
            steps = geometry.project(params, steps, groups)
            decay_factors = groups.label(
                steps, lambda leaf: 1.0 if leaf is None else guess.wd_ratio
            )
        if store_in_trace:
            inner = inner._replace(trace=_fill_missing(steps, inner.trace))
        steps = cast_like(steps, params)
        decay = get_weight_decay(weight_decay, state.count)
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

    return Transformation(init, with_open_boxes(update))


def _project_guessed(grads: Any, steps: Any, params: Any, guess: Guess) -> tuple[Any, Any]:
    """Projects `steps` where the guess finds spheres; also returns the factors of the weight decay."""
    filters = match(lambda tree: jax.tree.map(_choose_sphere, tree), steps)
    filter_wise, layer_wise, neither = range(3)

    def find_case(step, gg, gx, xx):
        gg_all, gx_all, xx_all = (jnp.sum(sums, keepdims=True) for sums in (gg, gx, xx))
        whole = guess.are_invariant(gg_all, gx_all, xx_all, size=step.size)
        return jnp.where(
            guess.are_invariant(gg, gx, xx, size=step.size // max(gg.size, 1)),
            filter_wise,
            jnp.where(whole, layer_wise, neither),
        )

    def compute_factor(case, px, xx):
        px_all, xx_all = (jnp.sum(sums, keepdims=True) for sums in (px, xx))
        by_layer = jnp.where(case == layer_wise, guess.divide_by_square(px_all, xx_all), 0.0)
        return jnp.where(case == filter_wise, guess.divide_by_square(px, xx), by_layer)

    gg, gx = geometry.dot(grads, grads, filters), geometry.dot(grads, params, filters)
    px, xx = geometry.dot(steps, params, filters), geometry.dot(params, params, filters)
    cases = filters.map_per_group(find_case, steps, gg, gx, xx)
    factors = filters.map_per_group(compute_factor, cases, px, xx)
    decay_factors = filters.map_per_group(
        lambda case: jnp.where(case == neither, 1.0, guess.wd_ratio), cases, off=lambda _: 1.0
    )
    return filters.map(lambda p, x, c: p - c * x, steps, params, factors), decay_factors


def _choose_sphere(x: Any) -> Sphere | None:
    return Sphere() if jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating) else None


def _fill_missing(tree: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda x, y: y if x is None else x, tree, other, is_leaf=lambda x: x is None
    )


def _scale_weight_decay(weight_decay: Scalar, momentum: Any) -> Scalar:
    """Computes weight_decay / (1 - momentum), the decay per step of SGDP."""
    if is_constant_zero(weight_decay):
        return 0.0
    rest = 1 - momentum
    if is_constant_zero(rest):
        raise ValueError("sgdp: momentum is 1, so there is no weight_decay / (1 - momentum)")
    if callable(weight_decay):
        return lambda count: weight_decay(count) / rest
    return weight_decay / rest
