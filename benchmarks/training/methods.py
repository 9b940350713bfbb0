"""The optimizers under comparison, by their name on the command line, in the paper's order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import spherical_optax as so
from benchmarks.training import recipes

Transformation = optax.GradientTransformation


class Method(NamedTuple):
    label: str  # the paper's; a dagger marks a method for filters only, beside Adam elsewhere
    build: Callable[..., Transformation]  # takes learning_rate, spheres, b2, weight_decay


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    spheres: Any,
    b2: float | None,
    weight_decay: float,
) -> Transformation:
    return OPTIMIZERS[name].build(learning_rate, spheres, b2, weight_decay)


def _make_adamw_on_spheres(
    learning_rate: optax.ScalarOrSchedule, spheres: Any, b2: float, weight_decay: float
) -> Transformation:
    """AdamW on the filters and plain Adam elsewhere.

    The other parameters have no decay: a decoupled decay is no L2 coefficient, and the paper's default
    of 1e-2 would crush the scales of BatchNorm.
    """

    on_spheres = jax.tree.map(lambda s: s is not None, spheres, is_leaf=lambda s: s is None)
    return optax.chain(
        so.quotient(so.ema(0.9), so.rms(b2)),
        optax.add_decayed_weights(weight_decay, mask=on_spheres),
        optax.scale_by_learning_rate(learning_rate),
    )


def _wrap_adam_like(optimizer: Callable[..., Any]) -> Callable[..., Transformation]:
    def build(learning_rate, spheres, b2, weight_decay):
        return optimizer(learning_rate, spheres, b2=b2, weight_decay=weight_decay)

    return build


def _wrap_sgd_like(optimizer: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def build(learning_rate, spheres, b2, weight_decay):
        del b2  # no second moment
        return optimizer(learning_rate, spheres, weight_decay=weight_decay, **options)

    return build


def _make_muonh(
    learning_rate: optax.ScalarOrSchedule, spheres: Any, b2: float, weight_decay: float
) -> Transformation:
    """Puts every matrix that Muon makes orthogonal on one sphere; other methods have one per filter."""
    layers = jax.tree.map(lambda _: so.Sphere(()), spheres)
    return so.muonh(learning_rate, layers, b2=b2, weight_decay=weight_decay)


OPTIMIZERS = {
    "adam": Method("Adam", _wrap_adam_like(so.adam)),
    "adamw": Method("AdamW†", _make_adamw_on_spheres),
    "adamg": Method("AdamG†", _wrap_adam_like(so.adamg)),
    "adams": Method("Adam w/o (a)", _wrap_adam_like(so.adams)),
    "adamst": Method("Adam w/o (ab)", _wrap_adam_like(so.adamst)),
    "adamsrt": Method("Adam w/o (abc)", _wrap_adam_like(so.adamsrt)),
    "sgd": Method("SGD-M", _wrap_sgd_like(so.sgd, momentum=recipes.MOMENTUM)),
    "sgd_mrt": Method("SGD-MRT", _wrap_sgd_like(so.sgd_mrt, momentum=recipes.MOMENTUM)),
    "adamg_star": Method("AdamG*", _wrap_sgd_like(so.adamg_star)),
    "adamp": Method("AdamP", _wrap_adam_like(so.adamp)),
    "sgdp": Method("SGDP", _wrap_sgd_like(so.sgdp, momentum=recipes.MOMENTUM)),
    "adamh": Method("AdamH", _wrap_adam_like(so.adamh)),
    "muonh": Method("MuonH", _make_muonh),
}
