"""A network and its tasks: the same 256 images, with new random labels in every task."""

from typing import Any, NamedTuple

import jax
from flax import linen as nn

from benchmarks.training.flat_digits import (
    CLASSES,
    draw_batches,
    find_layer_spheres,
    put_on_one_sphere,
    read_digits,
)

IMAGES, WIDTH = 256, 64
FIRST, SECOND, HEAD = "Dense_0", "Dense_1", "Dense_2"  # the layers, as Flax names them


class Network(nn.Module):
    """64-64-64-10: LayerNorm without scale and bias stands behind both hidden layers, before ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.Dense(WIDTH)(x)
            x = nn.relu(nn.LayerNorm(use_bias=False, use_scale=False)(x))
        return nn.Dense(CLASSES)(x)


class Task(NamedTuple):
    labels: jax.Array  # one per image
    batches: jax.Array  # (steps, BATCH_SIZE), which images each step sees


def load_images() -> jax.Array:
    """The first images of scikit-learn's digits, (images, pixels), from 0 to 1."""
    return read_digits().images[:IMAGES]


def init_params(key: jax.Array, images: jax.Array) -> Any:
    return Network().init(key, images[:1])["params"]


def predict(params: Any, images: jax.Array) -> jax.Array:
    return Network().apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def draw_task(key: jax.Array, steps: int) -> Task:
    """Random labels, and batches that go through all images in an order that every epoch draws anew."""
    labels_key, order_key = jax.random.split(key)
    labels = jax.random.randint(labels_key, (IMAGES,), 0, CLASSES)
    return Task(labels, draw_batches(order_key, IMAGES, steps))


def find_hidden_spheres(images: jax.Array) -> Any:
    """The spheres of the network, measured: those of both hidden layers."""
    return find_layer_spheres(predict, init_params(jax.random.key(0), images), images, HEAD)


def add_head(spheres: Any) -> Any:
    """The head on a sphere too: a constraint, as the network is not invariant to its scale."""
    return {**spheres, HEAD: put_on_one_sphere(HEAD)}
