"""All that this package does for the compiler alone. No hint changes a result.

Every hint says what it is for, its figure, and the version of JAX. A test fails when the hint is
removed, or when the compiler no longer needs it: then the hint goes.
"""

from typing import Any

import jax
import jax.numpy as jnp


def depend_on(tree: Any, on: jax.Array) -> Any:
    """Returns `tree`, which XLA then computes only after `on`, a number or an array of tree's shape.

    XLA copies an array that it overwrites in place while somebody still reads it, unless the one follows
    from the other. The selection always takes `tree`: XLA does not see that, LLVM does and drops it.
    `jax.lax.optimization_barrier` does not help. ResNet-18's parameters, JAX 0.10, CPU:

    - `adamst` without weight decay: 0.1 MiB of temporary memory in place of 42.7, since <x, x> is
      read before x is overwritten (tests/contract/test_memory.py).
    """
    if jnp.issubdtype(on.dtype, jnp.floating):
        on = jax.lax.bitcast_convert_type(on, jnp.dtype(f"int{8 * on.dtype.itemsize}"))
    always = (on & 1) < 2
    return jax.tree.map(lambda x: jax.lax.select(always, x, jnp.zeros_like(x)), tree)
