"""Hints to XLA: values and dependencies that change no result.

Every hint names the version of JAX, the figure for which it is here, and the test that fails without it.
A test also fails when the compiler no longer needs the hint: then the hint goes.
"""

from typing import Any

import jax
import jax.numpy as jnp

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
