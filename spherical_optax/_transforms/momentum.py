r"""Momentum that follows its spheres: the `a` of x <- x - eta a / b [3].

Leaves off the spheres, and groups of one coordinate, are treated element-wise, exactly as Optax does.
Updates come back in the dtype of the parameters.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._core.arguments import require_constant_decay, require_params, weight_decay_at
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.moments import Moments
from spherical_optax._core.projection import remove_radial, zeros_per_group
from spherical_optax._core.safe_math import divide_or_one, divide_or_zero, is_zero, sqrt
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import add_decay, as_dtype, cast_like, drop_missing, mix
from spherical_optax._core.trees import debias as unbias
from spherical_optax._transforms.inner_products import Products, known, sharing


class EmaState(NamedTuple):
    """State of `ema`."""

    MOMENTS = Moments(average="ema")

    count: jax.typing.ArrayLike  # steps taken, int32
    ema: optax.Updates
    kept: Any  # None, or per group: <m, u> (transport alone) or r (rescale alone)


class TraceState(NamedTuple):
    """State of `trace`."""

    MOMENTS = Moments(sum="trace")

    trace: optax.Updates
    kept: Any


def ema(
    decay: jax.typing.ArrayLike,
    spheres: Spheres = None,
    *,
    transport: bool = False,
    rescale: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    debias: bool = True,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average that follows its spheres.

    m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + (1 - decay) (g_k + lambda x_k), and what comes out is
    m_k / (1 - decay^{k+1}) [19]. Gamma, the parallel transport of the tangential part from the last
    point to this one, is there with `transport`, the ratio of radii with `rescale`.

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
      weight_decay: lambda of the L2 term, a number or a schedule; needs `params`. The same as
        `optax.add_decayed_weights` before, but g + lambda x never takes memory.
      debias: divide by 1 - decay^{k+1}.
      nesterov: decay m_k + (1 - decay) (g_k + lambda x_k) comes out in place of m_k.
      accumulator_dtype: dtype of the average; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: the average, and with exactly one of `transport` and
      `rescale` one number per group.

    Raises:
      ValueError: if `decay` is a schedule, in `init` and `update` if `spheres` does not fit, in
        `update` if `params` is missing and needed.

    >>> tx = optax.chain(so.ema(0.9, so.Sphere(), transport=True, rescale=True), optax.scale(-0.1))
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["kernel"].shape
    (4, 2)

    Source: [19]; the radial part of m is dropped, as in the authors' released code.
    """
    momentum = _Momentum(
        require_constant_decay("ema", decay), 1 - decay, spheres, transport, rescale
    )

    def init(params):
        mu = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return EmaState(jnp.zeros([], jnp.int32), mu, momentum.init(params))

    def update(updates, state, params=None, *, inner_products=None, **extra_args):
        del extra_args
        l2 = weight_decay_at(weight_decay, state.count)
        mu, kept = momentum.update(
            updates, state.ema, state.kept, params, l2, known(inner_products)
        )
        count = optax.safe_increment(state.count)
        out = momentum.ahead(updates, mu, params, l2) if nesterov else mu
        out = drop_missing(updates, out)
        out = unbias(out, decay, count) if debias else out
        return cast_like(out, params), EmaState(count, cast_like(mu, state.ema), kept)

    return sharing(init, update)


def trace(
    decay: jax.typing.ArrayLike,
    spheres: Spheres = None,
    *,
    transport: bool = False,
    rescale: bool = False,
    nesterov: bool = False,
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
      nesterov: g_k + decay m_k comes out in place of m_k.
      accumulator_dtype: dtype of the sum; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State as that of `ema`, without the count.

    Raises:
      ValueError: if `decay` is a schedule, in `init` and `update` if `spheres` does not fit, in
        `update` if `params` is missing and needed.

    >>> tx = so.trace(0.9)
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    >>> updates
    {'kernel': Array([1.9, 1.9], dtype=float32)}

    Source: [6] and [19]; the radial part of m is dropped, as in the authors' released code.
    """
    momentum = _Momentum(require_constant_decay("trace", decay), 1, spheres, transport, rescale)

    def init(params):
        sums = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return TraceState(sums, momentum.init(params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        sums, kept = momentum.update(updates, state.trace, state.kept, params)
        out = momentum.ahead(updates, sums) if nesterov else sums
        out = cast_like(drop_missing(updates, out), params)
        return out, TraceState(cast_like(sums, state.trace), kept)

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
        groups = match(self.spheres, params).with_tangent_space()
        return zeros_per_group(params, groups) if self.transport != self.rescale else None

    def update(
        self,
        updates: Any,
        moment: Any,
        kept: Any,
        params: Any,
        l2: Any = None,
        products: Products | None = None,
    ) -> tuple[Any, Any]:
        groups = match(self.spheres, updates).with_tangent_space()
        products = products or Products()
        before = kept
        if self.transport or self.rescale or l2 is not None:
            params = require_params(params)
        if self.transport:
            mx, xx = products.dot(moment, params, groups), products.dot(params, params, groups)
            tangent = remove_radial(params, moment, mx, xx, groups)
            if self.rescale:
                moment = tangent
            else:
                radius = groups.map_per_group(sqrt, xx)
                radial = _radial(products.dot(updates, params, groups), radius, groups, l2)
                mm = products.dot(moment, moment, groups)
                now = _radial(mx, radius, groups)
                restored = groups.map_per_group(_isometry, mm, kept, now, xx, radial, moment)
                moment = geometry.scale(tangent, restored, groups)
                # The projection is tangential: only the new term brings a radial part.
                kept = groups.map_per_group(lambda q: as_dtype(self.gain, q.dtype) * q, radial)
        elif self.rescale:
            radius = geometry.norm(params, groups)
            moment = geometry.scale(moment, change(kept, radius, groups), groups)
            kept = radius
        kept = None if self.transport == self.rescale else groups.as_state(kept, before)
        return self.ahead(updates, moment, params, l2), kept

    def ahead(self, updates: Any, moment: Any, params: Any = None, l2: Any = None) -> Any:
        """decay m + gain g; with an m that has taken g already, Nesterov's momentum."""
        return mix(add_decay(updates, params, l2), moment, self.decay, self.gain)


def _isometry(mm: Any, before: Any, now: Any, xx: Any, coming: Any, m: Any) -> jax.Array:
    """What gives the projection of m the length of its tangential part at the last point.

    Both lengths follow from ||m||^2 and the radial part of m, `before` and now. Where m is radial to
    working precision they do not, and the length is left alone.
    """
    old, new = mm - before * before, mm - now * now
    tiny = mm * max(100 * float(jnp.finfo(mm.dtype).eps), float(jnp.finfo(m.dtype).eps))
    # `coming` only has to be known: a sum over the parameters that nothing waited for would make XLA
    # copy them all before it overwrites them.
    there = (old > tiny) & (new > tiny) & ~is_zero(xx) & jnp.isfinite(coming)
    return jnp.sqrt(jnp.where(there, old, 1.0) / jnp.where(there, new, 1.0))


def _radial(qx: Any, radius: Any, groups: Groups, l2: Any = None) -> Any:
    """<q + l2 x, u> of each group, from <q, x>."""

    def of(qx, r):
        return divide_or_zero(qx, r) + (0.0 if l2 is None else as_dtype(l2, r.dtype) * r)

    return groups.map_per_group(of, qx, radius)


def change(before: Any, now: Any, groups: Groups) -> Any:
    """before / now of group-sized trees, and 1 for groups that were or are zero."""
    return groups.map_per_group(
        lambda b, n: jnp.where(is_zero(b), 1.0, divide_or_one(b, n)), before, now
    )
