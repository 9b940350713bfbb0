"""Inner products that the two sides of a quotient have in common, computed once."""

from typing import Any

import optax

from spherical_optax import geometry
from spherical_optax._core.groups import Groups


class Products:
    """`geometry.dot`, which remembers: of the same two trees there is one sum, not two for XLA to find.

    It finds them, but then runs the sums over different arrays in turn, a tenth slower on a CPU.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Any, Any, Groups, Any]] = []

    def dot(self, x: Any, y: Any, groups: Groups) -> Any:
        for a, b, of, found in self._known:
            if a is x and b is y and of == groups:
                return found
        found = geometry.dot(x, y, groups)
        self._known.append((x, y, groups, found))
        return found


class Sharing(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes `inner_products` from whoever calls it directly.

    Not through other transformations: what one of them computes inside a condition is unknown outside.
    """

    shares = False  # what `_replace` makes has another update, and does not


def sharing(init: Any, update: Any) -> Sharing:
    tx = Sharing(init, update)
    tx.shares = True
    return tx


def shares(tx: Any) -> bool:
    return isinstance(tx, Sharing) and tx.shares


def known(inner_products: Any) -> Products:
    """What the caller knows; an argument of this name may be somebody else's."""
    return inner_products if isinstance(inner_products, Products) else Products()
