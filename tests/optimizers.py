"""One table of all optimizers, and a tree of parameters that has every kind of group in it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spherical_optax as so


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer: `make(learning_rate, spheres, **kwargs)`, and what is special about it."""

    make: Callable[..., Any]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    unit_radius: bool = False  # retracts to the unit sphere
    keeps_radius: bool = False  # retracts to whatever radius there is
    # Not a multiple of the momentum in each group: a division or a sign, element by element.
    elementwise: bool = False
    has_mu: bool = True  # keeps a momentum, of dtype mu_dtype
    couples: bool = False  # the steps of a group depend on other groups of its array

    def __call__(self, learning_rate=0.01, spheres=None, **kwargs):
        return self.make(learning_rate, spheres, **self.kwargs, **kwargs)


def _adamp_guess(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    del spheres
    return so.adamp(learning_rate, weight_decay=weight_decay, mu_dtype=mu_dtype)


def _sgdp_guess(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    del spheres
    return so.sgdp(learning_rate, weight_decay=weight_decay, mu_dtype=mu_dtype)


def _transported(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    inner = so.ema(
        0.9, spheres, transport=True, weight_decay=weight_decay, accumulator_dtype=mu_dtype
    )
    return so.hyperball(inner, learning_rate, spheres, "initial")


def _rotational(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    return optax.chain(
        so.ema(0.9, weight_decay=weight_decay, accumulator_dtype=mu_dtype),
        so.center(spheres),
        so.project(spheres),
        so.normalize(spheres, decay=0.9),
        optax.scale_by_learning_rate(learning_rate),
        so.retract(spheres, "initial"),
    )


def _braked(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    return optax.chain(
        so.adams(learning_rate, spheres, weight_decay=weight_decay, mu_dtype=mu_dtype),
        so.normalize(spheres, at_least=1e-3),
        so.retract(spheres, outward=0.5, inward=1.0),
    )


def _decoupled(learning_rate, spheres, *, weight_decay=0.0, mu_dtype=None):
    return so.decouple(
        so.adams(learning_rate, spheres, weight_decay=weight_decay, mu_dtype=mu_dtype),
        so.adam(learning_rate),
        (spheres,),
        phi=jax.nn.softplus,
    )


TABLE = {
    "adam": Row(so.adam, elementwise=True),
    "adams": Row(so.adams),
    "adamst": Row(so.adamst),
    "adamsrt": Row(so.adamsrt),
    "adamg": Row(so.adamg, unit_radius=True),
    "adamg_star": Row(so.adamg_star, unit_radius=True, has_mu=False),
    "sgd": Row(so.sgd, has_mu=False),
    "sgd_momentum": Row(so.sgd, {"momentum": 0.9}),
    "sgd_mrt": Row(so.sgd_mrt),
    "adamp": Row(so.adamp, elementwise=True),
    "adamp_guess": Row(_adamp_guess, elementwise=True, couples=True),
    "sgdp": Row(so.sgdp),
    "sgdp_guess": Row(_sgdp_guess, couples=True),
    "adamh": Row(so.adamh, elementwise=True, keeps_radius=True),
    "muonh": Row(so.muonh, keeps_radius=True, couples=True),
    "hyperball": Row(_transported, keeps_radius=True),
    "rotational": Row(_rotational, keeps_radius=True),
    "braked": Row(_braked, keeps_radius=True),
    "decoupled": Row(_decoupled),
}


def track_adam(learning_rate, spheres):
    """`so.track` around an optimizer that knows no spheres."""
    return so.track(optax.adam(learning_rate), spheres)


SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "norm": {"kernel": (5, 4), "bias": (4,)},
    "heads": (6, 2, 3),
    "layer": (4, 3),
    "one_row": (1, 3),
    "scalar": (),
}
SPHERES = {
    "conv": {"kernel": so.Sphere(), "bias": None},
    "norm": {"kernel": so.Sphere(blocks=2, tie="norm"), "bias": so.Sphere(blocks=2, tie="norm")},
    "heads": so.Sphere(index_axes=(1,)),
    "layer": so.Sphere(index_axes=()),
    "one_row": so.Sphere(),
    "scalar": None,
}


def random_tree(seed, shapes=None, dtype=jnp.float32, scale=1.0):
    """Normal values in a tree of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray((scale * rng.normal(size=shape)).astype(jnp.dtype(dtype))),
        SHAPES if shapes is None else shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def types(tree):
    """Shape, dtype, weak type and sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)
