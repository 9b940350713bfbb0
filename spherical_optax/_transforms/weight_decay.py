"""Weight decay off the spheres."""

import optax

from spherical_optax._core.matching import match
from spherical_optax._core.sphere import Spheres


def decay_off(
    spheres: Spheres, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Weight decay off the spheres, on which it is radial."""
    return optax.add_decayed_weights(
        weight_decay, mask=lambda tree: match(spheres, tree).with_tangent_space().off()
    )
