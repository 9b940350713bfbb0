"""Equinox modules and dataclasses: static fields, None leaves, attribute paths."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..optimizers import TABLE, random_tree


class Mlp(eqx.Module):
    """Two layers, the first without bias, under a normalisation; functions are leaves in Equinox."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: object

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, use_bias=False, key=keys[0])
        self.second = eqx.nn.Linear(4, 2, key=keys[1])
        self.activation = jax.nn.relu

    def __call__(self, x):
        x = self.first(x)
        return self.second(self.activation(x / jnp.linalg.norm(x)))


def _loss(model, inputs):
    return jnp.mean(jax.vmap(model)(inputs) ** 2)


@pytest.mark.parametrize("name", TABLE)
def test_equinox(name):
    """Weights are (out, in) there, so the groups are told apart by axis 0."""
    model = Mlp(jax.random.key(0))
    inputs = random_tree(0, {"x": (5, 3)})["x"]
    params = eqx.filter(model, eqx.is_inexact_array)
    spheres = so.spheres_where(params, "^first/weight$", so.Sphere(index_axes=()))
    tx = TABLE[name](0.01, spheres)
    state = tx.init(params)

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(_loss)(model, inputs)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return loss, eqx.apply_updates(model, updates), state

    losses = []
    for _ in range(3):
        loss, model, state = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert model.first.bias is None

    # The same on bare arrays.
    arrays = {"w": params.first.weight, "v": params.second.weight, "b": params.second.bias}
    tx = TABLE[name](0.01, {"w": so.Sphere(index_axes=()), "v": None, "b": None})
    state = tx.init(arrays)

    def plain_loss(arrays):
        x = inputs @ arrays["w"].T
        x = jax.nn.relu(x / jnp.linalg.norm(x, axis=1, keepdims=True))
        return jnp.mean((x @ arrays["v"].T + arrays["b"][None]) ** 2)

    for expected in losses:
        value, grads = jax.value_and_grad(plain_loss)(arrays)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        updates, state = tx.update(grads, state, arrays)
        arrays = optax.apply_updates(arrays, updates)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """Two arrays and a field that is no data."""

    kernel: jax.Array
    bias: jax.Array | None
    name: str = dataclasses.field(default="layer", metadata={"static": True})


@pytest.mark.parametrize("name", TABLE)
def test_dataclasses(name):
    arrays = random_tree(0, {"kernel": (3, 2), "bias": (2,)})
    params = [Layer(arrays["kernel"], arrays["bias"]), Layer(arrays["kernel"], None)]
    spheres = so.spheres_where(params, "kernel")
    assert spheres == [Layer(so.Sphere(), None), Layer(so.Sphere(), None)]
    tx = TABLE[name](0.01, spheres)
    updates, _ = tx.update(params, tx.init(params), params)
    plain = TABLE[name](0.01, {"kernel": so.Sphere(), "bias": None})
    expected, _ = plain.update(arrays, plain.init(arrays), arrays)
    np.testing.assert_array_equal(updates[0].kernel, expected["kernel"])
    np.testing.assert_array_equal(updates[0].bias, expected["bias"])
    np.testing.assert_array_equal(updates[1].kernel, expected["kernel"])
    assert updates[1].bias is None
    assert updates[1].name == "layer"


def test_paths_of_attributes():
    params = {"block": Layer(jnp.ones((3, 2)), jnp.ones(2))}
    assert so.spheres_where(params, "^block/kernel$")["block"].kernel == so.Sphere()
    with pytest.raises(ValueError, match="block/bias"):
        so.adams(0.1, {"block": Layer(so.Sphere(), so.Sphere((3,)))}).init(params)
