"""Geometry where formulas break: zero vectors, tiny angles, antipodes, extreme radii, half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from .optimizers import SPHERES, random_tree

geometry = so.geometry
ONE = so.Sphere(index_axes=())


def _finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def _zeros():
    return jax.tree.map(jnp.zeros_like, random_tree(0))


def _total(tree):
    return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape))
               for leaf in jax.tree.leaves(tree))  # fmt: skip


FUNCTIONS = {
    "dot": (geometry.dot, 2),
    "norm": (geometry.norm, 1),
    "direction": (geometry.direction, 1),
    "project": (geometry.project, 2),
    "transport": (geometry.transport, 3),
    "exp": (geometry.exp, 2),
    "log": (geometry.log, 2),
    "retract": (geometry.retract, 2),
    "angle": (geometry.angle, 2),
}


@functools.cache
def _value_and_grad(name):
    function, _ = FUNCTIONS[name]
    return jax.jit(jax.value_and_grad(lambda trees: _total(function(*trees, SPHERES))))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("zero", ["all", "first", "last", "none, all equal", "antipodes"])
def test_values_and_gradients_are_finite(name, zero):
    """At a zero filter, at coinciding points and at antipodes, in every argument."""
    count = FUNCTIONS[name][1]
    trees = [random_tree(seed) for seed in range(count)]
    if zero == "all":
        trees = [_zeros()] * count
    elif zero == "first":
        trees[0] = _zeros()
    elif zero == "last":
        trees[-1] = _zeros()
    elif zero == "antipodes":
        trees = [jax.tree.map(lambda x, s=s: s * x, trees[0]) for s in (1.0, -1.0, 1.0)[:count]]
    else:
        trees = trees[:1] * count
    value, grads = _value_and_grad(name)(trees)
    assert _finite(value)
    assert _finite(grads)


def test_zero_vectors():
    """r = 0: the projection is the identity, and there is no direction, no length, no angle."""
    zeros, vectors = _zeros(), random_tree(1)
    projected = geometry.project(zeros, vectors, SPHERES)
    jax.tree.map(np.testing.assert_array_equal, projected, vectors)
    for tree in (
        geometry.norm(zeros, SPHERES),
        geometry.direction(zeros, SPHERES),
        geometry.angle(zeros, zeros, SPHERES),
        geometry.dot(zeros, vectors, SPHERES),
        geometry.log(vectors, vectors, SPHERES),
    ):
        for leaf in jax.tree.leaves(tree):
            np.testing.assert_allclose(leaf, 0.0, atol=1e-6)


def test_a_standstill_goes_nowhere():
    point = geometry.direction(random_tree(0), SPHERES)
    for move in (geometry.exp, geometry.retract):
        reached = move(point, _zeros(), SPHERES)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), reached, point)


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-3])
def test_tiny_angles_in_float32(angle):
    """arccos of the cosine would say 0 or 3e-4; what float32 can represent must be there."""
    x = {"w": jnp.zeros(9).at[0].set(1.0)}
    y = {"w": x["w"].at[4].set(angle)}
    np.testing.assert_allclose(geometry.angle(x, y, ONE)["w"][0], angle, rtol=1e-3)
    np.testing.assert_allclose(geometry.log(x, y, ONE)["w"][4], angle, rtol=1e-3)

    rng = np.random.default_rng(0)
    x = rng.normal(size=100).astype(np.float32)
    y = x + np.float32(angle) * rng.normal(size=100).astype(np.float32)
    a, b = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for v in (x, y))
    expected = 2 * np.arcsin(np.linalg.norm(a - b) / 2)
    measured = geometry.angle({"w": jnp.asarray(x)}, {"w": jnp.asarray(y)}, ONE)["w"][0]
    # normalising alone turns a float32 vector by up to 6e-8
    np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=1.2e-7)


def test_angles_near_pi_in_float32():
    x = {"w": jnp.zeros(9).at[0].set(1.0)}
    y = {"w": (-x["w"]).at[4].set(1e-3)}
    np.testing.assert_allclose(geometry.angle(x, y, ONE)["w"][0], np.pi - 1e-3, atol=1e-6)
    np.testing.assert_allclose(geometry.angle(x, {"w": -x["w"]}, ONE)["w"][0], np.pi, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("radii", [(1e15, 1e15), (1e-15, 1e-15), (1e15, 1e-15), (1e-15, 1e15)])
def test_extreme_radii(radii, dtype):
    """Base points count by their directions, however long they are."""
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    x, y, v = (random_tree(seed, dtype=dtype) for seed in range(3))
    far_x, far_y = (
        jax.tree.map(lambda leaf, r=r: leaf * jnp.asarray(r, leaf.dtype), tree)
        for tree, r in zip((x, y), radii, strict=True)
    )
    pairs = [
        (geometry.angle(far_x, far_y, SPHERES), geometry.angle(x, y, SPHERES)),
        (geometry.direction(far_x, SPHERES), geometry.direction(x, SPHERES)),
        (geometry.project(far_x, v, SPHERES), geometry.project(x, v, SPHERES)),
        (geometry.transport(far_x, far_y, v, SPHERES), geometry.transport(x, y, v, SPHERES)),
    ]
    for actual, expected in pairs:
        for name in ("heads", "layer"):
            np.testing.assert_allclose(
                np.asarray(actual[name], np.float32),
                np.asarray(expected[name], np.float32),
                rtol=tolerance,
                atol=tolerance,
            )
    norms = geometry.norm(far_x, SPHERES)["layer"]
    expected = radii[0] * np.linalg.norm(np.asarray(x["layer"], np.float64))
    np.testing.assert_allclose(np.asarray(norms, np.float64), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_vectors_keep_their_dtype(dtype):
    x, y, v = (random_tree(seed, dtype=dtype) for seed in range(3))
    for name in ("direction", "project", "transport", "exp", "log", "retract"):
        function, count = FUNCTIONS[name]
        result = function(*(x, y, v)[:count], SPHERES)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}


def test_lengths_of_long_half_precision_vectors():
    """Sums run in float32: 40,000 ones have length 200, in float16 and bfloat16 too."""
    for dtype in (jnp.float16, jnp.bfloat16):
        norm = geometry.norm({"w": jnp.ones((200, 200), dtype)}, ONE)["w"]
        np.testing.assert_allclose(np.asarray(norm, np.float32), 200.0, rtol=1e-2)


def test_empty_leaves():
    params = {"none": jnp.zeros((0, 3)), "no_filter": jnp.zeros((3, 0))}
    norms = geometry.norm(params, so.Sphere())
    assert norms["none"].shape == (1, 3)
    assert norms["no_filter"].shape == (1, 0)
    np.testing.assert_array_equal(norms["none"], 0.0)
    for name, (function, count) in FUNCTIONS.items():
        assert _finite(function(*[params] * count, so.Sphere())), name


def test_prefix_and_callable_spheres():
    params = random_tree(0, {"a": (3, 2), "b": {"c": (2, 4)}})
    whole = geometry.norm(params, {"a": ONE, "b": {"c": ONE}})
    for spheres in (ONE, {"a": ONE, "b": ONE}, lambda params: ONE):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, geometry.norm(params, spheres), whole))


@pytest.mark.usefixtures("standard_promotion")
def test_integers_beside_numbers():
    x, q = {"w": jnp.array([[2], [0]])}, {"w": jnp.array([[5.0], [7.0]])}
    np.testing.assert_array_equal(so.geometry.project(x, q, so.Sphere())["w"], [[0.0], [7.0]])
    assert so.geometry.angle(q, x, so.Sphere())["w"] > 0


def test_projection_at_zero_is_the_identity():
    x, q = {"w": jnp.zeros((2, 1))}, {"w": jnp.array([[jnp.inf], [7.0]])}
    np.testing.assert_array_equal(so.geometry.project(x, q, so.Sphere())["w"], q["w"])
