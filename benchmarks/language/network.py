"""A decoder: pre-norm, rotary positions, queries and keys normalised in every head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

EPSILON = 1e-6
EMBEDDING, HEAD = "embedding", "head"
HIDDEN = ("query", "key", "value", "out", "up", "down")  # the matrices of every block
NORMALISED = ("query", "key")


class Sizes(NamedTuple):
    width: int
    layers: int
    heads: int
    context: int  # characters that a window holds
    characters: int  # how many different ones there are
    dtype: str = "float32"  # of the activations


class Decoder(nn.Module):
    """Logits for the next character at every place of (batch, places) numbers."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = self.sizes
        h = nn.Embed(sizes.characters, sizes.width, dtype=sizes.dtype, name=EMBEDDING)(x)
        for layer in range(sizes.layers):
            h = Block(sizes, name=f"block_{layer}")(h)
        return nn.Dense(sizes.characters, use_bias=False, name=HEAD)(
            make_norm("norm", "float32")(h)
        )


class Block(nn.Module):
    """h + attention(norm(h)), and then h + mlp(norm(h))."""

    sizes: Sizes

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        h = h + self.attend(make_norm("norm_attention", self.sizes.dtype)(h))
        return h + self.transform(make_norm("norm_mlp", self.sizes.dtype)(h))

    def attend(self, x: jax.Array) -> jax.Array:
        shape = *x.shape[:-1], self.sizes.heads, x.shape[-1] // self.sizes.heads
        query, key, value = (
            self.make_dense(name, x.shape[-1])(x).reshape(shape) for name in HIDDEN[:3]
        )
        query, key = (rotate(normalize(y)) for y in (query, key))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.make_dense("out", x.shape[-1])(mixed.reshape(x.shape))

    def transform(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(self.make_dense("up", 4 * x.shape[-1])(x))
        return self.make_dense("down", x.shape[-1])(y)

    def make_dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, use_bias=False, dtype=self.sizes.dtype, name=name)


def make_norm(name: str, dtype: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=EPSILON, dtype=dtype, name=name)


def normalize(x: jax.Array) -> jax.Array:
    """Every head's vector divided by its root mean square, without a gain."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + EPSILON)).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: pairs of features turn with the place, each pair at a frequency of its own.

    x is (batch, places, heads, features). Lengths stay as they are.

    Source: Su et al., "RoFormer" (2021).
    """
    places, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(places, dtype=jnp.float32)[:, None, None] * frequencies[None, None]
    cos, sin = (f(angles).astype(x.dtype)[None] for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def init_params(key: jax.Array, sizes: Sizes) -> Any:
    """Flax's usual initialisation: kernels by LeCun's rule, gains one."""
    return Decoder(sizes).init(key, jnp.zeros((1, sizes.context), jnp.int32))["params"]


def predict(params: Any, x: jax.Array, sizes: Sizes) -> jax.Array:
    return Decoder(sizes).apply({"params": params}, x)  # pyright: ignore[reportReturnType]
