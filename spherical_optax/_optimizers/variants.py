"""Optimizers by their names in the paper."""

import functools

from spherical_optax._optimizers.adam_variants import adam, adams, adamsrt, adamst
from spherical_optax._optimizers.adamg import adamg
from spherical_optax._optimizers.adamg_star import adamg_star
from spherical_optax._optimizers.sgd_variants import sgd, sgd_mrt

#: Optimizers by their names in the paper and in its released code.
VARIANTS = {
    "Adam": adam,
    "AdamG": adamg,
    "AdamG*": adamg_star,
    "Adam w/o (a)": adams,
    "Adam w/o (ab)": adamst,
    "Adam w/o (abc)": adamsrt,
    "AdamS": adams,
    "AdamST": adamst,
    "AdamSRT": adamsrt,
    "SGD": sgd,
    "SGD-M": functools.partial(sgd, momentum=0.9),
    "SGD-MRT": sgd_mrt,
}
