"""The optimizers whose single steps `benchmarks.speed` times and `benchmarks.kernels` counts."""

from typing import Any

import optax

import spherical_optax as so
from benchmarks.training.methods import OPTIMIZERS, make_optimizer

LEARNING_RATE = 1e-3
EVERY = 10  # `track` measures one step in ten
REFERENCE, FLOOR = "optax.adam", "x + c g"
LEFT_OUT = ("adamw", "muonh")  # consists of the blocks of so.adam; is mostly matrix products


def make_optimizers(spheres: Any, weight_decay: float) -> dict[str, optax.GradientTransformation]:
    adam = optax.adam(LEARNING_RATE)
    return {
        FLOOR: optax.sgd(LEARNING_RATE),
        REFERENCE: adam,
        "optax.adamw": optax.adamw(LEARNING_RATE, weight_decay=weight_decay),
        "optax.sgd": optax.sgd(LEARNING_RATE, momentum=0.9),
        **{
            f"so.{name}": make_optimizer(name, LEARNING_RATE, spheres, 0.999, weight_decay)
            for name in OPTIMIZERS
            if name not in LEFT_OUT
        },
        "so.stacked(so.adamsrt)": so.stacked(
            lambda s: so.adamsrt(LEARNING_RATE, s, weight_decay=weight_decay), spheres
        ),
        "so.adamp, guessing": so.adamp(LEARNING_RATE, weight_decay=weight_decay),
        f"so.track(optax.adam, every={EVERY})": so.track(adam, spheres, every=EVERY),
        **make_norm_controlled(spheres),
    }


def make_norm_controlled(spheres: Any) -> dict[str, optax.GradientTransformation]:
    """Adam with the blocks of docs/norm_control.md behind it or around it."""
    adam = optax.adam(LEARNING_RATE)
    return {
        "adam, so.retract": optax.chain(adam, so.retract(spheres, "initial")),
        "adam, so.retract(outward)": optax.chain(
            adam, so.retract(spheres, outward=0.5, inward=1.0)
        ),
        "adam, so.normalize(decay)": optax.chain(
            optax.scale_by_adam(),
            so.center(spheres),
            so.project(spheres),
            so.normalize(spheres, decay=0.9),
            optax.scale_by_learning_rate(LEARNING_RATE),
            so.retract(spheres, "initial"),
        ),
        "so.decouple(adam, adam)": so.decouple(adam, adam, (spheres,)),
    }
