"""Weight decay, everywhere or off the spheres."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import optax

from spherical_optax._core.boxes import box_like, to_dictionaries
from spherical_optax._core.matching import on_spheres
from spherical_optax._core.sphere import Spheres


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, which takes what it does not.

    That is float32 gradients of bfloat16 parameters under strict promotion, and a mask of a FlatMap.
    """
    tx = optax.add_decayed_weights(weight_decay, mask)

    def init(params):
        return tx.init(to_dictionaries(params))

    def update(updates, state, params=None):
        x, g = to_dictionaries(params), to_dictionaries(updates)
        with jax.numpy_dtype_promotion("standard"):
            found, state = tx.update(g, state, x)
        return box_like(updates, found), state

    return optax.GradientTransformation(init, update)


def add_decay_off_spheres(
    spheres: Spheres, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Adds weight decay off the spheres only: on a sphere it is radial, and a retraction undoes it."""

    is_on = on_spheres(spheres)
    return add_decayed_weights(weight_decay, lambda tree: jax.tree.map(operator.not_, is_on(tree)))
