"""Properties of whole optimizers: equivariance, tangency, fixed points, and the SGD - AdamG* mirror."""

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

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = {"filters": (6, 3), "layer": (2, 4), "norm": {"kernel": (3, 4), "bias": (4,)}}
TIED = so.Sphere(blocks=2, tie="norm")
SPHERES = {
    "filters": so.Sphere(),
    "layer": so.Sphere(index_axes=()),
    "norm": {"kernel": TIED, "bias": TIED},
}
FORMS = random_tree(99, {"filters": (3, 6, 6), "layer": (1, 8, 8), "norm": (2, 8, 8)})

seeds = st.integers(0, 2**32 - 1)


def _rows(params):
    """One row per group, by hand."""
    norm = jnp.concatenate([params["norm"]["kernel"], params["norm"]["bias"][None]])
    return {
        "filters": params["filters"].T,
        "layer": params["layer"].reshape(1, -1),
        "norm": norm.reshape(4, 2, 2).transpose(1, 0, 2).reshape(2, 8),
    }


def _directions(params):
    return jax.tree.map(lambda x: x / jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True)), _rows(params))


def _loss(params):
    """Depends on the directions of the groups only."""
    directions = _directions(params)
    forms = jax.tree.map(
        lambda u, a: jnp.einsum("gi,gij,gj->", u, a.astype(u.dtype), u), directions, FORMS
    )
    return sum(jax.tree.leaves(forms))


@functools.cache
def _run(name, steps=15, **kwargs):
    """(params, learning rate, L2) -> the params before each step, and after the last; the updates."""

    @jax.jit
    def run(params, learning_rate, weight_decay):
        tx = TABLE[name](learning_rate, SPHERES, weight_decay=weight_decay, **kwargs)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(_loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), (params, updates)

        (last, _), (path, updates) = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), path, last), updates

    return run


def _start(seed):
    return random_tree(seed, SHAPES, float)


def test_the_loss_is_radially_invariant():
    params = _start(0)
    grown = {**params, "norm": jax.tree.map(lambda x: 3 * x, params["norm"])}
    np.testing.assert_allclose(_loss(grown), _loss(params), rtol=1e-12)
    radial = so.geometry.dot(params, jax.grad(_loss)(params), SPHERES)
    for leaf in jax.tree.leaves(radial):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-12)


# With x -> rho x the gradient becomes g / rho. SGD: rho (x - lr g) = rho x - (rho^2 lr)(g / rho), so
# lr -> rho^2 lr. Adam's quotient stays as it is, so lr -> rho lr. In both, g + l2 x has to shrink like
# g, so l2 -> l2 / rho^2.
POWERS = {
    "adam": 1,
    "adams": 1,
    "adamst": 1,
    "adamsrt": 1,
    "sgd": 2,
    "sgd_momentum": 2,
    "sgd_mrt": 2,
}


@pytest.mark.parametrize("name", POWERS)
@given(seed=seeds, log_rho=st.floats(-3, 3), weight_decay=st.sampled_from([0.0, 0.1]))
@settings(max_examples=10)
def test_scaling_the_parameters(name, seed, log_rho, weight_decay):
    rho, params = 10**log_rho, _start(seed)
    run = _run(name, **({"eps": 0.0} if POWERS[name] == 1 else {}))
    expected, _ = run(params, 0.02, weight_decay)
    larger = jax.tree.map(lambda x: rho * x, params)
    actual, _ = run(larger, rho ** POWERS[name] * 0.02, weight_decay / rho**2)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a / rho, e, rtol=1e-7, atol=1e-8)


@given(seed=seeds, log_rho=st.floats(-3, 3), weight_decay=st.sampled_from([0.0, 0.1]))
@settings(max_examples=10)
def test_scaling_the_start_of_adamg_star(seed, log_rho, weight_decay):
    """It mirrors an SGD, and so scales like it: the same points on the unit sphere."""
    rho, params = 10**log_rho, _start(seed)
    run = _run("adamg_star")
    expected, _ = run(params, 0.02, weight_decay)
    larger = jax.tree.map(lambda x: rho * x, params)
    actual, _ = run(larger, rho**2 * 0.02, weight_decay / rho**2)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[1:], e[1:], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["adamst", "adamsrt", "sgd_mrt"])
