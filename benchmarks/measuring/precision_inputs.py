"""The inputs of `benchmarks.precision`, the same numbers on every machine.

The inputs of optimizers and geometry are random numbers that bfloat16 holds exactly. Therefore both
dtypes have one reference, and the last digits of NumPy's logarithms, which differ between machines,
are rounded away.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import SOURCES

STEPS, BATCH = 20, 64
SHAPES = {
    "conv1": (3, 3, 8, 16),
    "conv2": (3, 3, 8, 16),  # the shape of conv1, because `so.stacked` stacks equal shapes
    "dense": {"kernel": (32, 48), "bias": (48,)},
    "head": (32, 4, 8),
    "scale": (16,),
}

Arrays = Mapping[str, np.ndarray]
Values = Mapping[str, Arrays]  # by row, then by the name of the array


@functools.cache
def make_inputs(seed: int, *steps: int) -> Any:
    """A tree of normal numbers: parameters of size 0.1 or, with `steps`, gradients of size 1.

    With gradients of size 0.1, SGD moved by few units of bfloat16, and 0.18 of that was rounding.
    """
    rng, size = np.random.default_rng(seed), 1.0 if steps else 0.1

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return (size * rng.standard_normal((*steps, *shape))).astype(jnp.bfloat16)

    return jax.tree.map(normal, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def compute_checksum() -> int:
    """A checksum of all inputs: a comparison is void if the reference was made from others."""
    arrays = [
        *jax.tree.leaves((make_inputs(0), make_inputs(1, STEPS), make_inputs(2))),
        *make_images(),
    ]
    return functools.reduce(lambda crc, x: zlib.crc32(x.tobytes(), crc), arrays, 0)


def put_on_device(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def name_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The arrays in float64, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64)
        for path, x in jax.tree.leaves_with_path(tree)
    }


@functools.cache
def make_images() -> tuple[np.ndarray, np.ndarray]:
    rng, n = np.random.default_rng(6), 4 * BATCH
    pixels = rng.integers(0, 256, (n, *SOURCES["cifar10"].shape), np.uint8)
    return pixels, rng.integers(0, 10, n).astype(np.int32)
