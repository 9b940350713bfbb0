"""Explicit sharding over eight devices: types in, the same types out, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from ..compiling import quick_jit
from ..optimizers import TABLE, types

P = jax.sharding.PartitionSpec
SHAPE = (2, 16, 8)

# name -> (partition of the kernel, its sphere)
LAYOUTS = {
    "index axis replicated": (P(None, "x"), so.Sphere()),
    "index axis sharded": (P(None, "x"), so.Sphere(index_axes=(1,))),
    "last axis sharded": (P(None, None, "x"), so.Sphere()),
    "two index axes": (P(None, "x"), so.Sphere(index_axes=(1, -1))),
    "whole array": (P(None, "x"), so.Sphere(index_axes=())),
    "blocks replicated": (P(None, "x"), so.Sphere(blocks=4)),
    "blocks as shards": (P(None, "x"), so.Sphere(index_axes=(1,), blocks=8)),
    "blocks across shards": (P(None, "x"), so.Sphere(index_axes=(1,), blocks=4)),
    "no sphere": (P(None, "x"), None),
}


def _track(learning_rate, spheres, weight_decay):
    return so.track(so.adamsrt(learning_rate, spheres, weight_decay=weight_decay), spheres)


OPTIMIZERS = TABLE | {"track": _track}
pytestmark = [
    pytest.mark.parametrize("name", OPTIMIZERS),
    pytest.mark.parametrize("layout", LAYOUTS),
]


@pytest.fixture
def mesh():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def _values(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def _tree(seed, mesh, partition):
    sharding = jax.sharding.NamedSharding(mesh, partition)
    return {"kernel": jax.device_put(_values(seed), sharding), "free": jnp.ones((4,))}


def test_types_are_kept_and_numbers_are_those_of_one_device(name, layout, mesh):
    partition, sphere = LAYOUTS[layout]
    tx = OPTIMIZERS[name](0.01, {"kernel": sphere, "free": None}, weight_decay=0.1)
    params = _tree(0, mesh, partition)
    first = state = tx.init(params)
    assert types(quick_jit(tx.init)(params)) == types(first)
    update = quick_jit(tx.update)
    for seed in (1, 2):
        updates, state = update(_tree(seed, mesh, partition), state, params)
        assert types(state) == types(first)
        assert types(updates) == types(params)

    with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        params = {"kernel": jnp.asarray(_values(0)), "free": jnp.ones((4,))}
        state, update = tx.init(params), quick_jit(tx.update)
        for seed in (1, 2):
            grads = {"kernel": jnp.asarray(_values(seed)), "free": jnp.ones((4,))}
            expected, state = update(grads, state, params)
    # What is retracted is a difference of parameters, and rounded like them.
    rounding = 1e-6 if name in TABLE and TABLE[name].keeps_radius else 1e-7
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=2e-5, atol=rounding)
