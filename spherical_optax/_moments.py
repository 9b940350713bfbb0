r"""First and second moments that live on spheres: the `a` and the `b` of x <- x - eta a / b [3].

Each is an Optax gradient transformation, fed with the gradient (and its L2 term) and usable alone in
`optax.chain`. Leaves off the spheres, and groups of one coordinate, are treated element-wise, exactly
as Optax does. Updates come back in the dtype of the parameters.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._groups import Groups
from spherical_optax._spheres import Spheres, match


class EmaState(NamedTuple):
    """State of `ema`."""

    count: jax.typing.ArrayLike  # steps taken, int32
    ema: optax.Updates
    kept: optax.Updates | None  # per group: <m, u> (transport alone) or r (rescale alone)


class TraceState(NamedTuple):
    """State of `trace`."""

    trace: optax.Updates
    kept: optax.Updates | None


class RmsState(NamedTuple):
    """State of `rms`."""

    count: jax.typing.ArrayLike  # steps taken, int32
    nu: optax.Updates  # one number per group on the spheres
    radius: optax.Updates | None  # per group, at the last step


class QuotientState(NamedTuple):
    """State of `quotient`."""

    a: optax.OptState
    b: optax.OptState


def ema(
    decay: jax.typing.ArrayLike,
    spheres: Spheres = None,
    *,
    transport: bool = False,
    rescale: bool = False,
    debias: bool = True,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average that follows its spheres.

    m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + (1 - decay) g_k, and m_k / (1 - decay^{k+1}) comes out
    [19]. Gamma, the parallel transport of the tangential part from the last point to this one, is there
    with `transport`, the ratio of radii with `rescale`.

    No parameters are stored: where the step is a multiple of m in each group (and the point may besides
    be scaled, by decoupled decay or retraction), both points and m lie in one plane, in which transport
    followed by the ratio *is* the projection of m on the tangent space at the new point. Without the
    ratio, the projection gets back the length of the tangential part, as Gamma is an isometry. After a
    step that leaves the plane (an element-wise division) it is a vector transport by projection instead.

    Args:
      decay: rate of decay.
      spheres: how the leaves split into groups; used only by `transport` and `rescale`.
      transport: move the average to the tangent space of the present point; needs `params`.
      rescale: multiply it by the ratio of the radii; needs `params`.
      debias: divide by 1 - decay^{k+1}.
      accumulator_dtype: dtype of the average; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: the average, and with exactly one of `transport` and
      `rescale` one number per group.

    Raises:
      ValueError: in `init` and `update` if `spheres` does not fit, in `update` if `params` is missing.

    >>> tx = optax.chain(so.ema(0.9, so.Sphere(), transport=True, rescale=True), optax.scale(-0.1))
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["kernel"].shape
    (4, 2)

    Source: [19]; the radial part of m is dropped, as in the authors' released code.
    """
    momentum = _Momentum(decay, 1 - decay, spheres, transport, rescale)

    def init(params):
        mu = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return EmaState(jnp.zeros([], jnp.int32), mu, momentum.init(params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        mu, kept = momentum.update(updates, state.ema, state.kept, params)
        count = optax.safe_increment(state.count)
        out = _output(updates, mu)
        out = optax.tree.bias_correction(out, decay, count) if debias else out
        return _cast_like(out, params), EmaState(count, _cast_like(mu, state.ema), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def trace(
    decay: jax.typing.ArrayLike,
    spheres: Spheres = None,
    *,
    transport: bool = False,
    rescale: bool = False,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sum of past updates that follows its spheres: heavy-ball momentum.

    m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + g_k: [6] with the transport and the ratio of [19]. See
    `ema` for what they mean and why no parameters are stored.

    Args:
      decay: rate of decay (the momentum).
      spheres: how the leaves split into groups; used only by `transport` and `rescale`.
      transport: move the sum to the tangent space of the present point; needs `params`.
      rescale: multiply it by the ratio of the radii; needs `params`.
      accumulator_dtype: dtype of the sum; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State as that of `ema`, without the count.

    Raises:
      ValueError: in `init` and `update` if `spheres` does not fit, in `update` if `params` is missing.

    >>> tx = so.trace(0.9)
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    >>> updates
    {'kernel': Array([1.9, 1.9], dtype=float32)}

    Source: [6] and [19]; the radial part of m is dropped, as in the authors' released code.
    """
    momentum = _Momentum(decay, 1, spheres, transport, rescale)

    def init(params):
        sums = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return TraceState(sums, momentum.init(params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        sums, kept = momentum.update(updates, state.trace, state.kept, params)
        out = _cast_like(_output(updates, sums), params)
        return out, TraceState(_cast_like(sums, state.trace), kept)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Momentum:
    """m <- decay (r' / r) Gamma(m) + gain g, what `ema` and `trace` have in common."""

    decay: jax.typing.ArrayLike
    gain: jax.typing.ArrayLike
    spheres: Spheres
    transport: bool
    rescale: bool

    def init(self, params: Any) -> Any:
        groups = match(self.spheres, params).curved()
        return zero_per_group(params, groups) if self.transport != self.rescale else None

    def update(self, updates: Any, moment: Any, kept: Any, params: Any) -> tuple[Any, Any]:
        groups = match(self.spheres, updates).curved()
        if self.transport or self.rescale:
            params = given(params)
        if self.transport and self.rescale:
            moment = geometry.project(params, moment, groups)
        elif self.transport:
            radial = _radial(updates, params, groups)
            restored = self._isometry(moment, kept, radial, params, groups)
            moment = geometry.scale(geometry.project(params, moment, groups), restored, groups)
            # The projection is tangential: only the new term brings a radial part.
            kept = groups.scalars(lambda q: _scalar(self.gain, q.dtype) * q, radial)
        elif self.rescale:
            radius = geometry.norm(params, groups)
            moment = geometry.scale(moment, _ratio(kept, radius, groups), groups)
            kept = radius
        kept = None if self.transport == self.rescale else groups.stored(kept)
        return _mix(updates, moment, self.decay, self.gain), kept

    def _isometry(self, moment: Any, before: Any, coming: Any, params: Any, groups: Groups) -> Any:
        """What gives the projection of m the length of its tangential part at the last point.

        Both lengths follow from ||m||^2 and the radial part of m, `before` and now. Where m is radial
        to working precision they do not, and the length is left alone.
        """

        def factor(mm, before, now, xx, coming):
            old, new = mm - before * before, mm - now * now
            tiny = 100 * jnp.finfo(mm.dtype).eps * mm
            # `coming` only has to be known: a sum over the parameters that nothing waited for would
            # make XLA copy them all before it overwrites them.
            there = (old > tiny) & (new > tiny) & (xx > 0) & jnp.isfinite(coming)
            return jnp.sqrt(jnp.where(there, old, 1.0) / jnp.where(there, new, 1.0))

        return groups.scalars(
            factor,
            geometry.dot(moment, moment, groups),
            before,
            _radial(moment, params, groups),
            geometry.dot(params, params, groups),
            coming,
        )


def _radial(vectors: Any, params: Any, groups: Groups) -> Any:
    """<q, u> of each group."""
    return groups.scalars(
        lambda qx, r: geometry.ratio(qx, r, otherwise=0.0),
        geometry.dot(vectors, params, groups),
        geometry.norm(params, groups),
    )


def rms(
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike = 1e-8,
    spheres: Spheres = None,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Root of the average square, one number per group on the spheres: the denominator of Adam.

    v_k = decay (r_{k-1} / r_k)^2 v_{k-1} + (1 - decay) d^{-1} ||g_k||^2 per group of d coordinates, and
    sqrt(v_k / (1 - decay^{k+1})) + eps comes out, in the shape of the updates [20]. Off the spheres v
    is element-wise [8]. The ratio of radii is there with `rescale`.

    Args:
      decay: rate of decay (b2).
      eps: added outside the root.
      spheres: how the leaves split into groups; None is element-wise everywhere.
      reduce: "mean" as in [20], or "sum", without d^{-1}, as in AdamG.
      rescale: multiply v by the squared ratio of the radii; needs `params`.

    Returns:
      A `GradientTransformationExtraArgs`. State: on the spheres v, and the radius with `rescale`, each
      one number per group in at least float32; elsewhere v like the parameters.

    Raises:
      ValueError: if `reduce` is unknown, in `init` and `update` if `spheres` does not fit, in `update`
        if `rescale` and `params` is missing.

    >>> tx = so.rms(0.99, spheres=so.Sphere())
    >>> g = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx.update(g, tx.init(g))[0]  # sqrt((9 + 16) / 2)
    {'kernel': Array([[3.536],
           [3.536]], dtype=float32)}

    Source: [8], [9] and [20].
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"rms: reduce is {reduce!r}, not 'mean' or 'sum'")

    def squares(g, groups):
        return groups.sum(jnp.square, g, mean=reduce == "mean", off=jnp.square)

    def init(params):
        groups = match(spheres, params).curved()
        nu = squares(optax.tree.zeros_like(params), groups)
        radius = zero_per_group(params, groups) if rescale else None
        return RmsState(jnp.zeros([], jnp.int32), nu, radius)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match(spheres, updates).curved()
        nu, radius = state.nu, None
        if rescale:
            radius = groups.stored(geometry.norm(given(params), groups))
            # Twice, not squared: the square of a large ratio overflows where the product does not.
            change = _ratio(state.radius, radius, groups)
            nu = groups.scalars(lambda v, c: c * (c * v), nu, change, off=lambda v, _: v)
        nu = _mix(squares(updates, groups), nu, decay, 1 - decay)
        count = optax.safe_increment(state.count)
        out = optax.tree.bias_correction(_output(updates, nu), decay, count)
        out = jax.tree.map(lambda v: jnp.sqrt(v) + _scalar(eps, v.dtype), out)
        out = groups.map(lambda g, b: jnp.broadcast_to(b, g.shape), updates, out, off=_second)
        return _cast_like(out, params), RmsState(count, _cast_like(nu, state.nu), radius)

    return optax.GradientTransformationExtraArgs(init, update)


def quotient(
    a: optax.GradientTransformation, b: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds both with the same updates and divides what comes out: a / b element-wise [3].

    Where b is 0 the quotient is 0: a parameter that never had a gradient stays, whatever the eps.

    Args:
      a: the numerator, e.g. `so.ema(0.9)`.
      b: the denominator, e.g. `so.rms(0.999)`.

    Returns:
      A `GradientTransformationExtraArgs` with the states of both.

    Raises:
      ValueError: what `a` and `b` raise.

    >>> tx = so.quotient(so.ema(0.9), so.rms(0.999))  # optax.scale_by_adam()
    >>> g = {"kernel": jnp.array([-2.0, 0.0, 5.0])}
    >>> tx.update(g, tx.init(g), g)[0]
    {'kernel': Array([-1.,  0.,  1.], dtype=float32)}

    Source: the generic scheme, [3] and [4].
    """
    a, b = optax.with_extra_args_support(a), optax.with_extra_args_support(b)

    def init(params):
        return QuotientState(a.init(params), b.init(params))

    def update(updates, state, params=None, **extra_args):
        top, a_state = a.update(updates, state.a, params, **extra_args)
        bottom, b_state = b.update(updates, state.b, params, **extra_args)
        updates = jax.tree.map(_divide, top, bottom)
        return updates, QuotientState(a_state, b_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, jnp.zeros_like(a), a / jnp.where(b == 0, jnp.ones_like(b), b))


def _second(_: Any, y: Any) -> Any:
    return y


def zero_per_group(params: Any, groups: Groups) -> Any:
    # Summed from zeros rather than made: shape, dtype and sharding are then those of every later sum.
    return groups.stored(geometry.norm(optax.tree.zeros_like(params), groups))


def _ratio(before: Any, now: Any, groups: Groups) -> Any:
    """before / now, and 1 for groups that were or are zero."""
    return groups.scalars(lambda b, n: jnp.where(b > 0, geometry.ratio(b, n), 1.0), before, now)


def _mix(updates: Any, moment: Any, decay: Any, gain: Any) -> Any:
    """gain * updates + decay * moment in Optax's order of operations; no update, no change."""

    def mix(g, m):
        if g is None:
            return m
        dtype = jnp.promote_types(g.dtype, m.dtype)
        kept = (_scalar(decay, m.dtype) * m).astype(dtype)
        return (_scalar(gain, g.dtype) * g).astype(dtype) + kept

    return jax.tree.map(mix, updates, moment, is_leaf=lambda x: x is None)


def _scalar(value: Any, dtype: Any) -> Any:
    """A hyper-parameter for arrays of this dtype: Python numbers are weakly typed already."""
    return value if type(value) in (int, float) else jnp.asarray(value, dtype)


def _output(updates: Any, values: Any) -> Any:
    """`values`, where there are updates: Equinox leaves out what it does not differentiate."""
    return jax.tree.map(
        lambda g, v: None if g is None else v, updates, values, is_leaf=lambda x: x is None
    )


def _cast_like(tree: Any, like: Any) -> Any:
    if like is None:
        return tree
    return jax.tree.map(
        lambda x, y: None if x is None else x.astype(y.dtype),
        tree,
        like,
        is_leaf=lambda x: x is None,
    )


def given(params: Any) -> Any:
    if params is None:
        raise ValueError(
            "this transformation moves with the parameters: call update(updates, state, params)"
        )
    return params
