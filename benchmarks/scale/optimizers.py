"""The optimizers that are compared: Optax's, and those of this package on declared spheres."""

from collections.abc import Callable
from typing import Any

import optax

import spherical_optax as so

RATE, EVERY = 1e-3, 10
REFERENCE = "optax.adamw"
# From spheres per output and spheres per matrix to the optimizer.
OPTIMIZERS: dict[str, Callable[[Any, Any], optax.GradientTransformation]] = {
    REFERENCE: lambda outputs, matrices: optax.adamw(RATE),
    "so.adamsrt": lambda outputs, matrices: so.adamsrt(RATE, outputs),
    "so.adamh": lambda outputs, matrices: so.adamh(RATE, matrices),
    "so.track(optax.adamw)": lambda outputs, matrices: so.track(optax.adamw(RATE), outputs),
    f"so.track(optax.adamw, every={EVERY})": lambda outputs, matrices: so.track(
        optax.adamw(RATE), outputs, every=EVERY
    ),
    "optax.contrib.muon": lambda outputs, matrices: make_muon(matrices),
    "so.muonh": lambda outputs, matrices: so.muonh(RATE, matrices),
}
USUAL = list(OPTIMIZERS)[:4]


def make_muon(matrices: Any) -> optax.GradientTransformation:
    """Optax's Muon for the same matrices; the outputs are the last axis."""
    numbers = {
        name: None
        if sphere is None
        else optax.contrib.MuonDimensionNumbers(len(sphere.index_axes), 1 + len(sphere.index_axes))
        for name, sphere in matrices.items()
    }
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=numbers)


def make_step(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step
