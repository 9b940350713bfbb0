"""Small copies of published architectures: what is invariant in them, by their mathematics.

Every function returns fn, its parameters, and the spheres that there are. They are the networks behind
the table "Symmetry, constraint, or neither" in docs/norm_control.md.
"""

import jax
import jax.numpy as jnp

import spherical_optax as so

WIDTH, HEADS, TOKENS, BATCH = 16, 2, 6, 8
KEY = jax.random.key(0)


def draw(name, *shape):
    seed = sum(map(ord, name))
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape) / shape[0] ** 0.5


def unit(x):
    """A vector of unit length along the features."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True))


def layer_norm(x, p=None):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def batch_norm(x):
    x = x - x.mean(0, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), 0, keepdims=True) + 1e-5)


def attend(q, k, v):
    """Causal attention; (batch, tokens, heads, features)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, TOKENS), 0, 32)


def make_attention(**more):
    """Queries, keys and values as (in, heads, features), and the way back as (heads, features, in)."""
    head = (WIDTH, HEADS, WIDTH // HEADS)
    return {
        "query": draw("q", *head),
        "key": draw("k", *head),
        "value": draw("v", *head),
        "out": draw("o", HEADS, WIDTH // HEADS, WIDTH),
        **more,
    }


def transformer(normalised_queries):
    """Pre-norm: LayerNorm in front of attention and MLP, and the residual stream is not normalised."""
    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    params = {
        "embedding": draw("wte", 32, WIDTH),
        "norm1": norm,
        "attention": make_attention(),
        "norm2": norm,
        "up": draw("up", WIDTH, 4 * WIDTH),
        "down": draw("down", 4 * WIDTH, WIDTH),
        "norm3": norm,
        "head": draw("head", WIDTH, 32),
    }

    def fn(p):
        h = p["embedding"][tokens()]
        x, a = layer_norm(h, p["norm1"]), p["attention"]
        q, k, v = (jnp.einsum("bti,ihd->bthd", x, a[n]) for n in ("query", "key", "value"))
        if normalised_queries:
            q, k = rms_norm(q), rms_norm(k)
        h = h + jnp.einsum("bthd,hdo->bto", attend(q, k, v), a["out"])
        h = h + jax.nn.gelu(layer_norm(h, p["norm2"]) @ p["up"]) @ p["down"]
        return layer_norm(h, p["norm3"]) @ p["head"]

    found = jax.tree.map(lambda _: None, params)
    if normalised_queries:
        found["attention"] |= {"query": so.Sphere((-2,)), "key": so.Sphere((-2,))}
    return fn, params, found


def ngpt():
    """nGPT: everything that is written to the residual stream has unit length before and after."""
    params = {
        "embedding": draw("wte", 32, WIDTH),
        "attention": make_attention(scale=jnp.ones((HEADS, WIDTH // HEADS))),
        "gate": draw("gate", WIDTH, 4 * WIDTH),
        "up": draw("up", WIDTH, 4 * WIDTH),
        "down": draw("down", 4 * WIDTH, WIDTH),
        "rate1": jnp.full(WIDTH, 0.3),
        "rate2": jnp.full(WIDTH, 0.3),
        "head": draw("head", WIDTH, 32),
    }

    def fn(p):
        h, a = p["embedding"][tokens()], p["attention"]
        q, k, v = (jnp.einsum("bti,ihd->bthd", h, a[n]) for n in ("query", "key", "value"))
        q, k = unit(q) * a["scale"], unit(k) * a["scale"]
        step = unit(jnp.einsum("bthd,hdo->bto", attend(q, k, v), a["out"]))
        h = unit(h + p["rate1"] * (step - h))
        step = unit((jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"])
        h = unit(h + p["rate2"] * (step - h))
        return h @ p["head"]

    found = jax.tree.map(lambda _: None, params)
    per_head, whole = so.Sphere((-2,)), so.Sphere(())
    found["attention"] |= {"query": per_head, "key": per_head, "value": whole, "out": whole}
    return fn, params, found | {"up": whole, "down": whole}


def simbav2():
    """SimbaV2's critic: every block ends on the unit sphere of the features."""
    params = {
        "embed": draw("embed", 9, WIDTH),
        "embed_scale": jnp.ones(WIDTH),
        "up": draw("up", WIDTH, 4 * WIDTH),
        "up_scale": jnp.ones(4 * WIDTH),
        "down": draw("down", 4 * WIDTH, WIDTH),
        "rate": jnp.full(WIDTH, 0.3),
        "head": draw("head", WIDTH, 5),
    }
    x = jax.random.normal(jax.random.key(2), (4 * BATCH, 8))

    def fn(p):
        h = unit(jnp.concatenate([x, jnp.full((len(x), 1), 3.0)], -1))
        h = unit(h @ p["embed"] * p["embed_scale"])
        step = unit(jax.nn.relu(h @ p["up"] * p["up_scale"]) @ p["down"])
        h = unit(h + p["rate"] * (step - h))
        return h @ p["head"]

    whole = so.Sphere(())
    found = jax.tree.map(lambda _: None, params)
    return fn, params, found | {"embed": whole, "up": whole, "down": whole}


def crossq():
    """CrossQ's critic: BatchNorm behind every hidden layer and its ReLU."""
    params = {
        "layer1": {"kernel": draw("l1", 8, WIDTH), "bias": draw("b1", WIDTH)},
        "layer2": {"kernel": draw("l2", WIDTH, WIDTH), "bias": draw("b2", WIDTH)},
        "head": {"kernel": draw("head", WIDTH, 1), "bias": jnp.zeros(1)},
    }
    x = jax.random.normal(jax.random.key(2), (4 * BATCH, 8))

    def fn(p):
        h = batch_norm(x)
        for name in ("layer1", "layer2"):
            h = batch_norm(jax.nn.relu(h @ p[name]["kernel"] + p[name]["bias"]))
        return h @ p["head"]["kernel"] + p["head"]["bias"]

    found = {
        name: {part: so.Sphere(tie=name) for part in ("kernel", "bias")}
        for name in ("layer1", "layer2")
    }
    return fn, params, found | {"head": {"kernel": None, "bias": None}}


def edm2():
    """EDM2's block: every weight is divided by its norm, per output, wherever it is used."""
    params = {
        "conv": draw("conv", 3, 3, 4, 8),
        "conv2": draw("conv2", 3, 3, 8, 8),
        "gain": jnp.asarray(0.7),
    }
    x = jax.random.normal(jax.random.key(2), (BATCH, 6, 6, 4))

    def convolve(x, w):
        w = w * jax.lax.rsqrt(jnp.sum(jnp.square(w), (0, 1, 2), keepdims=True))
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fn(p):
        h = jax.nn.silu(convolve(x, p["conv"])) / 0.596
        return convolve(h, p["conv2"]) * p["gain"]

    return fn, params, {"conv": so.Sphere(), "conv2": so.Sphere(), "gain": None}


NETWORKS = {
    "transformer": lambda: transformer(False),
    "transformer with normalised queries and keys": lambda: transformer(True),
    "nGPT": ngpt,
    "SimbaV2": simbav2,
    "CrossQ": crossq,
    "EDM2": edm2,
}
