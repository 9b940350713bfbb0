"""project, normalize and retract, each in a chain of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .optimizers import SPHERES, random_tree

geometry = so.geometry
ON_SPHERES = ("heads", "layer")


def _update(tx, updates, params):
    return tx.update(updates, tx.init(params), params)[0]


def _norms(tree):
    return geometry.norm(tree, SPHERES)


def _curved(tree):
    """The leaves with groups of more than one coordinate."""
    return [tree["conv"]["kernel"], *tree["norm"].values(), *(tree[leaf] for leaf in ON_SPHERES)]


def _assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    for a, e in zip(_curved(actual), _curved(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


def _assert_rest_untouched(actual, updates):
    """Leaves on no sphere, and groups of one coordinate, where there is nothing to constrain."""
    np.testing.assert_array_equal(actual["conv"]["bias"], updates["conv"]["bias"])
    np.testing.assert_array_equal(actual["scalar"], updates["scalar"])
    np.testing.assert_array_equal(actual["one_row"], updates["one_row"])


def test_project_removes_the_radial_part():
    params, updates = random_tree(0), random_tree(1)
    tangent = _update(so.project(SPHERES), updates, params)
    _assert_rest_untouched(tangent, updates)
    for dot in _curved(geometry.dot(params, tangent, SPHERES)):
        np.testing.assert_allclose(dot, 0.0, atol=1e-5)
    # ... and nothing else: what is gone is parallel to the parameters
    gone = jax.tree.map(jnp.subtract, updates, tangent)
    directions = geometry.direction(params, SPHERES)
    along = geometry.dot(gone, directions, SPHERES)
    kernel = along["conv"]["kernel"] * directions["conv"]["kernel"]
    np.testing.assert_allclose(gone["conv"]["kernel"], kernel, atol=1e-6)
    assert float(jnp.abs(gone["conv"]["kernel"]).max()) > 1e-2


def test_normalize_gives_the_length_of_the_radius():
    params, updates = random_tree(0), random_tree(1)
    scaled = _update(so.normalize(SPHERES), updates, params)
    _assert_rest_untouched(scaled, updates)
    _assert_close(_norms(scaled), _norms(params))
    _assert_close(geometry.direction(scaled, SPHERES), geometry.direction(updates, SPHERES))


@pytest.mark.parametrize("radius", ["current", "initial", 1.0, 2.5, 3])
def test_retract_reaches_the_radius(radius):
    """After apply_updates, step after step, in the direction where the plain step would have gone."""
    start = params = random_tree(0)
    tx = optax.chain(optax.scale(-0.3), so.retract(SPHERES, radius))
    state = tx.init(params)
    for seed in (1, 2, 3):
        grads = random_tree(seed)
        updates, state = jax.jit(tx.update)(grads, state, params)
        plain = optax.apply_updates(params, jax.tree.map(lambda g: -0.3 * g, grads))
        params = optax.apply_updates(params, updates)
        if isinstance(radius, str):
            _assert_close(_norms(params), _norms(start))
        else:
            for norm in _curved(_norms(params)):
                np.testing.assert_allclose(norm, radius, rtol=1e-6)
        _assert_close(geometry.direction(params, SPHERES), geometry.direction(plain, SPHERES))
        np.testing.assert_allclose(params["one_row"], plain["one_row"], rtol=1e-6)
        np.testing.assert_allclose(params["conv"]["bias"], plain["conv"]["bias"], rtol=1e-6)


def test_initial_is_not_current():
    """If something else has moved the point in the meantime, only "initial" goes back."""
    params, updates = random_tree(0), random_tree(1)
    grown = jax.tree.map(lambda x: 3.0 * x, params)
    for radius, expected in (("current", grown), ("initial", params)):
        tx = so.retract(SPHERES, radius)
        step, _ = tx.update(updates, tx.init(params), grown)
        _assert_close(_norms(optax.apply_updates(grown, step)), _norms(expected))


def test_the_default_is_current():
    params, updates = random_tree(0), random_tree(1)
    default = _update(so.retract(SPHERES), updates, params)
    _assert_close(default, _update(so.retract(SPHERES, "current"), updates, params), rtol=0, atol=0)


def test_retract_takes_a_traced_radius():
    params, updates = random_tree(0), random_tree(1)
    step = jax.jit(lambda r: _update(so.retract(SPHERES, r), updates, params))(jnp.float32(2.0))
    for norm in _curved(_norms(optax.apply_updates(params, step))):
        np.testing.assert_allclose(norm, 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [so.project, so.normalize, so.retract, lambda s: so.retract(s, "initial")],
    ids=["project", "normalize", "retract", "retract to initial"],
)
class TestEach:
    def test_needs_parameters(self, make):
        tx, updates = make(SPHERES), random_tree(1)
        with pytest.raises(ValueError, match="params"):
            tx.update(updates, tx.init(updates))

    def test_swallows_extra_arguments(self, make):
        tx, params = make(SPHERES), random_tree(0)
        tx.update(params, tx.init(params), params, value=1.0)

    @pytest.mark.parametrize("zero", ["params", "updates", "both", "their sum"])
    def test_zero_filters(self, make, zero):
        params, updates = random_tree(0), random_tree(1)
        if zero in ("params", "both"):
            params = jax.tree.map(jnp.zeros_like, params)
        if zero in ("updates", "both"):
            updates = jax.tree.map(jnp.zeros_like, updates)
        if zero == "their sum":
            updates = jax.tree.map(jnp.negative, params)
        result = _update(make(SPHERES), updates, params)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result))
        if zero in ("params", "both"):  # r = 0: left as it is
            jax.tree.map(np.testing.assert_array_equal, result, updates)
        elif zero == "updates":
            for leaf in jax.tree.leaves(result):
                np.testing.assert_allclose(leaf, 0.0, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_keeps_dtypes(self, make, dtype):
        params, updates = random_tree(0, dtype=dtype), random_tree(1, dtype=dtype)
        tx = make(SPHERES)
        state = tx.init(params)
        result, after = jax.jit(tx.update)(updates, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)

    @pytest.mark.usefixtures("standard_promotion")
    def test_updates_come_back_in_the_dtype_of_the_parameters(self, make):
        params = random_tree(0, dtype=jnp.bfloat16)
        result = _update(make(SPHERES), random_tree(1), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("radius", ["now", "", "Current"])
def test_unknown_radius(radius):
    with pytest.raises(ValueError, match="radius"):
        so.retract(SPHERES, radius).init(random_tree(0))
