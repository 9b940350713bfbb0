"""The optimizers that are compared, each with the numbers to choose from.

Embedding, head and the gains of RMSNorm are called the others, beside the matrices of the blocks. Adam
moves them in every method. Each method has a learning rate and one more number to choose: the decay, or
the ratio of the rate of the others to that of the matrices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import spherical_optax as so

DECAYS = (0.0, 0.1, 1.0)
USUAL_DECAY = 0.1
RATIO = 1.0  # with which the search begins
LOWEST = 2.0**-16  # of rates and ratios, where a search that finds no end is given up
B1, B2, EPSILON = 0.9, 0.999, 1e-8  # the defaults of all optimizers here
REFERENCE = "adamw"


class Cell(NamedTuple):
    """A point of the grid. Numbers, or arrays inside a compiled program."""

    learning_rate: Any
    weight_decay: Any  # decoupled, times the rate, as in AdamW
    ratio: Any  # of the rate of the others to that of the matrices


class Spheres(NamedTuple):
    measured: Any  # queries and keys, one group per head: the network is invariant there
    declared: Any  # every matrix as a whole: a constraint


class Method(NamedTuple):
    label: str
    # From a schedule of the learning rate, the decay, the ratio and the spheres.
    make: Callable[[Any, Any, Any, Spheres], optax.GradientTransformation]
    exponents: range  # of two: the rates that are tried first, with the middle decay and RATIO
    decays: tuple[float, ...] = (0.0,)
    has_ratio: bool = False

    def list_first(self) -> list[Cell]:
        decay = self.decays[len(self.decays) // 2]
        return [Cell(2.0**exponent, decay, RATIO) for exponent in self.exponents]

    def list_beside(self, cell: Cell) -> list[Cell]:
        """Half the rate, the same or twice as much, each with all decays or the ratios beside."""
        rates = [cell.learning_rate * factor for factor in (0.5, 1.0, 2.0)]
        ratios = [cell.ratio * factor for factor in (0.25, 1.0, 4.0)]
        return [
            Cell(rate, decay, ratio)
            for rate in rates
            if LOWEST <= rate <= 1
            for decay in self.decays
            for ratio in (ratios if self.has_ratio else (RATIO,))
            if LOWEST <= ratio <= 1 / LOWEST
        ]

    def is_at_edge(self, cell: Cell) -> bool:
        """Whether a larger decay may be better: the rates and ratios have no edge."""
        return len(self.decays) > 1 and cell.weight_decay == max(self.decays)


def is_matrix(params: Any) -> Any:
    """Where weight decay acts: embedding, head and matrices, not the gains."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def scale_others(ratio: Any, spheres: Any) -> optax.GradientTransformation:
    """Multiplies the updates of what is on no sphere."""

    def is_other(params: Any) -> Any:
        return jax.tree.map(lambda on: not on, so.on_spheres(spheres)(params))

    return optax.masked(optax.scale(ratio), is_other)


def make_adamw(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    del ratio, spheres
    return optax.adamw(rate, weight_decay=decay, mask=is_matrix)


def make_adamw_of_two_rates(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    """AdamW with a rate of their own for the others, as the methods below have it."""
    return optax.chain(
        make_adamw(rate, decay, ratio, spheres), scale_others(ratio, spheres.declared)
    )


def make_adamsrt(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    """AdamW, with AdamSRT's direction in place of Adam's on the measured spheres.

    `so.adamsrt` itself has L2 regularisation inside the gradient and no decoupled decay.
    """
    del ratio
    on = spheres.measured
    a = so.ema(B1, on, transport=True, rescale=True)
    b = so.rms(B2, EPSILON, on, rescale=True)
    return optax.chain(
        so.quotient(a, b),
        optax.add_decayed_weights(decay, is_matrix),
        optax.scale_by_learning_rate(rate),
    )


def make_adamh(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    del decay
    return optax.chain(so.adamh(rate, spheres.declared), scale_others(ratio, spheres.declared))


def make_muonh(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    del decay
    return optax.chain(so.muonh(rate, spheres.declared), scale_others(ratio, spheres.declared))


def make_decoupled(rate: Any, decay: Any, ratio: Any, spheres: Spheres) -> Any:
    """Every matrix as a direction of fixed length, with a gain per column and one per row.

    The gains move at the rate of the others.

    Source: "magnitude-direction decoupling" (arXiv 2606.25971).
    """
    del decay
    matrices = spheres.declared
    direction = optax.chain(
        optax.adam(rate), scale_others(ratio, matrices), so.retract(matrices, "initial")
    )
    columns, rows = (replace_spheres(matrices, so.Sphere(axes)) for axes in ((-1,), (0,)))
    gains = optax.chain(optax.adam(rate), optax.scale(ratio))
    return so.decouple(direction, gains, (columns, rows), phi=jax.nn.softplus)


def replace_spheres(spheres: Any, by: so.Sphere) -> Any:
    return jax.tree.map(lambda sphere: by if sphere else None, spheres, is_leaf=lambda x: x is None)


METHODS = {
    "adamw": Method("AdamW", make_adamw, range(-8, -4), decays=DECAYS),
    "adamw-ratio": Method(
        "AdamW with two rates",
        make_adamw_of_two_rates,
        range(-8, -4),
        decays=(USUAL_DECAY,),
        has_ratio=True,
    ),
    "adamsrt": Method("AdamSRT", make_adamsrt, range(-8, -4), decays=DECAYS),
    "adamh": Method("AdamH", make_adamh, range(-7, -3), has_ratio=True),
    "muonh": Method("MuonH", make_muonh, range(-7, -3), has_ratio=True),
    "decoupled": Method("decoupled", make_decoupled, range(-8, -4), has_ratio=True),
}
