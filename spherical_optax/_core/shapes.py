"""Names for the types of arguments and results.

Trees have any structure, and a type checker cannot describe them: they are documented by comments. The
shapes of arrays are annotated with jaxtyping; tests/contract/test_shapes.py checks them for every
optimizer.
"""

from typing import Any

import optax
from jaxtyping import Array, Float

Scalar = optax.ScalarOrSchedule
Transformation = optax.GradientTransformationExtraArgs

Shape = tuple[int, ...]
Params = Any  # tree of parameter arrays x, or of vectors at x
PerGroup = Any  # tree like the parameters: `OfGroups` on the spheres, None elsewhere

OfArray = Float[Array, "*array"]  # an array of parameters, of its gradient or its momentum
OfGroups = Float[Array, "*groups"]  # one number per group: the summed axes have length 1
SpreadGroups = Float[Array, "*#array"]  # `OfGroups`, ready to broadcast against the array
