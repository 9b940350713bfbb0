"""BatchNorm for accelerators: the same statistics as Flax's, from fewer kernels.

Flax computes every sum over the batch on its own. XLA makes a GPU kernel from each sum, and each
kernel costs a launch. Here one reduction computes the two sums of the forward pass, and another one
the two sums of the backward pass. `training.build.make_trainer` has the number of kernels that this
saves.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def sum_pair(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sums of two arrays over all axes but the last: shape (2, 1, ..., 1, channels)."""
    return jnp.stack([a, b]).sum(tuple(range(1, a.ndim)), keepdims=True)


@jax.custom_vjp
def normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (x - mean) / sqrt(variance + epsilon) scale + bias, the mean and the variance.

    All arrays but `x` have shape (1, ..., 1, channels). Mean and variance are for running averages only:
    no gradient passes through them.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> Any:
    exact = x.astype(jnp.float32)
    mean, square = sum_pair(exact, exact * exact) / (x.size // x.shape[-1])
    variance = jnp.maximum(square - mean * mean, 0.0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (exact - mean) * (inverse * scale) + bias
    return (y.astype(x.dtype), mean, variance), (x, scale, mean, inverse)


def _backward(saved: Any, gradients: Any) -> Any:
    x, scale, mean, inverse = saved
    dy = gradients[0].astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    dbias, dscale = sum_pair(dy, dy * normal)
    n = x.size // x.shape[-1]
    dx = scale * inverse * (dy - dbias / n - normal * (dscale / n))
    return dx.astype(x.dtype), dscale, dbias, None


normalize_batch.defvjp(_forward, _backward)


class BatchNorm(nn.Module):
    """Takes the place of `flax.linen.BatchNorm` in these networks, with variables of the same names."""

    use_running_average: bool
    momentum: float
    epsilon: float
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        x = x.astype(self.dtype)

        def wide(a: jax.Array) -> jax.Array:
            return a.reshape((1,) * (x.ndim - 1) + channels)

        if self.use_running_average:
            factor = jax.lax.rsqrt(variance.value + self.epsilon) * scale
            y = (x.astype(jnp.float32) - wide(mean.value)) * wide(factor) + wide(bias)
            return y.astype(self.dtype)
        y, *statistics = normalize_batch(x, wide(scale), wide(bias), self.epsilon)
        if not self.is_initializing():
            for average, now in zip((mean, variance), statistics, strict=True):
                average.value += (1 - self.momentum) * (now.reshape(channels) - average.value)
        return y
