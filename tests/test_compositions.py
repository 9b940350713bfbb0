"""The compositions of the README give the optimizers that they are said to give."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .optimizers import random_tree

pytestmark = pytest.mark.usefixtures("standard_promotion")
README = Path(__file__).parents[1] / "README.md"
FILTERS, LAYERS = so.Sphere(), so.Sphere(())
LINES = {
    found[1].strip(): re.findall("`(.*?)`", found[2]) + re.findall("`(.*?)`", found[3])
    for found in re.finditer(r"^\| ([^|]+)\|([^|]*)\|([^|]*)\|$", README.read_text("utf-8"), re.M)
    if "so." in found[2] + found[3] and "`so." not in found[1]
}
# What the line is compared with, where Optax or this package has it under its own name; its rate.
SAME = {
    "AdamP": (so.adamp(1e-3, FILTERS), 1e-3),
    "AdamH": (so.adamh(1e-2, LAYERS), None),
    "Fromage, for tangential gradients": (optax.fromage(1e-2), None),
    "LAMB": (optax.lamb(1e-3), 1e-3),
    "LARS, where every array is in `layers` and not zero": (optax.lars(0.1), 0.1),
}


def _made(line, rate):
    tx = eval(line, {"so": so, "optax": optax, "filters": FILTERS, "layers": LAYERS})
    return tx if rate is None else optax.chain(tx, optax.scale_by_learning_rate(rate))


def _run(tx, sphere=None, dtype=jnp.float32):
    x = random_tree(0, {"a": (6, 4), "b": (3, 3, 2, 5)}, dtype)
    state, update = tx.init(x), jax.jit(tx.update)
    for seed in (1, 2, 3):
        g = random_tree(seed, {"a": (6, 4), "b": (3, 3, 2, 5)}, dtype)
        g = g if sphere is None else so.geometry.project(x, g, sphere)
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
    return x


def test_the_table_is_there():
    assert len(LINES) >= 10
    assert set(SAME) < set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_every_line_trains(name):
    for line in LINES[name]:
        x = _run(_made(line, None if "chain" not in line else 1e-2))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(x))
        assert all(
            bool(jnp.any(a != b))
            for a, b in zip(
                jax.tree.leaves(x),
                jax.tree.leaves(random_tree(0, {"a": (6, 4), "b": (3, 3, 2, 5)})),
                strict=True,
            )
        )


@pytest.mark.parametrize("name", SAME)
def test_same(name):
    expected, rate = SAME[name]
    sphere = LAYERS if "tangential" in name else None
    actual = _run(_made(LINES[name][0], rate), sphere)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
        actual,
        _run(expected, sphere),
    )


def _chain_of_adamg():
    a = so.ema(0.9, FILTERS, transport=True)
    b = so.rms(0.999, spheres=FILTERS, reduce="sum")
    rate = optax.scale_by_learning_rate(0.1)
    return optax.chain(so.quotient(a, b), rate, so.retract(FILTERS, 1.0))


def _chain_of_hyperball(radius):
    rate = optax.scale_by_learning_rate(0.1)
    inner, last = optax.scale_by_adam(), so.retract(FILTERS, radius)
    return optax.chain(inner, so.normalize(FILTERS), rate, last)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tx", "chain"),
    [
        (so.adamg(0.1, FILTERS), _chain_of_adamg()),
        *(
            (so.hyperball(optax.scale_by_adam(), 0.1, FILTERS, r), _chain_of_hyperball(r))
            for r in ("current", "initial", 2.0)
        ),
    ],
    ids=["adamg", "current", "initial", "a number"],
)
def test_the_same_as_the_chain(tx, chain):
    """They sum over old arrays alone, where the chain sums over x + q; the numbers are the chain's."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
        *(_run(made, dtype=jnp.float64) for made in (tx, chain)),
    )