@given(seed=seeds)
@settings(max_examples=10)
def test_steps_are_tangent(name, seed):
    """Transported momentum of tangent gradients leaves the radius to Pythagoras."""
    path, updates = _run(name)(_start(seed), 0.02, 0.0)
    for x, u in zip(
        *(jax.tree.leaves(jax.vmap(_rows)(t)) for t in (_cut(path), updates)), strict=True
    ):
        radial = jnp.sum(x * u, axis=-1)
        length = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(u, axis=-1)
        np.testing.assert_array_less(jnp.abs(radial), 1e-9 * length)


def _cut(path):
    return jax.tree.map(lambda xs: xs[:-1], path)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.unit_radius])
@given(seed=seeds, weight_decay=st.sampled_from([0.0, 0.1]))
@settings(max_examples=10)
def test_points_are_on_the_unit_sphere(name, seed, weight_decay):
    path, _ = _run(name)(_start(seed), 0.05, weight_decay)
    for rows in jax.tree.leaves(jax.vmap(_rows)(path)):
        np.testing.assert_allclose(jnp.linalg.norm(rows[1:], axis=-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", TABLE)
@given(seed=seeds)
@settings(max_examples=5)
def test_losses_fall(name, seed):
    learning_rate = 0.005 if "sgd" in name or name == "adamg_star" else 0.02
    path, _ = _run(name)(_start(seed), learning_rate, 0.0)
    losses = jax.vmap(_loss)(path)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_sgd_and_adamg_star_have_the_same_directions(weight_decay):
    """Exactly after one step; after more the difference falls faster than the cube of the rate."""

    def error(learning_rate):
        paths = [
            jax.vmap(_directions)(_run(name)(_start(3), learning_rate, weight_decay)[0])
            for name in ("sgd", "adamg_star")
        ]
        difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(axis=(1, 2)), *paths)
        return functools.reduce(jnp.maximum, jax.tree.leaves(difference))

    coarse, fine = error(0.04), error(0.02)
    assert float(coarse[1]) < 1e-14
    assert 1e-12 < float(coarse[-1]) < 1e-2
    assert float(coarse[-1]) > 2**3 * float(fine[-1])


def test_sgd_and_adamg_star_under_a_schedule():
    """The mirror holds as well while the learning rate changes: AdamG* follows that of the SGD."""

    def end(name, scale):
        rates = scale * jnp.asarray([0.04, 0.01, 0.03, 0.005] * 3)
        tx = TABLE[name](lambda count: rates[count], SPHERES, weight_decay=0.5)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(_loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params = _start(3)
        state = tx.init(params)
        for _ in range(12):
            params, state = step(params, state)
        return _directions(params)

    def error(scale):
        difference = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()), end("sgd", scale), end("adamg_star", scale)
        )
        return max(jax.tree.leaves(difference))

    coarse, fine = error(1.0), error(0.5)
    assert 1e-12 < coarse < 1e-2
    assert coarse > 2**3 * fine


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.couples])
def test_groups_do_not_see_each_other(name):
    """Another gradient for one filter, and all the others still do what they did."""
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)

    @jax.jit
    def run(params, factor):
        def step(carry, k):
            params, state = carry
            grads = _start(1)
            grads["filters"] = grads["filters"].at[:, 1].multiply(factor * k)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(1.0, 5.0))[0][0]

    one, other = run(_start(0), 1.0), run(_start(0), -3.0)
    assert float(jnp.abs(one["filters"] - other["filters"])[:, 1].max()) > 1e-4
    np.testing.assert_array_equal(one["filters"][:, [0, 2]], other["filters"][:, [0, 2]])
    for rest in ("layer", "norm"):
        jax.tree.map(np.testing.assert_array_equal, one[rest], other[rest])
