"""Dtypes of updates and state, whatever the parameters' dtype."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..compiling import usual_jit
from ..optimizers import SHAPES, SPHERES, TABLE, random_tree, types

KERNEL = SHAPES["conv"]["kernel"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
every_optimizer = pytest.mark.parametrize("name", TABLE)


def _precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept(name, dtype):
    with _precision(dtype):
        tx = TABLE[name](optax.constant_schedule(0.01), SPHERES, weight_decay=0.1)
        params = random_tree(0, dtype=dtype)
        first = state = tx.init(params)
        for seed in (1, 2):
            updates, state = jax.jit(tx.update)(random_tree(seed, dtype=dtype), state, params)
            assert types(updates) == types(params)
            assert types(state) == types(first)
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
            params = optax.apply_updates(params, updates)
        # Outside jit, where weak types could creep in.
        updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert types(updates) == types(params)
        assert types(state) == types(first)


@every_optimizer
def test_mixed_tree(name):
    """Each leaf keeps its own dtype, also inside one tie."""
    params = random_tree(0)
    params["norm"]["kernel"] = params["norm"]["kernel"].astype(jnp.bfloat16)
    params["heads"] = params["heads"].astype(jnp.float16)
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)
    first = tx.init(params)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), random_tree(1), params)
    updates, state = jax.jit(tx.update)(grads, first, params)
    assert types(updates) == types(params)
    assert types(state) == types(first)


@every_optimizer
@pytest.mark.usefixtures("standard_promotion")
def test_float32_gradients_of_half_precision_parameters(name):
    """Master-weights set-ups feed gradients of another dtype than the parameters'."""
    params, grads = random_tree(0, dtype=jnp.bfloat16), random_tree(1)
    tx = TABLE[name](0.01, SPHERES, weight_decay=0.1)
    first = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, first, params)
    assert types(state) == types(first)
    assert types(updates) == types(params)


@every_optimizer
def test_half_precision_is_close_to_float32(name):
    tx = TABLE[name](0.1, SPHERES, weight_decay=0.1)
    half = random_tree(0, dtype=jnp.bfloat16), random_tree(1, dtype=jnp.bfloat16)
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    actual, _ = jax.jit(tx.update)(half[1], tx.init(half[0]), half[0])
    expected, _ = jax.jit(tx.update)(full[1], tx.init(full[0]), full[0])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        # What is small of a matrix Muon makes large, and its error with it.
        assert error <= (0.1 if name == "muonh" else 0.02) * np.linalg.norm(np.asarray(e))


def test_reductions_accumulate_in_float32():
    """The sum of 40,000 squares is beyond float16, and bfloat16 cannot even count that far."""
    for dtype in (jnp.float16, jnp.bfloat16):
        params = {"kernel": jnp.full((200, 200, 2), 3.0, dtype)}
        grads = {"kernel": jnp.full((200, 200, 2), 2.0, dtype)}
        tx = TABLE["adams"](1.0, {"kernel": SPHERES["conv"]["kernel"]})
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(np.asarray(updates["kernel"], np.float32), -1.0, rtol=1e-2)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.has_mu])
def test_mu_dtype(name):
    """The momentum is stored in that dtype, everything else is as without; so it is in Optax."""
    params = random_tree(0)
    tx, plain = TABLE[name](0.01, SPHERES, mu_dtype=jnp.bfloat16), TABLE[name](0.01, SPHERES)
    first = tx.init(params)
    changed = [
        (leaf.dtype, leaf.shape)
        for leaf, before in zip(
            jax.tree.leaves(first), jax.tree.leaves(plain.init(params)), strict=True
        )
        if leaf.dtype != before.dtype
    ]
    # One momentum for each parameter, and no more than that.
    assert [dtype for dtype, _ in changed] == [jnp.bfloat16] * len(changed)
    assert sorted(s for _, s in changed) == sorted(x.shape for x in jax.tree.leaves(params))
    updates, state = jax.jit(tx.update)(random_tree(1), first, params)
    assert types(state) == types(first)
    assert types(updates) == types(params)
    expected, _ = jax.jit(plain.update)(random_tree(1), plain.init(params), params)
    for a, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0.02, atol=1e-6)


def test_mu_dtype_by_name():
    tx, named = (TABLE["adamsrt"](0.01, SPHERES, mu_dtype=d) for d in (jnp.bfloat16, "bfloat16"))
    assert types(named.init(random_tree(0))) == types(tx.init(random_tree(0)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("jit", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adam_is_optax_adam(dtype, jit):
    """To one unit in the last place, over ten steps of the same points."""
    with _precision(dtype):
        schedule = optax.cosine_decay_schedule(0.1, 20)
        ours = TABLE["adam"](schedule, SPHERES, weight_decay=0.03)
        theirs = optax.chain(optax.add_decayed_weights(0.03), optax.adam(schedule))
        params = random_tree(0, dtype=dtype)
        our_state, their_state = ours.init(params), theirs.init(params)
        update, expect = ours.update, theirs.update
        if jit:
            update, expect = usual_jit(update), usual_jit(expect)
        for seed in range(10):
            grads = random_tree(seed, dtype=dtype)
            actual, our_state = update(grads, our_state, params)
            expected, their_state = expect(grads, their_state, params)
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(e), maxulp=1)
            params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "rotational"])
def test_a_rate_of_float32_and_updates_of_bfloat16(name):
    """As `inject_hyperparams(..., hyperparam_dtype=jnp.float32)` makes it, under strict promotion."""
    params = random_tree(0, dtype=jnp.bfloat16)
    tx = TABLE[name](jnp.float32(0.01), SPHERES)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("rate", ["0.1", None, {"kernel": so.Sphere()}, so.Sphere()])
@pytest.mark.parametrize(
    "make", [so.adamsrt, so.adam, so.adamp, so.sgd, so.sgd_mrt, so.adamg, so.adamh]
)
def test_a_rate_is_a_number_or_a_schedule(make, rate):
    with pytest.raises(ValueError, match=r"learning_rate is .*, neither a number nor a schedule"):
        make(rate, so.Sphere())
