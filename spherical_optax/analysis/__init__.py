"""Measures what optimizers do on the spheres: effective learning rates, angles and radii.

- `image_step`, `measure_step`, the `effective_` functions and `decompose_momentum` look at one step, the
  `_equilibrium` functions and `adamg_star_from_sgd` at where steps lead.
- `so.track` measures the steps of a training run.
- `summary`, `summary_table`, `write_summary` and the `plot_` functions show the measurements.
"""

from spherical_optax.analysis._pictures.history import plot_angles, plot_effective_lr, plot_radii
from spherical_optax.analysis._pictures.sphere import plot_sphere
from spherical_optax.analysis._theory.equilibrium import (
    Equilibrium,
    adamw_equilibrium,
    lion_equilibrium,
    sgd_equilibrium,
)
from spherical_optax.analysis._theory.momentum_parts import MomentumParts, decompose_momentum
from spherical_optax.analysis._theory.one_step import (
    ImageStep,
    MeasuredStep,
    image_step,
    measure_step,
)
from spherical_optax.analysis._theory.table1 import (
    EffectiveStep,
    effective_adam,
    effective_sgd,
    effective_sgd_momentum,
)
from spherical_optax.analysis._theory.theorem4 import AdamGStar, adamg_star_from_sgd
from spherical_optax.analysis._tracking.summary import summary, summary_table, write_summary
from spherical_optax.analysis._tracking.wrapper import TrackState, track

__all__ = [
    "AdamGStar",
    "EffectiveStep",
    "Equilibrium",
    "ImageStep",
    "MeasuredStep",
    "MomentumParts",
    "TrackState",
    "adamg_star_from_sgd",
    "adamw_equilibrium",
    "decompose_momentum",
    "effective_adam",
    "effective_sgd",
    "effective_sgd_momentum",
    "image_step",
    "lion_equilibrium",
    "measure_step",
    "plot_angles",
    "plot_effective_lr",
    "plot_radii",
    "plot_sphere",
    "sgd_equilibrium",
    "summary",
    "summary_table",
    "track",
    "write_summary",
]
