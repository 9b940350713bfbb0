"""Augments and normalises batches of uint8 images on the device."""

import jax
import jax.numpy as jnp

from benchmarks.training.data import Source


def random_crop_and_flip(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads each image with black, crops it back at a random place and mirrors it half the time."""
    crop_key, flip_key = jax.random.split(key)
    n, height, width, channels = images.shape
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    corners = jax.random.randint(crop_key, (n, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def normalize(images: jax.Array, source: Source) -> jax.Array:
    mean, std = (
        jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (source.mean, source.std)
    )
    return (images.astype(jnp.float32) / 255 - mean) / std
