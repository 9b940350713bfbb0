"""Inside masks, partitions and other transformations, and on trees with holes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..optimizers import SPHERES, TABLE, random_tree

pytestmark = pytest.mark.parametrize("name", TABLE)


def _run(tx, params, steps=2):
    state = tx.init(params)
    leaves, structure = jax.tree.flatten(params)
    for seed in range(steps):
        rng = np.random.default_rng(seed)
        grads = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
        updates, state = tx.update(jax.tree.unflatten(structure, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params


def _assert_equal(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-6, 1e-6), actual, expected)


def _spheres_only(tree):
    return jax.tree.map(lambda sphere, _: sphere is not None, SPHERES, tree, is_leaf=_is_none)


def _is_none(leaf):
    return leaf is None


def test_masked(name):
    """The masked leaves' gradients pass through, the others are treated as ever."""
    tx = TABLE[name](0.01, SPHERES)
    masked = optax.masked(tx, _spheres_only)
    params, grads = random_tree(0), random_tree(1)
    actual, _ = masked.update(grads, masked.init(params), params)
    expected, _ = tx.update(grads, tx.init(params), params)
    expected["conv"]["bias"], expected["scalar"] = grads["conv"]["bias"], grads["scalar"]
    _assert_equal(actual, expected)


def test_masked_with_spheres_of_the_masked_tree(name):
    """A callable sees the tree with its MaskedNodes, and may answer with a tree like it."""

    def spheres(params):
        return jax.tree.map(lambda x: so.Sphere() if x.ndim > 1 else None, params)

    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    params = random_tree(0)
    tx = TABLE[name](0.01, spheres)
    masked = optax.masked(tx, mask)
    actual, _ = masked.update(random_tree(1), masked.init(params), params)
    expected, _ = tx.update(random_tree(1), tx.init(params), params)
    for leaf in ("heads", "layer", "one_row"):
        np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=1e-6)
    np.testing.assert_array_equal(actual["scalar"], random_tree(1)["scalar"])


def test_partition(name):
    """The optimizer for the spheres, another for the rest: each as if it were alone."""
    row = TABLE[name]
    labels = jax.tree.map(lambda on: "sphere" if on else "rest", _spheres_only(random_tree(0)))
    tx = optax.partition({"sphere": row(0.01, SPHERES), "rest": optax.sgd(0.5)}, labels)
    actual = _run(tx, random_tree(0))
    expected = _run(row(0.01, SPHERES), random_tree(0))
    rest = _run(optax.sgd(0.5), random_tree(0))
    expected["conv"]["bias"], expected["scalar"] = rest["conv"]["bias"], rest["scalar"]
    _assert_equal(actual, expected)


def test_none_leaves(name):
    """A None among the parameters (a layer without bias) is no leaf."""
    shapes = {"a": (3, 2), "b": (4,)}
    full, spheres = random_tree(0, shapes), {"a": so.Sphere(), "b": None}
    holes = {"a": full["a"], "hole": None, "b": full["b"]}
    expected = _run(TABLE[name](0.01, spheres), full)
    for sphere in (None, so.Sphere()):  # a spec over nothing is a prefix of nothing
        actual = _run(TABLE[name](0.01, {**spheres, "hole": sphere}), holes)
        assert actual.pop("hole") is None
        _assert_equal(actual, expected)


def test_prefix_of_the_tree(name):
    """One Sphere for a whole subtree, or for everything; None for no sphere at all."""
    params = random_tree(0, {"block": {"a": (3, 2), "b": (2, 4)}, "head": (3, 3)})
    sphere = so.Sphere()
    pairs = [
        ({"block": sphere, "head": None}, {"block": {"a": sphere, "b": sphere}, "head": None}),
        (sphere, {"block": {"a": sphere, "b": sphere}, "head": sphere}),
        (None, {"block": {"a": None, "b": None}, "head": None}),
        (lambda params: sphere, sphere),
    ]
    for prefix, whole in pairs:
        _assert_equal(
            _run(TABLE[name](0.01, prefix), params), _run(TABLE[name](0.01, whole), params)
        )


def test_chained(name):
    """After clipping and before another momentum, as in anybody's recipe."""
    tx = optax.chain(optax.clip_by_global_norm(1e-3), TABLE[name](0.01, SPHERES), optax.trace(0.5))
    params = random_tree(0)
    updates, _ = jax.jit(tx.update)(random_tree(1), tx.init(params), params)
    clipped, _ = optax.clip_by_global_norm(1e-3).update(random_tree(1), optax.EmptyState())
    alone = TABLE[name](0.01, SPHERES)
    _assert_equal(updates, alone.update(clipped, alone.init(params), params)[0])


def test_apply_if_finite(name):
    tx = optax.apply_if_finite(TABLE[name](0.01, SPHERES), max_consecutive_errors=2)
    params = random_tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, state = update(broken, state, params)
    assert not any(bool(jnp.any(u)) for u in jax.tree.leaves(updates))
    updates, _ = update(random_tree(1), state, params)
    alone = TABLE[name](0.01, SPHERES)
    expected, _ = alone.update(random_tree(1), alone.init(params), params)
    _assert_equal(updates, expected)
