"""AdamP and SGDP: what is declared, what is guessed, and how far the guess can be trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

MAKES = {"adamp": so.adamp, "sgdp": so.sgdp}
FILTERS, LAYER = so.Sphere(), so.Sphere(())


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _tangent(seed, x, sphere):
    return so.geometry.project(x, _normal(seed, *x.shape, dtype=x.dtype), sphere)


def _first(tx, grads, params):
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("sphere", [FILTERS, LAYER])
@pytest.mark.parametrize("name", MAKES)
def test_a_right_guess_is_what_is_declared(name, sphere, nesterov):
    options = {"weight_decay": 0.1, "nesterov": nesterov}
    guessing = MAKES[name](0.1, eps=1e-12, **options)
    told = MAKES[name](0.1, sphere, eps=1e-12, **options)
    x = y = _normal(0, 8, 5, dtype=float)
    one, other = guessing.init(x), told.init(y)
    for seed in range(1, 6):
        g = _tangent(seed, x, sphere)
        (p, one), (q, other) = guessing.update(g, one, x), told.update(g, other, y)
        x, y = x + p, y + q
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MAKES)
def test_what_is_declared_needs_no_evidence(name):
    """A gradient with a radial part, as noise or bfloat16 make it: the guess says no."""
    x = _normal(0, 8, 5)
    g = _tangent(1, x, FILTERS) + 0.3 * x
    told, guessed = (_first(MAKES[name](0.1, s), g, x) for s in (FILTERS, None))
    np.testing.assert_allclose(so.geometry.dot(told, x, FILTERS), 0.0, atol=1e-5)
    assert float(jnp.abs(so.geometry.dot(guessed, x, FILTERS)).min()) > 1e-3


@pytest.mark.parametrize("name", MAKES)
def test_weight_decay(name):
    """Decoupled; a tenth of it on the spheres; over 1 - momentum for SGDP."""
    params = {"kernel": _normal(0, 8, 5), "bias": _normal(1, 5)}
    grads = {"kernel": _tangent(2, params["kernel"], FILTERS), "bias": _normal(3, 5)}
    full = 0.1 * 0.5 / (1 - 0.9 if name == "sgdp" else 1)
    for spheres in ({"kernel": FILTERS, "bias": None}, None):
        for ratio in (0.1, 0.7):
            plain, decayed = (
                _first(MAKES[name](0.1, spheres, weight_decay=w, wd_ratio=ratio), grads, params)
                for w in (0.0, 0.5)
            )
            for leaf, factor in (("kernel", ratio), ("bias", 1.0)):
                expected = plain[leaf] - full * factor * params[leaf]
                np.testing.assert_allclose(decayed[leaf], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_without_spheres_they_are_adamw_and_sgd():
    params, grads = _normal(0, 8, 5), _normal(1, 8, 5)
    spheres = {"kernel": None}
    pairs = (
        (so.adamp(0.1, spheres, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.1)),
        (so.sgdp(0.1, spheres), optax.sgd(0.1, 0.9)),
        (so.sgdp(0.1, spheres, nesterov=True), optax.sgd(0.1, 0.9, nesterov=True)),
    )
    for ours, theirs in pairs:
        x = {"kernel": params}
        one, other = ours.init(x), theirs.init(x)
        for _ in range(3):
            p, one = ours.update({"kernel": grads}, one, x)
            q, other = theirs.update({"kernel": grads}, other, x)
            np.testing.assert_allclose(p["kernel"], q["kernel"], rtol=1e-5)
            x = optax.apply_updates(x, p)


def test_the_guess_takes_some_noise_for_invariance():
    """A cosine of noise is normal with standard deviation d^(-1/2): 8 % are below delta d^(-1/2)."""
    x = _normal(0, 40, 30)
    tx = so.adamp(1.0)

    @jax.jit
    @jax.vmap
    def taken(g):
        return jnp.abs(so.geometry.dot(_first(tx, g, x), x, LAYER)[0, 0]) < 1e-3

    share = float(jnp.mean(taken(_normal(1, 2000, 40, 30))))
    assert 0.06 < share < 0.10  # 0.0797 +- 0.006


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_guess_misses_invariance_in_bfloat16(dtype):
    """512 filters under BatchNorm: one whose gradient is too coarse is enough to miss them all."""
    data, kernel = _normal(0, 256, 64, dtype=dtype), _normal(1, 64, 512, dtype=dtype)

    def loss(w):
        h = data @ w
        h = h - jnp.mean(h, 0, keepdims=True)
        h = h / jnp.sqrt(jnp.mean(h * h, 0, keepdims=True))
        return jnp.mean(jnp.tanh(h) ** 3 + h[:, :1] * h[:, 1:2])

    x, g = kernel.astype(jnp.float32), jax.grad(loss)(kernel).astype(jnp.float32)
    told, guessed = (_first(so.adamp(1.0, s), g, x) for s in (FILTERS, None))
    same = bool(jnp.max(jnp.abs(told - guessed)) < 1e-5)
    assert same == (dtype == "float32")


@pytest.mark.parametrize("shape", [(5,), (), (1, 1)])
def test_nothing_is_guessed_of_vectors_and_numbers(shape):
    x, g = _normal(0, *shape), _normal(1, *shape)
    np.testing.assert_allclose(_first(so.adamp(1.0), g, x), -jnp.sign(g), rtol=1e-5)
    zero = jnp.zeros_like(g)
    assert not jnp.any(_first(so.adamp(1.0), zero, x))


def test_one_row_is_one_group():
    """A kernel (1, n) has filters of one coordinate, but may be invariant as a layer."""
    x = _normal(0, 1, 6)
    updates = _first(so.sgdp(1.0), _tangent(1, x, LAYER), x)
    np.testing.assert_allclose(so.geometry.dot(updates, x, LAYER), 0.0, atol=1e-5)


class TestNesterov:
    @pytest.mark.usefixtures("standard_promotion")
    def test_trace_is_that_of_optax(self):
        ours, theirs = so.trace(0.9, nesterov=True), optax.trace(0.9, nesterov=True)
        x = _normal(0, 4)
        one, other = ours.init(x), theirs.init(x)
        for seed in (1, 2, 3):
            a, one = ours.update(_normal(seed, 4), one, x)
            b, other = theirs.update(_normal(seed, 4), other, x)
            np.testing.assert_allclose(a, b, rtol=1e-6)

    def test_ema(self):
        """b1 m + (1 - b1) (g + l2 x), debiased like m."""
        tx = so.ema(0.9, nesterov=True, weight_decay=0.5)
        x, g = _normal(0, 4), _normal(1, 4)
        state, m = tx.init(x), jnp.zeros(4)
        for k in (1, 2, 3):
            out, state = tx.update(g, state, x)
            m = 0.9 * m + 0.1 * (g + 0.5 * x)
            expected = (0.9 * m + 0.1 * (g + 0.5 * x)) / (1 - 0.9**k)
            np.testing.assert_allclose(out, expected, rtol=1e-5)


class TestMomentumOfSgdp:
    """What is stored is projected, and else what a momentum without projection would be."""

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_precision(self, nesterov):
        """A sum in float32 of bfloat16 gradients does not stall."""
        x, g = {"b": jnp.ones(1, jnp.bfloat16)}, {"b": jnp.ones(1, jnp.bfloat16)}
        tx = so.sgdp(1.0, {"b": None}, 0.999, nesterov=nesterov, mu_dtype=jnp.float32)
        state = jax.lax.fori_loop(0, 3000, lambda _, s: tx.update(g, s, x)[1], tx.init(x))
        expected = (1 - 0.999**3000) / (1 - 0.999)
        np.testing.assert_allclose(optax.tree.get(state, "trace")["b"], expected, rtol=1e-3)

    @pytest.mark.parametrize("spheres", [None, {"k": FILTERS, "b": None}])
    def test_no_update_no_change(self, spheres):
        tx = so.sgdp(1.0, spheres)
        x = {"k": _normal(0, 4, 3), "b": _normal(1, 3)}
        _, state = tx.update(x, tx.init(x), x)
        updates, after = tx.update({"k": x["k"], "b": None}, state, x)
        assert updates["b"] is None
        before, now = (optax.tree.get(s, "trace")["b"] for s in (state, after))
        np.testing.assert_array_equal(now, before)

    def test_no_weight_decay_needs_no_division(self):
        x = {"b": jnp.ones(2)}
        tx = so.sgdp(0.5, {"b": None}, 1.0)
        np.testing.assert_array_equal(_first(tx, x, x)["b"], -0.5 * x["b"])

    def test_weight_decay_needs_a_division(self):
        with pytest.raises(ValueError, match="momentum is 1"):
            so.sgdp(0.5, {"b": None}, 1.0, weight_decay=0.1)
