"""How the state of an optimizer says which of its fields are moments, for `so.track` to find them."""

from typing import Any, NamedTuple


class Moments(NamedTuple):
    """The fields of a state that hold moments, by name; a class attribute `MOMENTS` of the state.

    Fields that are not named hold no moment, and states inside them are looked at by themselves. A state
    whose class has no `MOMENTS` is not understood: `so.track` gives no effective learning rate for it.
    """

    average: str | None = None  # the mean of past gradients, m <- b m + (1 - b) g
    sum: str | None = None  # their sum, m <- b m + g
    square: str | None = None  # the mean of their squares, per coordinate or per group


def get_moments(state: Any) -> Moments | None:
    """What the class of a state declares; None if it declares nothing."""
    return getattr(type(state), "MOMENTS", None)
