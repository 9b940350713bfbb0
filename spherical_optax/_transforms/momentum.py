r"""Momentum that follows its spheres: the numerator a of x <- x - eta a / b, equation [3].

Gamma is the parallel transport of a tangent vector along the great circle from the last point to the
present one. Arrays off the spheres, and groups of one coordinate, are averaged element-wise, exactly as
in Optax. Updates have the dtype of the parameters.
"""

import dataclasses
from collections.abc import Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import get_weight_decay, require_decay, require_state
from spherical_optax._core.groups import Groups
from spherical_optax._core.moments import Moments
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import add_decay, cast_like, correct_bias, drop_missing, mix
from spherical_optax._transforms.first_moment import Momentum
from spherical_optax._transforms.inner_products import InnerProducts, to_transformation


class EmaState(NamedTuple):
    """State of `ema`."""

    MOMENTS = Moments(average="ema")

    count: jax.typing.ArrayLike  # steps taken, int32
    ema: optax.Updates
    kept: Any  # one number per group: <m, u> with transport alone, r with rescale alone; or None


class TraceState(NamedTuple):
    """State of `trace`."""

    MOMENTS = Moments(sum="trace")

    kept: Any  # as in `EmaState`
    trace: optax.Updates


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

    Use this when a chain of your own should average gradients on spheres.

    m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + (1 - decay) (g_k + lambda x_k)             [19]

    The output is m_k / (1 - decay^{k+1}). `transport` applies Gamma, the parallel transport of the
    tangential part from the last point to this one; `rescale` applies the ratio of radii.

    The state holds no old parameters. If the step is a multiple of m in each group (decoupled decay or
    a retraction may also scale the point), both points and m lie in one plane. In this plane, transport
    followed by the ratio *is* the projection of m on the tangent space at the new point. Without the
    ratio, we give the projection the length of the old tangential part, because Gamma is an isometry.
    After a step that leaves the plane (an element-wise division), the result is a vector transport by
    projection instead.

    Args:
      decay: rate of decay.
      spheres: how the leaves split into groups; used only by `transport` and `rescale`.
      transport: move the average to the tangent space of the present point; needs `params`.
      rescale: multiply it by the ratio of the radii; needs `params`. Without `transport`, for
        experiments.
      weight_decay: lambda of the L2 term, a number or a schedule; needs `params`. The numbers are those
        of `optax.add_decayed_weights` in front, but g + lambda x takes no memory.
      debias: divide by 1 - decay^{k+1}; False is for experiments.
      nesterov: output decay m_k + (1 - decay) (g_k + lambda x_k) in place of m_k.
      accumulator_dtype: dtype of the average; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: the average in the shape of the parameters, and one
      number per group if exactly one of `transport` and `rescale` is set.

    Raises:
      ValueError: if `decay` is a schedule; in `init` and `update`, if `spheres` does not fit the
        parameters; in `update`, if `params` is missing and needed.

    >>> tx = optax.chain(so.ema(0.9, so.Sphere(), transport=True, rescale=True), optax.scale(-0.1))
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["kernel"].shape
    (4, 2)

    Source: equation [19] of the paper. As in the authors' released code, transport drops the radial part
    of m.
    """
    return to_transformation(
        Ema(
            decay=decay,
            spheres=spheres,
            transport=transport,
            rescale=rescale,
            weight_decay=weight_decay,
            debias=debias,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
        )
    )


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

    Use this when a chain of your own should have the momentum of SGD on spheres.

    m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + g_k

    This is equation [6] with the transport and the ratio of equation [19]. `ema` explains both, and why
    the state holds no old parameters.

    Args:
      decay: rate of decay (the momentum).
      spheres: how the leaves split into groups; used only by `transport` and `rescale`.
      transport: move the sum to the tangent space of the present point; needs `params`.
      rescale: multiply it by the ratio of the radii; needs `params`. Without `transport`, for
        experiments.
      nesterov: output g_k + decay m_k in place of m_k.
      accumulator_dtype: dtype of the sum; None takes the parameters'.

    Returns:
      A `GradientTransformationExtraArgs`. State: that of `ema` without the count.

    Raises:
      ValueError: if `decay` is a schedule; in `init` and `update`, if `spheres` does not fit the
        parameters; in `update`, if `params` is missing and needed.

    >>> tx = so.trace(0.9)
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    >>> updates
    {'kernel': Array([1.9, 1.9], dtype=float32)}

    Source: equations [6] and [19] of the paper. As in the authors' released code, transport drops the
    radial part of m.
    """
    return to_transformation(
        Trace(
            decay=decay,
            spheres=spheres,
            transport=transport,
            rescale=rescale,
            nesterov=nesterov,
            accumulator_dtype=accumulator_dtype,
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """The block of `ema`: its `update` takes the inner products as an argument."""

    decay: jax.typing.ArrayLike
    spheres: Spheres = None
    transport: bool = False
    rescale: bool = False
    weight_decay: optax.ScalarOrSchedule = 0.0
    debias: bool = True
    nesterov: bool = False
    accumulator_dtype: Any | None = None

    def __post_init__(self):
        require_decay("ema", self.decay)

    @property
    def momentum(self) -> Momentum:
        return Momentum(
            self.decay, 1 - self.decay, self.spheres, transport=self.transport, rescale=self.rescale
        )

    @property
    def inner_products(self) -> Set[str]:
        return self.momentum.inner_products

    def get_momentum(self, state: EmaState) -> Any:
        return require_state(state, EmaState).ema

    def init(self, params: Any) -> EmaState:
        mu = optax.tree.zeros_like(params, dtype=self.accumulator_dtype)
        return EmaState(jnp.zeros([], jnp.int32), mu, self.momentum.init(params))

    def update(
        self, updates: Any, state: EmaState, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, EmaState]:
        out, state = self.average(updates, state, params, products, groups)
        return cast_like(out, params), state

    def average(
        self, updates: Any, state: EmaState, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, EmaState]:
        """`update` before it is rounded to the dtypes of the parameters."""
        l2 = get_weight_decay(self.weight_decay, state.count)
        mu, kept = self.momentum.update(
            updates, state.ema, state.kept, params, l2, products, groups
        )
        count = optax.safe_increment(state.count)
        out = mu
        if self.nesterov:
            out = mix(add_decay(updates, params, l2), mu, self.decay, 1 - self.decay)
        out = drop_missing(updates, out)
        out = correct_bias(out, self.decay, count) if self.debias else out
        return out, EmaState(count, cast_like(mu, state.ema), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The block of `trace`: its `update` takes the inner products as an argument."""

    decay: jax.typing.ArrayLike
    spheres: Spheres = None
    transport: bool = False
    rescale: bool = False
    nesterov: bool = False
    accumulator_dtype: Any | None = None

    def __post_init__(self):
        require_decay("trace", self.decay)

    @property
    def momentum(self) -> Momentum:
        return Momentum(self.decay, 1, self.spheres, transport=self.transport, rescale=self.rescale)

    @property
    def inner_products(self) -> Set[str]:
        return self.momentum.inner_products

    def get_momentum(self, state: TraceState) -> Any:
        return require_state(state, TraceState).trace

    def init(self, params: Any) -> TraceState:
        sums = optax.tree.zeros_like(params, dtype=self.accumulator_dtype)
        return TraceState(kept=self.momentum.init(params), trace=sums)

    def update(
        self, updates: Any, state: TraceState, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, TraceState]:
        sums, kept = self.momentum.update(
            updates, state.trace, state.kept, params, None, products, groups
        )
        out = mix(updates, sums, self.decay, 1) if self.nesterov else sums
        out = cast_like(drop_missing(updates, out), params)
        return out, TraceState(kept=kept, trace=cast_like(sums, state.trace))
