"""The declaration of moments in the state of an optimizer, from which `so.track` finds them."""

from typing import Any, NamedTuple


class Moments(NamedTuple):
    """The names of the fields of a state that hold moments: the class attribute `MOMENTS` of the state.

    All other fields hold no moment; a state inside one of them declares its own. `so.track` gives no
    effective learning rate for a state whose class has no `MOMENTS`, because it does not understand it.
    """

    average: str | None = None  # the mean of past gradients, m <- b m + (1 - b) g
    sum: str | None = None  # the sum of past gradients, m <- b m + g
    square: str | None = None  # the mean of squared gradients, per coordinate or per group


def get_moments(state: Any) -> Moments | None:
    """Returns the declaration of a state's class, or None if it has none."""
    return getattr(type(state), "MOMENTS", None)
