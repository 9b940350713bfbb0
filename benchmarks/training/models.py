"""The paper's networks (Flax Linen) by name, for small images in NHWC.

`dtype` is the dtype of the activations; parameters, statistics and logits stay in float32. `norm`
takes the place of Flax's BatchNorm: see normalization.py.

The networks follow the authors' released code. Convolutions have no bias, and BatchNorm follows
every one of them. The shortcut of a ResNet is a 1x1 convolution where the shape changes. The
weights of a convolution start uniform in +-1/sqrt(fan_in), which is part of the recipe: on a sphere
the radius sets the effective learning rate, and with these weights every filter has a radius of
about 0.58, whatever its size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nn.Conv, use_bias=False, kernel_init=fan_in_uniform)


Norm = Callable[..., Callable[[jax.Array], jax.Array]]


def make_norm(kind: Norm, train: bool, dtype: jax.typing.DTypeLike) -> Norm:
    options = {"momentum": 0.9, "epsilon": 1e-5, "dtype": dtype}
    return partial(kind, use_running_average=not train, **options)


class ImageSizeError(ValueError):
    """The images are too small for the network."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    width: int
    stride: int
    dtype: jax.typing.DTypeLike
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = partial(Conv, dtype=self.dtype), self.norm
        shortcut = x
        # Padding 1 on both sides, as in PyTorch; "SAME" would pad only on the right at stride 2.
        x = conv(self.width, (3, 3), self.stride, padding=1)(x)
        x = nn.relu(norm()(x))
        x = conv(self.width, (3, 3), padding=1)(x)
        x = norm()(x)
        if shortcut.shape != x.shape:
            shortcut = conv(self.width, (1, 1), self.stride)(shortcut)
            shortcut = norm()(shortcut)
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """A 3x3 stem at full resolution, then stages of basic blocks, each but the first halving it."""

    num_classes: int
    widths: Sequence[int]
    blocks: int
    dtype: jax.typing.DTypeLike = jnp.float32
    norm: Norm = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = make_norm(self.norm, train, self.dtype)
        x = Conv(self.widths[0], (3, 3), padding=1, dtype=self.dtype)(x)
        x = nn.relu(norm()(x))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(width, stride, self.dtype, norm)(x)
        features = x.mean((1, 2), jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=fan_in_uniform)(features)


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each closed by a 2x2 max pooling, and one linear classifier."""

    num_classes: int
    stages: Sequence[Sequence[int]]
    dtype: jax.typing.DTypeLike = jnp.float32
    norm: Norm = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        smallest = 2 ** len(self.stages)
        if min(x.shape[1:3]) < smallest:
            raise ImageSizeError(
                f"VGG needs images of at least {smallest}x{smallest}, not {x.shape}"
            )
        norm = make_norm(self.norm, train, self.dtype)
        for widths in self.stages:
            for width in widths:
                x = Conv(width, (3, 3), padding=1, dtype=self.dtype)(x)
                x = nn.relu(norm()(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        features = x.reshape(x.shape[0], -1).astype(jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=fan_in_uniform)(features)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(ResNet, widths=(16, 32, 64), blocks=3),
    "resnet18": partial(ResNet, widths=(64, 128, 256, 512), blocks=2),
    "vgg16": partial(VGG, stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)),
    "resnet8": partial(ResNet, widths=(8, 16, 32), blocks=1),
    "digits": partial(ResNet, widths=(16, 32, 64), blocks=1),
}
