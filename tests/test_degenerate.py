"""Zero filters, zero gradients, lone coordinates, empty leaves, extreme radii: never NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spherical_optax as so

from .optimizers import TABLE, random_tree

SHAPES = {
    "filters": (3, 4),
    "layer": (2, 3),
    "norm": {"kernel": (3, 4), "bias": (4,)},
    "one_row": (1, 2),
    "scalar": (),
    "empty": (0, 3),
    "no_filters": (3, 0),
    "free": (3,),
}
TIED = so.Sphere(blocks=2, tie="norm")
SPHERES = {
    "filters": so.Sphere(),
    "layer": so.Sphere(index_axes=()),
    "norm": {"kernel": TIED, "bias": TIED},
    "one_row": so.Sphere(),
    "scalar": so.Sphere(index_axes=()),
    "empty": so.Sphere(),
    "no_filters": so.Sphere(),
    "free": None,
}
RADII = {
    "float32": (0.0, 1e-15, 1e-3, 1.0, 1e15),
    "bfloat16": (0.0, 1e-15, 1e-3, 1.0, 1e15),
    "float16": (0.0, 1e-3, 1.0, 1e2),
}
# leaf or filter -> factor, for the parameters and for the gradients
FACTORS = {"filters": (1, 4), "layer": (), "norm": (), "one_row": (1, 2), "scalar": (), "free": ()}


def _factors(values):
    return st.fixed_dictionaries(
        {
            leaf: st.lists(
                st.sampled_from(values), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))
            )
            for leaf, shape in FACTORS.items()
        }
    )


def _scaled(tree, factors):
    scaled = dict(tree)
    for leaf, factor in factors.items():
        factor = np.asarray(factor, np.float32).reshape(FACTORS[leaf])
        scaled[leaf] = jax.tree.map(
            lambda x, f=factor: (np.asarray(x, np.float32) * f).astype(x.dtype), tree[leaf]
        )
    return scaled


def _by_radius(params, grads):
    """The gradient of a radially-invariant loss is longer where the radius is smaller."""

    def longer(x, g):
        x, dtype = x.astype(jnp.float32), g.dtype
        r = jnp.linalg.norm(x, axis=0, keepdims=True) if x.ndim else jnp.abs(x)
        return (g.astype(jnp.float32) / jnp.where(r > 0, r, 1.0)).astype(dtype)

    return jax.tree.map(longer, params, grads)


@functools.cache
def _four_steps(name):
    """Everything that four steps leave behind: updates, states and points."""

    @jax.jit
    def run(params, grads, by_radius, weight_decay):
        tx = TABLE[name](0.1, SPHERES, weight_decay=weight_decay)

        def step(carry, k):
            params, state = carry
            now = jax.tree.map(lambda g: g[k], grads)
            now = jax.tree.map(
                lambda a, b: jnp.where(by_radius, a, b), _by_radius(params, now), now
            )
            updates, state = tx.update(now, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (updates, state, params)

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4))[1]

    return run


def _finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", RADII)
@pytest.mark.parametrize("name", TABLE)
@given(data=st.data())
@settings(max_examples=12)
def test_never_nan(name, dtype, data):
    """Four steps from anywhere, with any of the gradients zero."""
    params = random_tree(0, SHAPES, dtype)
    params = _scaled(params, data.draw(_factors(RADII[dtype]), label="radii"))
    factors = data.draw(_factors((0.0, 1.0)), label="gradients")
    by_radius = data.draw(st.booleans(), label="by radius") and dtype != "float16"
    weight_decay = data.draw(st.sampled_from([0.0, 0.1]), label="weight decay")
    grads = [_scaled(random_tree(seed, SHAPES, dtype), factors) for seed in (1, 2, 3, 4)]
    grads = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    updates, states, points = _four_steps(name)(params, grads, by_radius, weight_decay)
    assert _finite(updates)
    assert _finite(states)
    assert _finite(points)


@functools.cache
def _optimizer(name):
    tx = TABLE[name](0.1, SPHERES)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("radius", [1e-15, 1e-8, 1.0, 1e8, 1e15])
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.couples])
def test_nothing_moves_without_a_gradient(name, radius):
    """No gradient, no momentum, no weight decay: not a bit changes, whatever the others do."""
    params = jax.tree.map(lambda x: radius * x, random_tree(0, SHAPES))
    if TABLE[name].unit_radius:  # these also bring the radius to 1; when it is, they stay
        params = so.geometry.direction(params, SPHERES)
    tx, update = _optimizer(name)
    start, state = params, tx.init(params)
    for seed in (1, 2, 3):
        grads = jax.tree.map(jnp.zeros_like, params)
        grads["filters"] = random_tree(seed, SHAPES)["filters"].at[:, 2].set(0.0)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    moved = params["filters"] != start["filters"]
    assert bool(jnp.all(moved[:, [0, 1, 3]])) or radius > 1e6
    still = [tree | {"filters": tree["filters"][:, 2]} for tree in (params, start)]
    for a, e in zip(*map(jax.tree.leaves, still), strict=True):
        if TABLE[name].unit_radius:
            np.testing.assert_allclose(a, e, rtol=1e-6)
        else:
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("name", TABLE)
def test_zero_filters_start_to_move(name):
    """A filter at the origin is not stuck: it follows its gradient."""
    params = jax.tree.map(jnp.zeros_like, random_tree(0, SHAPES))
    tx = TABLE[name](0.1, SPHERES)
    grads = random_tree(1, SHAPES)
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf in ("filters", "layer", "free"):
        assert float(jnp.sum(updates[leaf] * grads[leaf])) < 0


@pytest.mark.parametrize("name", TABLE)
def test_a_nan_gradient_is_not_made_a_number(name):
    """Its group says so or steps as ever, and the other groups do not notice."""
    params, grads = (random_tree(seed, {"w": (6, 3)}) for seed in (0, 1))
    tx = TABLE[name](0.01, {"w": so.Sphere()})
    state = tx.init(params)
    broken = {"w": grads["w"].at[2, 1].set(jnp.nan)}
    expected, _ = tx.update(grads, state, params)
    actual, state = tx.update(broken, state, params)
    if not TABLE[name].couples:
        np.testing.assert_array_equal(actual["w"][:, ::2], expected["w"][:, ::2])
    assert jnp.isnan(actual["w"][2, 1])
    longest = 2 * float(jnp.abs(expected["w"]).max())
    for step in (actual, tx.update(grads, state, params)[0]):
        assert not jnp.any(jnp.abs(step["w"]) > longest)  # NaN is not


def test_lengths_of_nan():
    x = {"w": jnp.array([[jnp.nan, 1.0], [1.0, 0.0]])}
    y = {"w": jnp.ones((2, 2))}
    for found in (
        so.geometry.norm(x, so.Sphere()),
        so.geometry.angle(x, y, so.Sphere()),
        so.geometry.angle(y, x, so.Sphere()),
        so.geometry.direction(x, so.Sphere()),
        so.geometry.retract(x, y, so.Sphere()),
        so.geometry.retract(y, x, so.Sphere()),
    ):
        assert jnp.isnan(found["w"][:, 0]).all()
        assert not jnp.isnan(found["w"][:, 1]).any()
