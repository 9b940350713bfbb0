"""What Optax expects of an optimizer; every row of the table passes every test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ..optimizers import SHAPES, SPHERES, TABLE, random_tree, types

pytestmark = pytest.mark.parametrize("name", TABLE)


def _assert_close(actual, expected, rtol=1e-6, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


def _moved(updates):
    return all(bool(jnp.all(u != 0)) for u in jax.tree.leaves(updates))


def _two_steps(tx, params, grads=(1, 2), jit=True):
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    for seed in grads:
        updates, state = update(random_tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def _usual(name):
    """The optimizer that most tests compare another with, and where two compiled steps lead it."""
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)
    return tx, *_two_steps(tx, random_tree(0))


def test_is_an_optax_transformation_with_extra_args(name):
    tx = TABLE[name](0.01, SPHERES)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = random_tree(0)
    state = tx.init(params)
    plain, _ = tx.update(random_tree(1), state, params)
    extra, _ = tx.update(random_tree(1), state, params, value=jnp.float32(1.0), unheard_of="x")
    _assert_close(extra, plain, rtol=0, atol=0)
    assert _moved(plain)


def test_descends(name):
    """Updates are to be added: on a plain step they point against the gradient."""
    tx = TABLE[name](0.01, SPHERES)
    params, grads = random_tree(0), random_tree(1)
    updates, _ = tx.update(grads, tx.init(params), params)
    if TABLE[name].unit_radius:  # the first update is mostly the way to the unit sphere
        leaves, expected = [updates["conv"]["bias"]], [grads["conv"]["bias"]]
    else:
        leaves, expected = jax.tree.leaves(updates), jax.tree.leaves(grads)
    for u, g in zip(leaves, expected, strict=True):
        assert float(jnp.sum(u * g)) < 0


def test_compiles_once(name):
    tx = TABLE[name](optax.constant_schedule(0.01), SPHERES, weight_decay=0.1)
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = random_tree(0)
    state = tx.init(params)
    for seed in range(3):
        params, state = step(params, state, random_tree(seed))
    assert len(traces) == 1


def test_jit_equals_no_jit(name):
    tx, *compiled = _usual(name)
    not_compiled = _two_steps(tx, random_tree(0), jit=False)
    _assert_close(tuple(compiled), not_compiled, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("static", [False, True], ids=["tree", "callable"])
def test_inject_hyperparams(name, static):
    row = TABLE[name]
    spheres = (lambda params: SPHERES) if static else SPHERES
    arguments = dict(learning_rate=0.01, spheres=spheres, weight_decay=0.1, **row.kwargs)
    injected = optax.inject_hyperparams(row.make, static_args=("spheres",) if static else ())
    tx = injected(**arguments)
    actual, state = _two_steps(tx, random_tree(0))
    assert {"learning_rate", "weight_decay"} <= set(state.hyperparams)
    _assert_close(actual, _usual(name)[1])

    # The injected value is the one in use.
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    if not row.unit_radius:
        updates, _ = jax.jit(tx.update)(random_tree(3), state, actual)
        rest = 1e-6 if row.keeps_radius else 0.0  # of a retraction to where it is
        assert all(bool(jnp.all(jnp.abs(u) <= rest)) for u in jax.tree.leaves(updates))


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps(name):
    """Zeros while it accumulates, then the step of the mean gradient."""
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)
    accumulate = optax.MultiSteps(tx, every_k_schedule=3)
    params = random_tree(0)
    state = accumulate.init(params)
    update = jax.jit(accumulate.update)
    grads = [random_tree(seed) for seed in (1, 2, 3)]
    for g in grads[:2]:
        updates, state = update(g, state, params)
        assert not any(bool(jnp.any(u)) for u in jax.tree.leaves(updates))
    updates, state = update(grads[2], state, params)
    mean = jax.tree.map(lambda *gs: sum(gs) / 3, *grads)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    _assert_close(updates, expected, rtol=1e-5)


def test_scan_and_cond_keep_the_state(name):
    tx = TABLE[name](optax.constant_schedule(0.01), SPHERES, weight_decay=0.1)
    params = random_tree(0)
    expected, expected_state = _two_steps(tx, params, grads=(1, 1))

    @jax.jit
    def steps(params, state):
        return jax.lax.scan(step, (params, state), length=2)[0]

    def step(carry, _):
        params, state = carry
        updates, state = jax.lax.cond(
            jnp.all(params["conv"]["bias"] < 1e9),
            lambda: tx.update(random_tree(1), state, params),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )
        return (optax.apply_updates(params, updates), state), None

    actual, state = steps(params, tx.init(params))
    _assert_close(actual, expected)
    _assert_close(state, expected_state)


def test_schedules_equal_constants(name):
    scheduled = TABLE[name](lambda count: 0.01, SPHERES, weight_decay=lambda count: 0.1)
    _assert_close(_two_steps(scheduled, random_tree(0))[0], _usual(name)[1])


def test_schedules_are_followed(name):
    """Off the spheres, where the effect of both is known."""
    row = TABLE[name]
    tx = row(lambda count: jnp.where(count == 0, 0.01, 0.0), SPHERES)
    params = random_tree(0)
    state = tx.init(params)
    updates, state = tx.update(random_tree(1), state, params)
    assert _moved(updates["conv"]["bias"])
    params = optax.apply_updates(params, updates)
    updates, state = tx.update(random_tree(1), state, params)
    assert not jnp.any(updates["conv"]["bias"])

    decayed = row(0.01, SPHERES, weight_decay=lambda count: jnp.where(count == 0, 1e3, 0.0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zeros, decayed.init(params), params)
    assert _moved(updates["conv"]["bias"])


def test_map_params(name):
    tx = TABLE[name](0.01, SPHERES)
    params = random_tree(0)
    _, state = _two_steps(tx, params)
    _assert_close(optax.tree.map_params(tx, lambda leaf: leaf, state), state, rtol=0, atol=0)
    if TABLE[name].has_mu:  # ... and it does find the moments
        doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
        assert types(doubled) == types(state)
        kernels = [
            (s, d)
            for s, d in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True)
            if s.shape == SHAPES["conv"]["kernel"]
        ]
        assert kernels
        for s, d in kernels:
            np.testing.assert_array_equal(2 * s, d)


def test_state_survives_flattening(name):
    tx = TABLE[name](0.01, SPHERES)
    params, state = _two_steps(tx, random_tree(0))
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    expected, _ = tx.update(random_tree(3), state, params)
    _assert_close(tx.update(random_tree(3), restored, params)[0], expected, rtol=0, atol=0)


def test_abstract_init(name):
    tx = TABLE[name](0.01, SPHERES)
    params = random_tree(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(jax.eval_shape(tx.init, abstract)) == types(tx.init(params))
    # Without eval_shape too, as Optax's own optimizers allow, where no parameter is read.
    if name not in ("adamg_star", "decoupled") and not TABLE[name].keeps_radius:
        assert types(tx.init(abstract)) == types(tx.init(params))


def test_does_not_touch_its_arguments(name):
    tx = TABLE[name](0.01, SPHERES)
    params, grads = random_tree(0), random_tree(1)
    state = tx.init(params)
    tx.update(grads, state, params)
    _assert_close(params, random_tree(0), rtol=0, atol=0)
    _assert_close(grads, random_tree(1), rtol=0, atol=0)
    _assert_close(state, tx.init(params), rtol=0, atol=0)
