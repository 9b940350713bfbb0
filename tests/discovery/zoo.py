"""Models with known answers: the spheres of each follow from what normalises its weights.

Every family gives a function of the parameters, the parameters, and the finest spheres, by path. What
is not listed is on none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from spherical_optax import Sphere

FILTER = Sphere((-1,))
LAYER = Sphere(())
KEY = jax.random.key(17)


class Family(NamedTuple):
    fn: Callable[[Any], Any]
    params: Any
    spheres: dict[str, Sphere]  # by path


def images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(3), shape)


def linen(module: nn.Module, x: jax.Array, spheres: dict[str, Sphere], **kwargs: Any) -> Family:
    variables = module.init(KEY, x, **kwargs)
    params = variables["params"]
    rest = {name: v for name, v in variables.items() if name != "params"}

    def fn(params):
        return module.apply({"params": params, **rest}, x, mutable=list(rest), **kwargs)[0]

    return Family(fn, params, spheres)


class Sequential(nn.Module):
    """Layers by the names that they would have in an @nn.compact method."""

    layers: tuple[Callable[..., Any], ...]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer()(x) if isinstance(layer, partial) else layer(x)
        return x


Norm = partial(nn.BatchNorm, use_running_average=False)
Conv = partial(nn.Conv, kernel_size=(3, 3))
X4, X2 = images(8, 8, 8, 3), images(32, 12)


def tied(module: str, kernel: Sphere, bias: Sphere) -> dict[str, Sphere]:
    def with_tie(sphere: Sphere) -> Sphere:
        return Sphere(sphere.index_axes, sphere.blocks, module)

    return {f"{module}/kernel": with_tie(kernel), f"{module}/bias": with_tie(bias)}


def after_conv(norm: Callable[..., Any], spheres: dict[str, Sphere], **conv: Any) -> Family:
    layers = (partial(Conv, 16, **conv), norm, nn.relu, partial(nn.Dense, 10))
    return linen(Sequential(layers), X4, spheres)


def after_dense(norm: Callable[..., Any], spheres: dict[str, Sphere], **dense: Any) -> Family:
    layers = (partial(nn.Dense, 16, **dense), norm, nn.relu, partial(nn.Dense, 10))
    return linen(Sequential(layers), X2, spheres)


def batchnorm() -> Family:
    return after_conv(partial(Norm), {"Conv_0/kernel": FILTER}, use_bias=False)


def batchnorm_bias() -> Family:
    return after_conv(partial(Norm), {"Conv_0/kernel": FILTER})


def batchnorm_dense() -> Family:
    return after_dense(partial(Norm), {"Dense_0/kernel": FILTER})


def depthwise() -> Family:
    layers = (
        partial(Conv, 16, use_bias=False),
        partial(Norm),
        nn.relu,
        partial(Conv, 16, feature_group_count=16),
        partial(Norm),
        nn.relu,
        partial(nn.Dense, 10),
    )
    return linen(Sequential(layers), X4, {"Conv_0/kernel": FILTER, "Conv_1/kernel": FILTER})


def transposed() -> Family:
    layers = (partial(nn.ConvTranspose, 8, (3, 3)), partial(Norm), nn.relu, partial(nn.Dense, 10))
    return linen(Sequential(layers), X4, {"ConvTranspose_0/kernel": FILTER})


def instancenorm() -> Family:
    return after_conv(partial(nn.InstanceNorm), {"Conv_0/kernel": FILTER})


GROUPS = Sphere((-1,), 4)


def groupnorm() -> Family:
    return after_conv(partial(nn.GroupNorm, 4), {"Conv_0/kernel": GROUPS}, use_bias=False)


def groupnorm_bias() -> Family:
    return after_conv(partial(nn.GroupNorm, 4), tied("Conv_0", GROUPS, GROUPS))


def groupnorm_dense() -> Family:
    return after_dense(partial(nn.GroupNorm, 4), tied("Dense_0", GROUPS, GROUPS))


def layernorm() -> Family:
    return after_dense(partial(nn.LayerNorm), {"Dense_0/kernel": LAYER}, use_bias=False)


def layernorm_bias() -> Family:
    return after_dense(partial(nn.LayerNorm), tied("Dense_0", LAYER, LAYER))


def layernorm_conv() -> Family:
    return after_conv(partial(nn.LayerNorm), tied("Conv_0", LAYER, LAYER))


def rmsnorm() -> Family:
    return after_dense(partial(nn.RMSNorm), {"Dense_0/kernel": LAYER}, use_bias=False)


def rmsnorm_bias() -> Family:
    return after_dense(partial(nn.RMSNorm), tied("Dense_0", LAYER, LAYER))


def rms_of_features() -> Family:
    """Each feature by its root mean square over the batch: the bias is part of it."""

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), 0, keepdims=True) + 1e-6)

    return after_dense(norm, tied("Dense_0", FILTER, FILTER))


def weight_normalised() -> Family:
    class WeightNormed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.WeightNorm(nn.Conv(16, (3, 3)))(x))
            return nn.Dense(10)(x)

    return linen(WeightNormed(), X4, {"Conv_0/kernel": FILTER})


def spectrally_normalised() -> Family:
    class SpectralNormed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.SpectralNorm(nn.Dense(16))(x, update_stats=False))
            return nn.Dense(10)(x)

    return linen(SpectralNormed(), X2, {"Dense_0/kernel": LAYER})


class StandardizedConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        kernel = kernel * jax.lax.rsqrt(jnp.mean(kernel**2, (0, 1, 2), keepdims=True) + 1e-6)
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return y + self.param("bias", nn.initializers.zeros, (1, 1, 1, self.features))


def weight_standardized() -> Family:
    layers = (partial(StandardizedConv, 16), nn.relu, partial(nn.Dense, 10))
    return linen(Sequential(layers), X4, {"StandardizedConv_0/kernel": FILTER})


Attention = partial(nn.MultiHeadDotProductAttention, 4)
HEAD = Sphere((-2,))


def query_key_norm() -> Family:
    attention = partial(Attention, normalize_qk=True)
    module = "MultiHeadDotProductAttention_0"
    spheres = tied(f"{module}/query", HEAD, HEAD) | tied(f"{module}/key", HEAD, HEAD)
    return linen(Sequential((attention, partial(nn.Dense, 5))), images(4, 6, 16), spheres)


def query_key_norm_without_bias() -> Family:
    attention = partial(Attention, normalize_qk=True, use_bias=False)
    module = "MultiHeadDotProductAttention_0"
    spheres = {f"{module}/query/kernel": HEAD, f"{module}/key/kernel": HEAD}
    return linen(Sequential((attention, partial(nn.Dense, 5))), images(4, 6, 16), spheres)


class Block(nn.Module):
    norm: Callable[..., Any]
    use_bias: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(self.norm()(nn.Dense(12, use_bias=self.use_bias)(x))), None


class Stack(nn.Module):
    norm: Callable[..., Any]
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(self.norm, self.use_bias, name="layers")(x, None)
        return nn.Dense(5)(x)


def scanned_batchnorm() -> Family:
    spheres = {"layers/Dense_0/kernel": Sphere((-3, -1))}
    return linen(Stack(Norm, True), X2, spheres)


def scanned_layernorm() -> Family:
    return linen(
        Stack(nn.LayerNorm, True), X2, tied("layers/Dense_0", Sphere((-3,)), Sphere((-2,)))
    )


def scanned_groupnorm() -> Family:
    spheres = tied("layers/Dense_0", Sphere((-3, -1), 4), Sphere((-2, -1), 4))
    return linen(Stack(partial(nn.GroupNorm, 4), True), X2, spheres)


TOKENS = jax.random.randint(jax.random.key(5), (8, 12), 0, 24)  # some of the 30 never come


def embedding() -> Family:
    layers = (partial(nn.Embed, 30, 16), partial(nn.LayerNorm), nn.relu, partial(nn.Dense, 10))
    return linen(Sequential(layers), TOKENS, {"Embed_0/embedding": Sphere((-2,))})


def embedding_groupnorm() -> Family:
    layers = (
        partial(nn.Embed, 30, 16),
        partial(nn.GroupNorm, 4, reduction_axes=(-1,)),
        nn.relu,
        partial(nn.Dense, 10),
    )
    return linen(Sequential(layers), TOKENS, {"Embed_0/embedding": Sphere((-2, -1), 4)})


class PreLN(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(30, 16)(tokens)
        x += self.param("position", nn.initializers.normal(0.02), (1, tokens.shape[1], 16))
        for _ in range(self.layers):
            x += Attention()(nn.LayerNorm()(x))
            x += nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(30)(nn.LayerNorm()(x))


def pre_ln() -> Family:
    return linen(PreLN(2), TOKENS, {})


class OneBranch(nn.Module):
    """A shortcut that the branch would drown, were all weights scaled up."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x += nn.Dense(16)(nn.relu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x))


def one_branch() -> Family:
    return linen(OneBranch(), X2, {})


class PostLN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x + Attention()(x))
        x = nn.LayerNorm()(x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x))))
        return nn.Dense(5)(x)


def post_ln() -> Family:
    return linen(PostLN(), images(4, 6, 16), {})


def mlp() -> Family:
    layers = (partial(nn.Dense, 32), nn.relu, partial(nn.Dense, 32), nn.relu, partial(nn.Dense, 5))
    return linen(Sequential(layers), X2, {})


def deep_mlp() -> Family:
    layers = (partial(nn.Dense, 16), nn.relu) * 30 + (partial(nn.Dense, 5),)
    return linen(Sequential(layers), X2, {})


FAMILIES = {
    name: make
    for name, make in list(globals().items())
    if callable(make) and getattr(make, "__annotations__", {}) == {"return": Family}
}
