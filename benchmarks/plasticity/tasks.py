"""A network and its tasks: the same 256 images, with new random labels in every task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from sklearn.datasets import load_digits

import spherical_optax as so

IMAGES, CLASSES, WIDTH, BATCH_SIZE = 256, 10, 64, 64
BATCHES = IMAGES // BATCH_SIZE  # of one epoch
LARGEST_PIXEL = 16.0
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
    pixels, _ = load_digits(return_X_y=True)
    return jnp.asarray((pixels[:IMAGES] / LARGEST_PIXEL).astype(np.float32))


def init_params(key: jax.Array, images: jax.Array) -> Any:
    return Network().init(key, images[:1])["params"]


def predict(params: Any, images: jax.Array) -> jax.Array:
    return Network().apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def draw_task(key: jax.Array, steps: int) -> Task:
    """Random labels, and batches that go through all images in an order that every epoch draws anew."""
    labels_key, order_key = jax.random.split(key)
    labels = jax.random.randint(labels_key, (IMAGES,), 0, CLASSES)
    epochs = -(-steps // BATCHES)  # the last one may be cut short
    orders = jax.vmap(lambda key: jax.random.permutation(key, IMAGES))(
        jax.random.split(order_key, epochs)
    )
    return Task(labels, orders.reshape(-1, BATCH_SIZE)[:steps])


def find_hidden_spheres(images: jax.Array) -> Any:
    """The spheres of the network, measured: each hidden layer with its bias is one, the head is on none.

    The head has no normalisation behind it.
    """
    params = init_params(jax.random.key(0), images)
    batch = images[:BATCH_SIZE]
    found = so.find_spheres(lambda params: predict(params, batch), params, key=jax.random.key(1))
    expected = {
        FIRST: put_on_one_sphere(FIRST),
        SECOND: put_on_one_sphere(SECOND),
        HEAD: {"kernel": None, "bias": None},
    }
    assert found == expected, found
    return found


def put_on_one_sphere(layer: str) -> dict[str, so.Sphere]:
    """The kernel and the bias of a layer as one vector."""
    sphere = so.Sphere((), tie=layer)
    return {"kernel": sphere, "bias": sphere}


def add_head(spheres: Any) -> Any:
    """The head on a sphere too: a constraint, as the network is not invariant to its scale."""
    return {**spheres, HEAD: put_on_one_sphere(HEAD)}
