"""The learning rate at the end of every chain."""

from typing import Any

import jax
import optax

from spherical_optax._core.arguments import require_rate
from spherical_optax._core.trees import cast_like


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, which keeps the dtypes of the updates whatever that of the rate.

    Under strict promotion a rate of float32 and updates of bfloat16 are an error in Optax.
    """
    tx = optax.scale_by_learning_rate(require_rate(learning_rate))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            found, state = tx.update(updates, state, params)
        return cast_like(found, updates), state

    return optax.GradientTransformation(tx.init, update)
