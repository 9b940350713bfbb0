"""Residual networks of several widths on scikit-learn's digits, and the spheres that they share."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

import spherical_optax as so
from benchmarks.training.flat_digits import (
    BATCH_SIZE,
    CLASSES,
    Digits,
    find_layer_spheres,
    read_digits,
)

BLOCKS, NARROWEST = 2, 32
TRAINING_IMAGES, SPLIT_SEED = 1200, 0
HEAD = "head"  # the only layer without a normalisation behind it


class Network(nn.Module):
    """Two residual blocks of two layers; LayerNorm without scale and bias behind each but the head."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = normalize(nn.Dense(self.width, name="input")(x))
        for block in range(BLOCKS):
            y = normalize(nn.Dense(self.width, name=f"first_{block}")(normalize(x)))
            x = x + normalize(nn.Dense(self.width, name=f"second_{block}")(nn.relu(y)))
        return nn.Dense(CLASSES, name=HEAD)(normalize(x))


def normalize(x: jax.Array) -> jax.Array:
    return nn.LayerNorm(use_bias=False, use_scale=False)(x)


def load_split() -> tuple[Digits, Digits]:
    """1,200 images for training and the other 597 for validation, in the same order on every call."""
    digits = read_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.labels))
    return digits.take(order[:TRAINING_IMAGES]), digits.take(order[TRAINING_IMAGES:])


def init_params(key: jax.Array, width: int, images: jax.Array) -> Any:
    """Flax's usual initialisation: kernels by LeCun's rule, biases zero."""
    return Network(width).init(key, images[:1])["params"]


def predict(params: Any, images: jax.Array) -> jax.Array:
    width = params[HEAD]["kernel"].shape[0]
    return Network(width).apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def find_shared_spheres(images: jax.Array) -> Any:
    """The spheres of the network of width 32, measured: each layer with its bias, but not the head.

    They declare the spheres of the network at every width, as they name layers and axes, no sizes.
    """
    params = init_params(jax.random.key(0), NARROWEST, images)
    return find_layer_spheres(predict, params, images, HEAD)


def check_shared_spheres(spheres: Any, width: int, images: jax.Array) -> None:
    """Asserts that the network of this width is invariant on the spheres of the narrow one."""
    params, batch = init_params(jax.random.key(0), width, images), images[:BATCH_SIZE]
    report = so.check_spheres(
        lambda params: predict(params, batch), params, spheres, key=jax.random.key(1)
    )
    assert report.ok, report
