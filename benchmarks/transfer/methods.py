"""The optimizers that are compared, each with its grid of learning rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import spherical_optax as so


class Method(NamedTuple):
    label: str
    # From the learning rate, a number or a schedule, and the spheres.
    make: Callable[[Any, Any], optax.GradientTransformation]
    exponents: range  # of two: the rates of the grid

    @property
    def rates(self) -> list[float]:
        return [2.0**exponent for exponent in self.exponents]


def decouple_magnitudes(rate: Any, spheres: Any) -> optax.GradientTransformation:
    """Adam with every layer set back to its first radius, and a magnitude per layer moved by Adam."""
    direction = optax.chain(optax.adam(rate), so.retract(spheres, "initial"))
    return so.decouple(direction, optax.adam(rate), (spheres,))


METHODS = {
    "adam": Method("Adam", lambda rate, _: optax.adam(rate), range(-11, -2)),
    "adamsrt": Method("AdamSRT", so.adamsrt, range(-11, -1)),
    "adamh": Method("AdamH", so.adamh, range(-10, -2)),
    "muonh": Method("MuonH", so.muonh, range(-9, -3)),
    "decoupled": Method("decoupled", decouple_magnitudes, range(-11, -2)),
}
