"""Eq. [19], the momentum that follows its sphere, on arrays and on trees."""

import dataclasses
import functools
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.compiler_hints import OTHER_ZERO, depend_on
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.projection import remove_radial
from spherical_optax._core.safe_math import divide_or_one, divide_or_zero, is_zero, sqrt, upcast
from spherical_optax._core.shapes import OfArray, OfGroups, PerGroup, SpreadGroups
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import add_decay, as_dtype, mix, mix_arrays
from spherical_optax._transforms.inner_products import InnerProducts


def first_moment(
    m: OfArray,
    g: OfArray,
    x: OfArray,
    mx: SpreadGroups,
    xx: SpreadGroups,
    stretch: SpreadGroups | None = None,
    *,
    decay: Any,
    gain: Any,
    l2: Any = None,
) -> OfArray:
    r"""Eq. [19] on one array: m_k = decay (r_{k-1} / r_k) Gamma(m_{k-1}) + gain (g_k + lambda x_k).

    If the step from the last point was a multiple of m, then (r_{k-1} / r_k) Gamma(m) equals the
    projection m - <m, x> / <x, x> x at the new point x (see `ema`). For Gamma(m) without the ratio,
    `stretch` restores the length of the projection.

    Args:
      m: the momentum m_{k-1}, of the shape of the array.
      g: the gradient g_k.
      x: the parameters x_k.
      mx: <m, x> per group, ready to broadcast against the array.
      xx: <x, x> per group.
      stretch: factor per group of the projection; None for 1.
      decay: rate of decay.
      gain: factor of the new term: 1 - decay for an average, 1 for a sum.
      l2: lambda; None for 0.
    """
    m = upcast(m)
    decay, gain = as_dtype(decay, m.dtype), as_dtype(gain, m.dtype)
    transported = remove_radial(m, x, mx, xx)
    if stretch is not None:
        transported = stretch * transported
    return decay * transported + gain * (g if l2 is None else g + as_dtype(l2, x.dtype) * x)


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Equation [19] with optional transport and ratio of radii: the common part of `ema` and `trace`."""

    decay: jax.typing.ArrayLike
    gain: jax.typing.ArrayLike
    spheres: Spheres
    transport: bool
    rescale: bool

    @property
    def inner_products(self) -> Set[str]:
        """The names of the inner products that `update` needs."""
        if not self.transport:
            return {"xx"} if self.rescale else set()
        return {"mx", "xx"} if self.rescale else {"mx", "xx", "gx", "mm"}

    def follow_products(
        self, m: Any, kept: Any, products: InnerProducts, groups: Groups
    ) -> InnerProducts:
        """The inner products mm, mx and xx with the new momentum, transported without rescaling.

        Eq. [19] is linear in m, g and x. Applied to their inner products with a vector, it is the inner
        product of the new momentum with that vector.
        """
        kept = groups.read_state("kept", kept)
        stretch = self._compute_stretch(m, kept, products, groups)
        p = products

        def move(m: Any, g: Any, x: Any) -> Any:
            return groups.map_per_group(
                functools.partial(first_moment, decay=self.decay, gain=self.gain),
                *(m, g, x, p.mx, p.xx, stretch),
            )

        new_m, new_g, new_x = move(p.mm, p.gm, p.mx), move(p.gm, p.gg, p.gx), move(p.mx, p.gx, p.xx)
        return InnerProducts(mm=move(new_m, new_g, new_x), mx=new_x, xx=p.xx)

    def _compute_stretch(
        self, m: Any, kept: Any, products: InnerProducts, groups: Groups
    ) -> PerGroup:
        return groups.map_per_group(_restore_length, products.mm, kept, products.mx, products.xx, m)

    @property
    def has_number_per_group(self) -> bool:
        """Whether the state holds one number per group."""
        return self.transport != self.rescale

    def init(self, params: Any) -> Any:
        groups = match(self.spheres, params).with_tangent_space()
        return groups.make_zeros(params) if self.has_number_per_group else None

    def update(
        self,
        g: Any,
        m: Any,
        kept: Any,
        x: Any,
        l2: Any,
        products: InnerProducts,
        groups: Groups,
    ) -> tuple[Any, Any]:
        """Computes the new momentum, and the new number per group if the state holds one."""
        move_on_spheres = functools.partial(first_moment, decay=self.decay, gain=self.gain, l2=l2)

        def average_off_spheres(m, g, x, *_):
            return mix_arrays(add_decay(g, x, l2), m, self.decay, self.gain)

        if self.has_number_per_group:
            before, kept = kept, groups.read_state("kept", kept)
        elif kept is not None:
            raise ValueError(
                "the state holds one number per group, as with transport or rescale alone: it was made "
                "by another optimizer. Take a state from init"
            )
        if self.transport and self.rescale:
            m = groups.map_arrays(
                move_on_spheres, m, g, x, products.mx, products.xx, off=average_off_spheres
            )
            return m, None
        if self.transport:
            radial = groups.map_per_group(
                functools.partial(_radial_part, l2=l2), products.gx, products.xx
            )
            stretch = self._compute_stretch(m, kept, products, groups)
            # Sums over the old arrays have to come before these are overwritten: see `depend_on`.
            stretch = groups.map_per_group(depend_on, stretch, radial)
            if products.gm is not None:
                stretch = groups.map_per_group(depend_on, stretch, products.gm)
            m = groups.map_arrays(
                move_on_spheres, m, g, x, products.mx, products.xx, stretch, off=average_off_spheres
            )
            # The transported momentum is tangential: only the new term has a radial part.
            radial = groups.map_per_group(lambda q: as_dtype(self.gain, q.dtype) * q, radial)
            return m, groups.choose(radial, before)
        if self.rescale:
            radius = groups.map_per_group(sqrt, products.xx)
            m = groups.map(lambda m, c: c * m, m, groups.map_per_group(_divide_radii, kept, radius))
            kept = groups.choose(radius, before)
        return mix(add_decay(g, x, l2), m, self.decay, self.gain), kept


def _restore_length(
    mm: OfGroups, radial_before: OfGroups, mx: OfGroups, xx: OfGroups, m: jax.Array
) -> OfGroups:
    """The factor that restores the length of the momentum: transport preserves it, projection does not.

    The factor divides the length of the tangential part of m at the last point by that at the present
    point. Both lengths follow from ||m||^2 and the radial part of m at the point. If m is radial to
    working precision, the difference is rounding noise, and the factor is 1.
    """
    radial_now = divide_or_zero(mx, sqrt(xx, OTHER_ZERO), OTHER_ZERO)
    old, new = mm - radial_before * radial_before, mm - radial_now * radial_now
    # 100 eps is more than the rounding of the sums; the eps of m's own dtype is that of a stored m.
    rounding = mm * max(100 * float(jnp.finfo(mm.dtype).eps), float(jnp.finfo(m.dtype).eps))
    known = (old > rounding) & (new > rounding) & ~is_zero(xx)
    return jnp.sqrt(jnp.where(known, old, 1.0) / jnp.where(known, new, 1.0))


def _radial_part(gx: OfGroups, xx: OfGroups, *, l2: Any) -> OfGroups:
    """<g + lambda x, u> = <g, x> / r + lambda r."""
    r = sqrt(xx, OTHER_ZERO)
    radial = divide_or_zero(gx, r, OTHER_ZERO)
    return radial if l2 is None else radial + as_dtype(l2, r.dtype) * r


def _divide_radii(before: OfGroups, now: OfGroups) -> OfGroups:
    """r_{k-1} / r_k, or 1 if the group was zero or is zero."""
    return jnp.where(is_zero(before), 1.0, divide_or_one(before, now))
