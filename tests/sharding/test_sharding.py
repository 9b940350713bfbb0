"""Explicit sharding over eight devices: types in, the same types out, and the same numbers.

All layouts lie in one tree, so that every optimizer is compiled once and not once per layout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from ..compiling import usual_jit
from ..optimizers import TABLE, types

P = jax.sharding.PartitionSpec
SHAPE = (2, 16, 8)

# leaf -> (its partition, its sphere); "free" is an array that is not sharded
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
    "free": (P(), None),
}


def _track(learning_rate, spheres, weight_decay):
    return so.track(so.adamsrt(learning_rate, spheres, weight_decay=weight_decay), spheres)


OPTIMIZERS = TABLE | {"track": _track}
SPHERES = {layout: sphere for layout, (_, sphere) in LAYOUTS.items()}


@pytest.fixture
def mesh():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def _values(seed):
    rng = np.random.default_rng(seed)
    return {layout: rng.normal(size=SHAPE).astype(np.float32) for layout in LAYOUTS}


def _sharded(seed, mesh):
    return {
        layout: jax.device_put(x, jax.sharding.NamedSharding(mesh, LAYOUTS[layout][0]))
        for layout, x in _values(seed).items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_kept_and_numbers_are_those_of_one_device(name, mesh):
    tx = OPTIMIZERS[name](0.01, SPHERES, weight_decay=0.1)
    params = _sharded(0, mesh)
    first = state = tx.init(params)
    assert types(jax.jit(tx.init)(params)) == types(first)
    # Muon makes large what is small of a matrix, and its rounding with it.
    compile_step = usual_jit if name == "muonh" else jax.jit
    update = compile_step(tx.update)
    for seed in (1, 2):
        updates, state = update(_sharded(seed, mesh), state, params)
        assert types(state) == types(first)
        assert types(updates) == types(params)

    with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        params = jax.tree.map(jnp.asarray, _values(0))
        state, update = tx.init(params), compile_step(tx.update)
        for seed in (1, 2):
            expected, state = update(jax.tree.map(jnp.asarray, _values(seed)), state, params)
    # An update that retracts, or that follows from U and z, is a difference of parameters.
    difference = name == "decoupled" or (name in TABLE and TABLE[name].keeps_radius)
    rounding = 1e-6 if difference else 1e-7
    for layout in LAYOUTS:
        np.testing.assert_allclose(
            updates[layout], expected[layout], rtol=2e-5, atol=rounding, err_msg=layout
        )
