"""Weight decay off the spheres."""

import optax

from spherical_optax._core.matching import match
from spherical_optax._core.sphere import Spheres


def add_decay_off_spheres(
    spheres: Spheres, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Adds weight decay off the spheres only: on a sphere it is radial, and a retraction undoes it."""

    def is_off(tree):
        groups = match(spheres, tree).with_tangent_space()
        return groups.label(tree, lambda leaf: leaf is None)

    return optax.add_decayed_weights(weight_decay, mask=is_off)
