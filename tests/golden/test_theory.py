"""Parallel transport and the exponential map against values computed in extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from ..compiling import quick_jit
from . import recorded

pytestmark = pytest.mark.usefixtures("x64")

WHOLE = so.Sphere(index_axes=())  # every recorded vector is one group


def _items(table):
    """Field -> {item: vector}: all items in one tree."""
    fields = {}
    for name, value in recorded.arrays("theory").items():
        where, item, field = name.split("__")
        if where == table:
            fields.setdefault(field, {})[item] = jnp.asarray(value)
    return fields


def test_transport():
    items = _items("transport")
    moved = quick_jit(so.geometry.transport, static_argnums=3)(
        items["x1"], items["x2"], items["m"], WHOLE
    )
    assert len(moved) == 15
    for item, vector in moved.items():
        np.testing.assert_allclose(
            vector, items["gamma_tangent"][item], rtol=1e-10, atol=1e-10, err_msg=item
        )


def test_angle():
    items = _items("transport")
    angles = so.geometry.angle(items["x1"], items["x2"], WHOLE)
    for item, angle in angles.items():
        np.testing.assert_allclose(angle[0], items["angle"][item], rtol=1e-10, atol=1e-15)


def test_exp():
    items = _items("thm2")
    velocity = jax.tree.map(lambda eta, c: -eta * c, items["eta_e"], items["c_perp"])
    point = jax.tree.map(lambda x, r: x / r, items["x"], items["r"])
    reached = so.geometry.exp(point, velocity, WHOLE)
    assert len(reached) > 20
    for item, vector in reached.items():
        np.testing.assert_allclose(
            vector, items["exp_point"][item], rtol=1e-10, atol=1e-10, err_msg=item
        )
