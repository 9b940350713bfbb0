"""Shapes and spheres of the parameters on which single optimizer steps are measured."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import spherical_optax as so
from benchmarks.training.build import find_filter_spheres
from benchmarks.training.models import MODELS

IMAGE = (32, 32, 3)
Shapes = dict[str, tuple[int, ...]]


def list_resnet50() -> Shapes:
    """The parameters of the ImageNet network, by name: convolutions, BatchNorm, classifier."""
    convolutions, inputs = {"stem": (7, 7, 3, 64)}, 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            convolutions[f"{name}/reduce"] = (1, 1, inputs, width)
            convolutions[f"{name}/conv"] = (3, 3, width, width)
            convolutions[f"{name}/expand"] = (1, 1, width, 4 * width)
            if block == 0:
                convolutions[f"{name}/shortcut"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    return _add_norms(convolutions) | {"head/kernel": (2048, 1000), "head/bias": (1000,)}


def list_gpt2() -> Shapes:
    """The parameters of GPT-2 with 124 million: 50 matrices, and 98 vectors."""
    width = 768
    shapes: Shapes = {"wte": (50257, width), "wpe": (1024, width)}
    for i in range(12):
        dense = {"qkv": (width, 3 * width), "proj": (width, width)}
        dense |= {"fc": (width, 4 * width), "out": (4 * width, width)}
        shapes |= {f"h{i}/{name}/kernel": shape for name, shape in dense.items()}
        shapes |= {f"h{i}/{name}/bias": shape[1:] for name, shape in dense.items()}
        for norm in ("ln1", "ln2"):
            shapes |= {f"h{i}/{norm}/scale": (width,), f"h{i}/{norm}/bias": (width,)}
    return shapes | {"ln/scale": (width,), "ln/bias": (width,)}


def list_small() -> Shapes:
    """300 small arrays."""
    return _add_norms({f"block{i}": (3, 3, 16, 16) for i in range(100)})


def _add_norms(convolutions: Shapes) -> Shapes:
    norms = {f"{k}/{part}": (s[-1],) for k, s in convolutions.items() for part in ("scale", "bias")}
    return {f"{k}/kernel": s for k, s in convolutions.items()} | norms


LISTED = {"resnet50": list_resnet50, "gpt2": list_gpt2, "small": list_small}


def describe_network(model: str) -> tuple[Any, Any]:
    """Shapes of the parameters, and their spheres.

    In a listed network, every kernel and matrix has one sphere for each output, whether a norm follows
    or not: that makes no difference to the cost of an optimizer.
    """
    if model in LISTED:
        listed = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in LISTED[model]().items()}
        return listed, so.spheres_where(
            listed, lambda path, x: x.ndim > 1 and path != "head/kernel"
        )
    images = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    init = functools.partial(MODELS[model](10).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
    return shapes, find_filter_spheres(MODELS[model](10), IMAGE)
