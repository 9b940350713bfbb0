"""The public names and their arguments, which callers outside the repository rely on."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from spherical_optax._transforms.decouple import identity

from ..optimizers import SPHERES, TABLE, random_tree

REQUIRED = inspect.Parameter.empty
# name -> positional arguments with their defaults, keyword-only ones with theirs
SIGNATURES = {
    "Sphere": ({"index_axes": (-1,), "blocks": None, "tie": None}, {}),
    "spheres_where": ({"params": REQUIRED, "pattern": REQUIRED, "sphere": so.Sphere()}, {}),
    "find_spheres": (
        {"fn": REQUIRED, "params": REQUIRED},
        {"key": REQUIRED, "tol": 1e-2, "vectors": False},
    ),
    "survey_spheres": (
        {"fn": REQUIRED, "params": REQUIRED},
        {"key": REQUIRED, "tol": 1e-2, "vectors": False},
    ),
    "check_spheres": (
        {"fn": REQUIRED, "params": REQUIRED, "spheres": REQUIRED},
        {"key": REQUIRED},
    ),
    "ema": (
        {"decay": REQUIRED, "spheres": None},
        {"transport": False, "rescale": False, "debias": True, "accumulator_dtype": None},
    ),
    "trace": (
        {"decay": REQUIRED, "spheres": None},
        {"transport": False, "rescale": False, "accumulator_dtype": None},
    ),
    "rms": (
        {"decay": REQUIRED, "eps": 1e-8, "spheres": None},
        {"reduce": "mean", "rescale": False},
    ),
    "quotient": ({"a": REQUIRED, "b": REQUIRED}, {}),
    "project": ({"spheres": REQUIRED}, {}),
    "normalize": ({"spheres": REQUIRED}, {"decay": None, "at_least": None}),
    "retract": (
        {"spheres": REQUIRED, "radius": "current"},
        {"outward": 0.0, "inward": 0.0},
    ),
    "center": ({"spheres": REQUIRED}, {}),
    "on_spheres": ({"spheres": REQUIRED}, {}),
    "decouple": (
        {"direction": REQUIRED, "magnitude": REQUIRED, "gains": REQUIRED},
        {"phi": identity, "start": None},
    ),
    "sgd": (
        {"learning_rate": REQUIRED, "spheres": None, "momentum": None},
        {"weight_decay": 0.0, "mu_dtype": None},
    ),
    "sgd_mrt": (
        {"learning_rate": REQUIRED, "spheres": REQUIRED, "momentum": 0.9},
        {"weight_decay": 0.0, "mu_dtype": None},
    ),
    "adamg_star": ({"learning_rate": REQUIRED, "spheres": REQUIRED}, {"weight_decay": 0.0}),
    "stacked": ({"make": REQUIRED, "spheres": None}, {"below": 2**14}),
    "sgdp": (
        {"learning_rate": REQUIRED, "spheres": None, "momentum": 0.9},
        {"weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False, "mu_dtype": None},
    ),
    "hyperball": (
        {"inner": REQUIRED, "learning_rate": REQUIRED, "spheres": REQUIRED, "radius": "current"},
        {},
    ),
    "muonh": (
        {"learning_rate": REQUIRED, "spheres": REQUIRED, "beta": 0.95},
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "radius": "initial", "weight_decay": 0.0},
    ),
}
for _name in ("adam", "adams", "adamst", "adamsrt", "adamg", "adamp", "adamh"):
    SIGNATURES[_name] = (
        {
            "learning_rate": REQUIRED,
            "spheres": None if _name in ("adam", "adamp") else REQUIRED,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        },
        {"weight_decay": 0.0, "mu_dtype": None},
    )

VARIANTS = {
    "Adam": "adam",
    "AdamG": "adamg",
    "AdamG*": "adamg_star",
    "Adam w/o (a)": "adams",
    "Adam w/o (ab)": "adamst",
    "Adam w/o (abc)": "adamsrt",
    "AdamS": "adams",
    "AdamST": "adamst",
    "AdamSRT": "adamsrt",
    "SGD": "sgd",
    "SGD-M": "sgd_momentum",
    "SGD-MRT": "sgd_mrt",
}


def test_geometry_shows_ten_functions():
    assert dir(so.geometry) == sorted(so.geometry.__all__)
    assert len(so.geometry.__all__) == 10
    assert all(inspect.isfunction(getattr(so.geometry, name)) for name in so.geometry.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """All these arguments, in this order; more may follow, if they have defaults."""
    parameters = inspect.signature(getattr(so, name)).parameters
    positional, keywords = SIGNATURES[name]
    listed = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {p.name: p.default for p in listed} == positional
    assert [p.name for p in listed] == list(positional)
    for keyword, default in keywords.items():
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[keyword].default == default
    more = set(parameters) - set(positional) - set(keywords)
    assert all(parameters[name].default is not REQUIRED for name in more)


def test_all_names_are_listed():
    assert {*SIGNATURES, "geometry", "VARIANTS"} <= set(dir(so))
    assert set(so.__all__) <= set(dir(so))


def test_names_of_the_paper():
    assert set(so.VARIANTS) >= set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    """The function found under the paper's name takes the steps of the optimizer meant."""
    params = random_tree(0)
    ends = []
    for make in (so.VARIANTS[name], TABLE[VARIANTS[name]]):
        tx, x = make(0.01, SPHERES, weight_decay=0.1), params
        state, update = tx.init(x), jax.jit(tx.update)
        for seed in (1, 2):
            updates, state = update(random_tree(seed), state, x)
            x = optax.apply_updates(x, updates)
        ends.append(x)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("name", TABLE)
def test_vmap(name):
    """An ensemble: every member takes the steps that it takes alone."""
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)
    members = [random_tree(0), random_tree(1)]
    grads = [random_tree(2), random_tree(3)]
    together, all_grads = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (members, grads)
    )
    update = jax.jit(jax.vmap(tx.update))
    actual, _ = update(all_grads, jax.vmap(tx.init)(together), together)
    for i, (params, g) in enumerate(zip(members, grads, strict=True)):
        expected, _ = tx.update(g, tx.init(params), params)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], e, rtol=1e-5, atol=1e-6)
