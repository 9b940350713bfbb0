"""The inner products within groups that an update step needs: each is computed once."""

from collections.abc import Set
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax

from spherical_optax._core.arguments import require_params
from spherical_optax._core.boxes import with_open_boxes
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match_updates
from spherical_optax._core.shapes import OfGroups
from spherical_optax._core.sphere import Spheres


class InnerProducts(NamedTuple):
    """Inner products of gradient g, momentum m and parameters x: one number per group.

    Every field is a group-sized tree, or None if no equation of the step needs it.
    """

    gg: Any = None  # <g, g>
    gm: Any = None  # <g, m>
    gx: Any = None  # <g, x>
    xx: Any = None  # <x, x>
    mm: Any = None  # <m, m>
    mx: Any = None  # <m, x>


def compute_inner_products(
    names: Set[str], groups: Groups, *, g: Any, x: Any, m: Any = None
) -> InnerProducts:
    """Computes the inner products with these names, such as {"gg", "gx"}."""
    if any("x" in name for name in names):
        x = require_params(x)
    trees = {"g": g, "m": m, "x": x}
    sums = {}
    for name in sorted(names):
        left, right = name
        sums[name] = groups.sum(lambda a, b: a * b, trees[left], trees[right])
    return InnerProducts(**sums)


def expand_square(aa: OfGroups, ab: OfGroups, bb: OfGroups, c: OfGroups) -> OfGroups:
    """Computes ||a + c b||^2 as <a, a> + 2 c <a, b> + c^2 <b, b>.

    A sum over a + c b would need this array in memory: on CPU, XLA does not fuse the addition into the
    sum (JAX 0.10).
    """
    return jnp.maximum(aa + c * (2 * ab + c * bb), 0.0)


class Block(Protocol):
    """A transformation that takes its inner products as an argument: `Ema`, `Trace`, `Rms`, `Quotient`.

    Two blocks on the same spheres can thereby share them.
    """

    @property
    def spheres(self) -> Spheres: ...

    @property
    def inner_products(self) -> Set[str]:
        """The names of the inner products that `update` needs."""
        ...

    def get_momentum(self, state: Any) -> Any:
        """The tree m of the inner products, None without one; raises for another kind of state."""
        ...

    def init(self, params: Any) -> Any: ...

    def update(
        self, updates: Any, state: Any, params: Any, products: InnerProducts, groups: Groups
    ) -> tuple[Any, Any]: ...


def to_transformation(block: Block) -> optax.GradientTransformationExtraArgs:
    """Makes an Optax transformation that computes the inner products of its block itself."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        groups = match_updates(block.spheres, updates, params).with_tangent_space()
        momentum = block.get_momentum(state)
        if momentum is not None:
            groups.require_moment("the momentum", momentum)
        products = compute_inner_products(
            block.inner_products, groups, g=updates, x=params, m=momentum
        )
        return block.update(updates, state, params, products, groups)

    return optax.GradientTransformationExtraArgs(block.init, with_open_boxes(update))
