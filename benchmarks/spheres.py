"""The parameters of a network that are on spheres: its filters, found by measurement."""

import functools
from typing import Any

import jax
from flax import linen as nn

import spherical_optax as so
from benchmarks.loop import init_variables

BATCH_SIZE = 16


@functools.cache
def filter_spheres(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    """Measured on noise, with BatchNorm in training mode."""
    images = jax.random.normal(jax.random.key(0), (BATCH_SIZE, *image_shape))
    variables = init_variables(model, image_shape, seed=1)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def logits(params: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    return so.find_spheres(logits, params, key=jax.random.key(2))
