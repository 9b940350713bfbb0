"""Scikit-learn's digits as vectors, for networks of dense layers that LayerNorm follows.

`benchmarks.plasticity` and `benchmarks.transfer` train these. `data.load("digits")` has the same images
as bytes, split for the ResNets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import spherical_optax as so

CLASSES, BATCH_SIZE = 10, 64
LARGEST_PIXEL = 16.0


class Digits(NamedTuple):
    """Images as (images, pixels) from 0 to 1, and their labels."""

    images: jax.Array
    labels: jax.Array

    def take(self, indices: Any) -> "Digits":
        return Digits(*(x[indices] for x in self))


def read_digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / LARGEST_PIXEL).astype(np.float32)
    return Digits(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


def draw_batches(key: jax.Array, images: int, steps: int) -> jax.Array:
    """(steps, BATCH_SIZE): epochs in an order that each draws anew; what fills no batch is left out."""
    per_epoch = images // BATCH_SIZE
    epochs = -(-steps // per_epoch)  # the last one may be cut short
    orders = jax.vmap(lambda key: jax.random.permutation(key, images))(
        jax.random.split(key, epochs)
    )
    return orders[:, : per_epoch * BATCH_SIZE].reshape(-1, BATCH_SIZE)[:steps]


def find_layer_spheres(
    predict: Callable[[Any, jax.Array], jax.Array], params: Any, images: jax.Array, head: str
) -> Any:
    """The spheres of a network, measured: each layer with its bias is one, and the head is on none.

    The head has no normalisation behind it.
    """
    batch = images[:BATCH_SIZE]
    found = so.find_spheres(lambda params: predict(params, batch), params, key=jax.random.key(1))
    expected = {
        name: {"kernel": None, "bias": None} if name == head else put_on_one_sphere(name)
        for name in params
    }
    assert found == expected, found
    return found


def put_on_one_sphere(layer: str) -> dict[str, so.Sphere]:
    """The kernel and the bias of a layer as one vector."""
    sphere = so.Sphere((), tie=layer)
    return {"kernel": sphere, "bias": sphere}
