"""A small forward pass of a transformer with normalised queries and keys, for discovery."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import spherical_optax as so

BATCH, LENGTH = 8, 4  # few tokens: the memory of a gradient is then that of the parameters
HEAD = 64  # the width of a head


class Size(NamedTuple):
    width: int
    layers: int
    vocabulary: int

    @property
    def hidden(self) -> int:
        """The width within the feed-forward part, as in Llama about 8/3 of the width."""
        return 64 * round(self.width * 8 / 3 / 64)


def make_params(size: Size, key: jax.Array) -> dict[str, Any]:
    """Unrolled layers of eleven arrays each, one embedding for both ends, and a last norm."""
    d, f, heads = size.width, size.hidden, size.width // HEAD

    def draw(i: int, *shape: int, inputs: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), shape) * inputs**-0.5

    params: dict[str, Any] = {"embed": draw(0, size.vocabulary, d, inputs=d), "norm": jnp.ones(d)}
    for layer in range(size.layers):
        i = 8 * (layer + 1)
        params[f"layer{layer}"] = {
            "query": {"kernel": draw(i, d, heads, HEAD, inputs=d), "norm": jnp.ones(HEAD)},
            "key": {"kernel": draw(i + 1, d, heads, HEAD, inputs=d), "norm": jnp.ones(HEAD)},
            "value": {"kernel": draw(i + 2, d, heads, HEAD, inputs=d)},
            "out": {"kernel": draw(i + 3, heads, HEAD, d, inputs=d)},
            "gate": {"kernel": draw(i + 4, d, f, inputs=d)},
            "up": {"kernel": draw(i + 5, d, f, inputs=d)},
            "down": {"kernel": draw(i + 6, f, d, inputs=f)},
            "attention_norm": jnp.ones(d),
            "feed_forward_norm": jnp.ones(d),
        }
    return params


def declare_spheres(params: Any) -> Any:
    """One sphere per head of every query and key kernel: what is right by construction."""
    return so.spheres_where(params, "(query|key)/kernel", so.Sphere((-2,)))


def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def predict(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """The logits of the next tokens, (batch, length, vocabulary)."""
    x = params["embed"][tokens]
    layers = sum(name.startswith("layer") for name in params)
    for layer in range(layers):
        p = params[f"layer{layer}"]
        y = normalise(x, p["attention_norm"])
        query, key, value = (
            jnp.einsum("btd,dhe->bthe", y, p[name]["kernel"]) for name in ("query", "key", "value")
        )
        query, key = normalise(query, p["query"]["norm"]), normalise(key, p["key"]["norm"])
        weights = jnp.einsum("bshe,bthe->bhst", query, key) * HEAD**-0.5
        weights = jnp.where(jnp.tri(x.shape[1], dtype=bool), weights, -jnp.inf)
        mixed = jnp.einsum("bhst,bthe->bshe", jax.nn.softmax(weights), value)
        x = x + jnp.einsum("bthe,hed->btd", mixed, p["out"]["kernel"])
        y = normalise(x, p["feed_forward_norm"])
        inner = jax.nn.silu(y @ p["gate"]["kernel"]) * (y @ p["up"]["kernel"])
        x = x + inner @ p["down"]["kernel"]
    return normalise(x, params["norm"]) @ params["embed"].T
