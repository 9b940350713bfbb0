"""Optimizers and measurements for normalised networks in JAX.

Weights followed by a normalisation layer can be scaled without changing the network: training really
happens on the unit sphere of each filter. `Sphere` describes which parameters live on spheres.
`adamsrt` and its siblings are complete optimizers. `ema`, `rms` and the other building blocks are for
optimizers of your own.

Numbers in brackets, such as [19], are equations of the paper, "A spherical analysis of Adam with Batch
Normalization".

The examples in docstrings assume `import jax, jax.numpy as jnp, optax, spherical_optax as so` and
`jnp.set_printoptions(precision=3, suppress=True)`.
"""

from spherical_optax import analysis, geometry
from spherical_optax._core.matching import on_spheres, spheres_where
from spherical_optax._core.sphere import Sphere
from spherical_optax._discovery.check import check_spheres
from spherical_optax._discovery.find import find_spheres, survey_spheres
from spherical_optax._optimizers.adam_variants import adam, adams, adamsrt, adamst
from spherical_optax._optimizers.adamg import adamg
from spherical_optax._optimizers.adamg_star import adamg_star
from spherical_optax._optimizers.adamp import adamp, sgdp
from spherical_optax._optimizers.hyperball import adamh, hyperball, muonh
from spherical_optax._optimizers.sgd_variants import sgd, sgd_mrt
from spherical_optax._optimizers.variants import VARIANTS
from spherical_optax._transforms.constraints import center, normalize, project
from spherical_optax._transforms.decouple import decouple
from spherical_optax._transforms.momentum import ema, trace
from spherical_optax._transforms.quotient import quotient
from spherical_optax._transforms.retract import retract
from spherical_optax._transforms.second_moment import rms
from spherical_optax._transforms.stacked import stacked
from spherical_optax.analysis import track

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Sphere",
    "adam",
    "adamg",
    "adamg_star",
    "adamh",
    "adamp",
    "adams",
    "adamsrt",
    "adamst",
    "analysis",
    "center",
    "check_spheres",
    "decouple",
    "ema",
    "find_spheres",
    "geometry",
    "hyperball",
    "muonh",
    "normalize",
    "on_spheres",
    "project",
    "quotient",
    "retract",
    "rms",
    "sgd",
    "sgd_mrt",
    "sgdp",
    "spheres_where",
    "stacked",
    "survey_spheres",
    "trace",
    "track",
]
