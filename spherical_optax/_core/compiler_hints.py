"""Hints to XLA: values, dependencies and orders of sums that change no result but its rounding.

Every hint names the version of JAX, the figure for which it is here, and the test that fails without it.
A test also fails when the compiler no longer needs the hint: then the hint goes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from spherical_optax._core.shapes import Shape

# Equal to 0.0, but another constant. XLA on a CPU orders reductions, which start from 0.0, by what else
# uses that constant. With this zero in arithmetic on groups, the sums over one array follow one another,
# while it is in cache: in a step of AdamSRT on a ResNet-18 for 19 of 19 kernels, and without the hint
# for 11 (JAX 0.10); tests/contract/test_schedule.py.
OTHER_ZERO = -0.0


def depend_on(tree: Any, on: jax.Array) -> Any:
    """Returns `tree` unchanged, but makes it depend on `on`: one number, or an array of the same shape.

    The computation of `on` then reads the old buffers before anything made from `tree` overwrites them
    in place; otherwise XLA copies these buffers. `(on & 1) < 2` is always true: XLA does not see that,
    LLVM does and drops the select. `jax.lax.optimization_barrier` does not help. Temporary memory of a
    step on the parameters of a ResNet-18 (JAX 0.10, CPU), with the hint and without:

    - `adamst(1e-3, spheres)`: 0.1 and 42.7 MiB; tests/contract/test_memory.py;
    - `track(optax.adam(1e-3), spheres, every=10)`: 45.5 and 127.8 MiB; `test_memory` in
      tests/analysis/test_replay.py.
    """
    if jnp.issubdtype(on.dtype, jnp.floating):
        on = jax.lax.bitcast_convert_type(on, jnp.dtype(f"int{8 * on.dtype.itemsize}"))
    always = (on & 1) < 2

    def hold(x: Any) -> Any:
        return jax.lax.select(always, x, jnp.zeros_like(x)) if jnp.ndim(x) else x

    return jax.tree.map(hold, tree)


# XLA sums columns on a GPU in blocks of 32 columns, and an H100 keeps 132 blocks or more busy.
COLUMNS, BLOCKS = 32, 132
# A second sum over less than 32 numbers needs no kernel of its own.
PARTS = 16


def sum_axes(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns jnp.sum(x, axes, keepdims=True); on NVIDIA's GPUs few columns are summed in two stages.

    A matrix with 768 rows or columns gives XLA 24 to 96 blocks, and its sums then read 1.2 TB/s where
    element-wise kernels move 2.6. Cut into parts that are summed first, there are enough blocks. And
    XLA no longer writes the product m x to memory before it sums it. The arithmetic of AdamSRT's step
    took on an H100 (JAX 0.11.2), in one stage and in two: 2.74 and 2.27 ms on GPT-2, 1.51 and 1.23 ms
    on ResNet-50, beside 1.83 and 0.87 ms of `optax.adam`. Tests: tests/test_column_sums.py.
    """
    cut = _find_cut(x.shape, axes) if isinstance(x, Tracer) else None
    if cut is None:
        return jnp.sum(x, axis=axes, keepdims=True)
    return _sum_by_platform(x, axes, *cut)


# Jitted, so that arrays of one shape are traced once: tracing a step of AdamSRT on 1,000 of them takes
# 2.9 s of processor time in place of 6.5 s (JAX 0.10).
@functools.partial(jax.jit, static_argnames=("axes", "axis", "parts"), inline=True)
def _sum_by_platform(x: jax.Array, axes: tuple[int, ...], axis: int, parts: int) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        cuda=lambda x: _sum_in_two_stages(x, axes, axis, parts),
        default=lambda x: jnp.sum(x, axis=axes, keepdims=True),
    )


def _find_cut(shape: Shape, axes: tuple[int, ...]) -> tuple[int, int] | None:
    """The summed axis that comes first, and the parts into which it is cut; None for one stage."""
    long = [axis for axis in axes if shape[axis] > 1]
    if not long or long != list(range(long[0], long[-1] + 1)):
        return None
    last = long[-1]
    columns = math.prod(shape[: long[0]]) * math.prod(shape[last + 1 :])
    if math.prod(shape[last + 1 :]) == 1 or columns >= COLUMNS * BLOCKS:
        return None  # rows are summed, or there are many columns
    rows, positions = shape[last], math.prod(shape[axis] for axis in long[:-1])
    if positions > 1:  # of a convolution: the parts are there already
        return (last, 1) if positions < COLUMNS <= rows else None
    parts = 1  # a power of two, as are the shards of an axis
    while (
        parts < PARTS
        and parts * columns < COLUMNS * BLOCKS
        and rows % (2 * parts) == 0
        and rows // (2 * parts) >= COLUMNS
    ):
        parts *= 2
    return (last, parts) if parts > 1 else None


def _sum_in_two_stages(x: jax.Array, axes: tuple[int, ...], axis: int, parts: int) -> jax.Array:
    cut = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    first = jnp.sum(x.reshape(cut), axis=axis + 1)
    # Without the barrier XLA makes one sum of both.
    return jnp.sum(jax.lax.optimization_barrier(first), axis=axes, keepdims=True)
