"""Transport, exponential map and Theorem 2 against values computed in extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

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
    moved = jax.jit(so.geometry.transport, static_argnums=3)(
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


def _close(actual, expected, item):
    """1e-10 of the largest coordinate."""
    expected = np.asarray(expected)
    atol = 1e-10 * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=atol, err_msg=item)


class TestTheorem2:
    """Every recorded step x - eta a / b, as image and as measured."""

    @pytest.fixture
    def items(self):
        stored = dict(recorded.arrays("theory_thm2"))
        count = int(stored.pop("count"))
        assert count == 27
        fields = {}
        for name, value in stored.items():
            item, field = name.split("__")
            fields.setdefault(field, {})[item] = jnp.asarray(value)
        return fields

    @staticmethod
    def _images(items):
        return {
            item: so.analysis.image_step(x, items["a"][item], items["b"][item], eta, WHOLE)
            for (item, x), eta in zip(items["x"].items(), items["eta"].values(), strict=True)
        }

    def test_image(self, items):
        for item, step in self._images(items).items():
            _close(step.effective_lr[0], items["eta_e"][item], item)
            _close(step.direction, items["c_perp"][item], item)
            _close(step.radius[0], items["r"][item], item)
            _close(step.next_radius[0], items["r_next"][item], item)
            _close(step.next_direction, items["u_next"][item], item)
            length = items["eta_e"][item] * jnp.linalg.norm(items["c_perp"][item])
            _close(step.angle[0], jnp.arctan(length), item)

    def test_measured(self, items):
        for item, x in items["x"].items():
            update = -items["eta"][item] * items["a"][item] / items["b"][item]
            step = so.analysis.measure_step(x, update, WHOLE)
            velocity = -items["eta_e"][item] * items["c_perp"][item]
            _close(step.velocity, velocity, item)
            _close(step.tan_angle[0], jnp.linalg.norm(velocity), item)
            _close(step.next_radius[0], items["r_next"][item], item)
            _close(step.radius_ratio[0], items["r_next"][item] / items["r"][item], item)
            _close(step.next_direction, items["u_next"][item], item)

    def test_error_of_the_exponential_map_is_recorded(self, items):
        for item, step in self._images(items).items():
            u = items["x"][item] / items["r"][item]
            velocity = -step.effective_lr[0] * step.direction
            gap = jnp.linalg.norm(so.geometry.exp(u, velocity, WHOLE) - step.next_direction)
            np.testing.assert_allclose(gap, items["exp_error"][item], rtol=1e-6, atol=1e-14)
