"""The optimizers that are compared, each with the learning rates and decays to choose from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import spherical_optax as so
from benchmarks.plasticity.tasks import add_head

RATES = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
RATES_OF_SGD = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_DECAY = 1e-4  # of optax.adamw
MOMENTUM = 0.9


class Cell(NamedTuple):
    """A point of the grid."""

    learning_rate: float
    weight_decay: float


class Method(NamedTuple):
    label: str
    # From the learning rate, the decay and the spheres of the hidden layers.
    make: Callable[[Any, Any, Any], optax.GradientTransformation]
    rates: tuple[float, ...] = RATES
    decays: tuple[float, ...] = (0.0,)

    def list_cells(self) -> list[Cell]:
        return [Cell(rate, decay) for decay in self.decays for rate in self.rates]

    def is_at_edge(self, cell: Cell) -> bool:
        """Whether the grid ends at this cell, so that a better one may lie outside."""
        rate_is = cell.learning_rate in (min(self.rates), max(self.rates))
        decay_is = cell.weight_decay in (min(self.decays), max(self.decays))
        return rate_is or (len(self.decays) > 1 and decay_is)


def keep_initial_radius(rate: Any, spheres: Any) -> optax.GradientTransformation:
    """Adam, and every sphere set back to the radius that it had at first.

    Source: "normalize and project", Lyle et al., "Normalization and effective learning rates in
    reinforcement learning" (2024).
    """
    return optax.chain(optax.adam(rate), so.retract(spheres, "initial"))


def decouple_magnitude(rate: Any, spheres: Any) -> optax.GradientTransformation:
    """The same for the direction of every layer, while Adam moves a magnitude for each."""
    return so.decouple(keep_initial_radius(rate, spheres), optax.adam(rate), (spheres,))


METHODS = {
    "adam": Method("Adam", lambda rate, _, s: optax.adam(rate)),
    "adamw-default": Method(
        "AdamW, default decay",
        lambda rate, decay, _: optax.adamw(rate, weight_decay=decay),
        decays=(DEFAULT_DECAY,),
    ),
    "adamw": Method(
        "AdamW, chosen decay",
        lambda rate, decay, _: optax.adamw(rate, weight_decay=decay),
        decays=DECAYS,
    ),
    "nap": Method("Adam + retract", lambda rate, _, spheres: keep_initial_radius(rate, spheres)),
    "nap-head": Method(
        "Adam + retract (all)",
        lambda rate, _, spheres: keep_initial_radius(rate, add_head(spheres)),
    ),
    "decoupled": Method("decoupled", lambda rate, _, spheres: decouple_magnitude(rate, spheres)),
    "decoupled-head": Method(
        "decoupled (all)",
        lambda rate, _, spheres: decouple_magnitude(rate, add_head(spheres)),
    ),
    "adamh": Method("AdamH", lambda rate, _, spheres: so.adamh(rate, spheres)),
    "adamsrt": Method("AdamSRT", lambda rate, _, spheres: so.adamsrt(rate, spheres)),
    "sgd": Method(
        "SGD-M", lambda rate, _, s: optax.sgd(rate, momentum=MOMENTUM), rates=RATES_OF_SGD
    ),
}
REFERENCE = "adam"
