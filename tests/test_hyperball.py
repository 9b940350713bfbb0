"""Hyperball optimizers: the formula, the radius that stays, stacks that stay apart."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .compiling import usual_jit

LAYER, FILTERS = so.Sphere(()), so.Sphere()
INNERS = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "sign": optax.scale_by_sign,
    "nothing": optax.identity,
    "ours": lambda: so.quotient(so.ema(0.9), so.rms(0.99, spheres=FILTERS)),
}


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _path(tx, x, steps=4, seed=1):
    """The points after each step of a stream of gradients, and the state."""
    state, update, path = tx.init(x), jax.jit(tx.update), []
    for k in range(steps):
        updates, state = update(_normal(seed + k, *x.shape, dtype=x.dtype), state, x)
        x = optax.apply_updates(x, updates)
        path.append(x)
    return path, state


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize(("sphere", "axes"), [(LAYER, (0, 1)), (FILTERS, (0,))])
def test_formula(name, sphere, axes):
    """W <- R n(W - lr R n(q)), whatever gives q."""

    def n(x):
        return x / jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))

    inner, lr = INNERS[name](), 0.1
    x = start = _normal(0, 5, 4, dtype=float)
    radius = jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
    path, _ = _path(so.hyperball(inner, lr, sphere), start)
    state = inner.init(x)
    for k, actual in enumerate(path):
        q, state = inner.update(_normal(1 + k, 5, 4, dtype=float), state, x)
        x = radius * n(x - lr * radius * n(q))
        np.testing.assert_allclose(actual, x, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_tangential_directions_turn_by_the_arctangent_of_the_rate():
    inner = so.project(FILTERS)
    x = _normal(0, 6, 3, dtype=float) * jnp.asarray([[1e-3, 1.0, 1e3]])
    (after,), _ = _path(so.hyperball(inner, 0.2, FILTERS), x, steps=1)
    np.testing.assert_allclose(so.geometry.angle(x, after, FILTERS), math.atan(0.2), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_radius():
    """Of the start, of a number, or whatever it is: also when something else has changed it."""
    x = _normal(0, 6, 3, dtype=float)
    before = so.geometry.norm(x, FILTERS)
    for radius, expected in (("initial", before), ("current", 2 * before), (3.0, 3.0)):
        tx = so.adamh(0.1, FILTERS, radius=radius)
        updates, _ = tx.update(_normal(1, 6, 3, dtype=float), tx.init(x), 2 * x)
        after = so.geometry.norm(2 * x + updates, FILTERS)
        np.testing.assert_allclose(after, jnp.broadcast_to(expected, after.shape), rtol=1e-12)
    nan = float("nan")
    for wrong in ("first", -1.0, None, True, nan, np.float32(-1), jnp.float32(0), jnp.ones(3)):
        with pytest.raises(ValueError, match="'current', 'initial' or a positive number"):
            so.hyperball(optax.identity(), 0.1, FILTERS, wrong)


# array -> (shape, sphere): one large group, a few of medium size, and small ones
DRIFTING = {
    "matrix": ((64, 64), LAYER),
    "stack": ((4, 24, 16), so.Sphere((0,))),
    "filters": ((3, 3, 16, 8), FILTERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-1, 1e-2, 1e-3, 1e-4])
def test_no_drift_in_bfloat16(rate):
    """At every one of 10,000 steps the radius is that of the start to 1e-3, in every array."""
    spheres = {name: sphere for name, (_, sphere) in DRIFTING.items()}
    tx = so.adamh(rate, spheres)

    def trees(seed, *count, scale=1.0):
        return {
            name: jnp.asarray(scale, jnp.bfloat16)
            * _normal(seed + i, *count, *shape, dtype=jnp.bfloat16)
            for i, (name, (shape, _)) in enumerate(DRIFTING.items())
        }

    start, common, noise = trees(0), trees(10, scale=0.5), trees(20, 64)
    radius = so.geometry.norm(start, spheres)

    # With all optimisations, because what they skip of the rounding is tested too.
    @usual_jit
    def run(x, state):
        def step(carry, k):
            x, state = carry
            now = so.geometry.norm(x, spheres)
            error = jax.tree.map(lambda r, r0: jnp.max(jnp.abs(r / r0 - 1)), now, radius)
            grads = jax.tree.map(lambda c, n: c + n[k % 64], common, noise)
            updates, state = tx.update(grads, state, x)
            return (optax.apply_updates(x, updates), state), error

        (end, _), errors = jax.lax.scan(step, (x, state), jnp.arange(10_000))
        return end, jax.tree.map(jnp.max, errors)

    end, errors = run(start, tx.init(start))
    for name, error in errors.items():
        assert float(error) < 1e-3, name
        assert bool(jnp.any(end[name] != start[name])), name


@pytest.mark.parametrize("radius", ["current", "initial", 2.0])
@pytest.mark.parametrize("make", [so.adamh, so.muonh])
def test_zero_weights_start_to_move(make, radius):
    """And then keep the radius that they have, or take the one that they are given."""
    x = _normal(0, 6, 3).at[:, 1].set(0.0) if radius == "current" else jnp.zeros((6, 3))
    path, _ = _path(make(0.1, FILTERS, radius=radius), x)
    norms = [so.geometry.norm(y, FILTERS)[0, 1] for y in path]
    assert all(bool(jnp.all(jnp.isfinite(y))) for y in path)
    assert norms[0] > 0
    np.testing.assert_allclose(norms[2], norms[1], rtol=1e-5)
    if radius == 2.0:
        np.testing.assert_allclose(norms[1:], 2.0, rtol=1e-5)


@pytest.mark.parametrize("make", [so.adamh, so.muonh])
@pytest.mark.parametrize(
    ("shape", "sphere", "alone"),
    [
        ((3, 6, 5), so.Sphere((0,)), LAYER),  # experts
        ((2, 3, 6, 5), so.Sphere((0, 1)), LAYER),  # of scanned layers
        ((3, 6, 5), so.Sphere((0, -1)), FILTERS),
        ((2, 3, 3, 4, 5), so.Sphere((0,)), LAYER),  # convolutions
    ],
)
def test_stacks_are_separate_spheres(make, shape, sphere, alone):
    """Each matrix takes the steps that it takes alone."""
    radii = jnp.arange(1.0, 1.0 + shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    stack = radii * _normal(0, *shape)
    together, _ = _path(make(0.1, sphere), stack)
    leading = len(sphere.index_axes) - (sphere.index_axes[-1] == -1)
    tx = make(0.1, alone)
    for index in np.ndindex(*shape[:leading]):
        x = stack[index]
        state, update = tx.init(x), jax.jit(tx.update)
        for k, expected in enumerate(together):
            updates, state = update(_normal(1 + k, *shape)[index], state, x)
            x = optax.apply_updates(x, updates)
            np.testing.assert_allclose(expected[index], x, rtol=2e-4, atol=2e-5)


def test_heads_are_separate_matrices():
    """(in, heads, head_dim): the head in the middle."""
    x = _normal(0, 6, 3, 4)
    path, _ = _path(so.muonh(0.1, so.Sphere((1,))), x)
    tx = so.muonh(0.1, LAYER)
    for head in range(3):
        y, state = x[:, head], tx.init(x[:, head])
        for k, expected in enumerate(path):
            updates, state = tx.update(_normal(1 + k, 6, 3, 4)[:, head], state, y)
            y = optax.apply_updates(y, updates)
            np.testing.assert_allclose(expected[:, head], y, rtol=2e-4, atol=2e-5)


def test_muonh_goes_in_the_direction_of_an_orthogonal_matrix():
    """Of the momentum's singular vectors, with values that the iteration brings near 1."""
    x, g = _normal(0, 12, 5), _normal(1, 12, 5) * jnp.asarray([[1.0, 0.1, 3.0, 1.0, 0.3]])
    tx = so.hyperball(so.muonh(1.0, None), 1.0, None)  # nothing on a sphere: Adam
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(updates, jnp.sign(g), rtol=1e-3)

    tx = so.muonh(1e-3, LAYER)
    updates, _ = tx.update(g, tx.init(x), x)
    # Before the retraction, which turns the step by little at this rate.
    step = -np.asarray(updates) / (1e-3 * float(jnp.linalg.norm(x)))
    u, s, v = np.linalg.svd(np.asarray(g), full_matrices=False)
    assert s[0] / s[-1] > 10
    inside = u.T @ step @ v.T * math.sqrt(5)
    assert np.all((np.diag(inside) > 0.6) & (np.diag(inside) < 1.4))
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=0.05)


def test_off_the_spheres_the_inner_updates_stay():
    params = {"kernel": _normal(0, 6, 3), "bias": _normal(1, 3)}
    grads = {"kernel": _normal(2, 6, 3), "bias": _normal(3, 3)}
    tx = so.hyperball(optax.scale_by_sign(), 0.1, {"kernel": LAYER, "bias": None}, "initial")
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["bias"], -0.1 * jnp.sign(grads["bias"]))
    kept = optax.tree.get(state, "kept")
    np.testing.assert_allclose(kept["kernel"], so.geometry.norm(params["kernel"], LAYER))


def test_spheres_that_do_not_fit_are_said_at_once():
    for make in (so.hyperball, lambda inner, *rest: so.muonh(*rest)):
        with pytest.raises(ValueError, match="does not fit the parameter"):
            make(optax.identity(), 0.1, so.Sphere((5,))).init(_normal(0, 6, 3))


def test_muonh_without_a_matrix():
    """A kernel of one coordinate per filter, tied with its bias; arrays that get no update."""
    tie = so.Sphere(tie="norm")
    for shape in ((1, 4), (1, 1, 1, 4), (2, 1, 4)):
        spheres = {"k": tie, "b": so.Sphere((-1,), tie="norm")}
        if len(shape) == 3:
            spheres = {"k": so.Sphere((0, -1), tie="n"), "b": so.Sphere((0, -1), tie="n")}
        bias = (2, 4) if len(shape) == 3 else (4,)
        x = {"k": _normal(0, *shape), "b": _normal(1, *bias)}
        same = [make(0.1, spheres) for make in (so.muonh, so.adamh)]
        one, other = (tx.update(x, tx.init(x), x)[0] for tx in same)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    x = {"k": _normal(0, 6, 3), "i": jnp.arange(3)}
    tx = so.muonh(0.1, {"k": LAYER, "i": None})
    updates, _ = tx.update({"k": _normal(1, 6, 3), "i": None}, tx.init(x), x)
    assert updates["i"] is None


def test_missing_updates_of_matrices():
    """They leave their state as it is, also the momentum of a matrix."""
    x, spheres = {"k": _normal(0, 6, 3), "l": _normal(1, 6, 3)}, {"k": LAYER, "l": LAYER}
    for make in (so.muonh, so.adamh):
        tx = make(0.1, spheres)
        _, before = tx.update(x, tx.init(x), x)
        updates, after = tx.update(x | {"k": None}, before, x)
        assert updates["k"] is None
        assert jnp.abs(updates["l"]).max() > 0
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
        again, _ = tx.update(x, after, x)
        assert jnp.isfinite(again["k"]).all()


def test_integers_and_other_dtypes_beside_bfloat16():
    """Leaves off the spheres may be anything."""
    params = {"kernel": _normal(0, 6, 3, dtype=jnp.bfloat16), "table": jnp.ones(3, jnp.int8)}
    grads = {"kernel": _normal(1, 6, 3, dtype=jnp.bfloat16), "table": jnp.zeros(3, jnp.int8)}
    spheres = {"kernel": LAYER, "table": None}
    tx = so.retract(spheres, 2.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(so.geometry.norm(after, spheres)["kernel"], 2.0, rtol=4e-3)
    np.testing.assert_array_equal(after["table"], params["table"])


def test_weight_decay_is_for_the_rest():
    """Decoupled, as in AdamW, and not felt on the spheres."""
    params = {"kernel": _normal(0, 6, 3), "bias": _normal(1, 3)}
    grads = {"kernel": _normal(2, 6, 3), "bias": _normal(3, 3)}
    spheres = {"kernel": LAYER, "bias": None}
    for make in (so.adamh, so.muonh):
        plain, decayed = make(0.1, spheres), make(0.1, spheres, weight_decay=0.5)
        expected, _ = plain.update(grads, plain.init(params), params)
        actual, _ = decayed.update(grads, decayed.init(params), params)
        np.testing.assert_array_equal(actual["kernel"], expected["kernel"])
        difference = expected["bias"] - 0.05 * params["bias"]
        np.testing.assert_allclose(actual["bias"], difference, rtol=1e-5)


@pytest.mark.parametrize("radius", ["current", "initial", 1.0])
@pytest.mark.parametrize("rate", [0.9, 0.99, 0.9999, 1.0, 1.0001])
def test_steps_that_nearly_reach_the_origin(rate, radius):
    """||x + q||^2 from inner products has few digits there. Where it has none, the group stays."""
    x = _normal(0, 50, 4)
    tx = so.hyperball(optax.identity(), rate, FILTERS, radius)
    state, update = tx.init(x), jax.jit(tx.update)
    wanted = so.geometry.norm(x, FILTERS) if isinstance(radius, str) else radius
    for seed in range(5):
        updates, state = update(x + 1e-3 * _normal(seed, 50, 4), state, x)  # towards the origin
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(so.geometry.norm(x, FILTERS), wanted, rtol=2e-4)


SPIKES = {
    "adamg": so.adamg(0.1, FILTERS),
    "adamg_star": so.adamg_star(0.1, FILTERS),
    "hyperball": so.hyperball(optax.identity(), 0.1, FILTERS, 1.0),
    "trace": so.hyperball(optax.trace(0.9), 0.1, FILTERS, 1.0),
    "ema": so.hyperball(so.ema(0.9, FILTERS, transport=True), 0.1, FILTERS, 1.0),
}


@pytest.mark.parametrize("spike", [1e-22, 1e-15, 1e18, 1e19, 1e20, 1e22])
@pytest.mark.parametrize("tx", SPIKES.values(), ids=SPIKES)
def test_a_gradient_whose_square_is_no_number(tx, spike):
    """One such gradient, of a loss scale for example, leaves the weights on their sphere."""
    x, scale = so.geometry.direction(_normal(0, 16, 3), FILTERS), jnp.array([[1.0, spike, 1.0]])
    state, update = tx.init(x), jax.jit(tx.update)
    for seed in range(5):
        g = _normal(1 + seed, 16, 3)
        updates, state = update(g * scale if seed == 1 else g, state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(so.geometry.norm(x, FILTERS), 1.0, rtol=1e-6)


def test_tiny_weights_and_gradients():
    x, g = 1e-15 * _normal(0, 16, 3), 1e-22 * _normal(1, 16, 3)
    for tx in (so.adamg(0.1, FILTERS), so.adamg_star(0.1, FILTERS)):
        state, y = tx.init(x), x
        for _ in range(4):
            updates, state = tx.update(g, state, y)
            y = optax.apply_updates(y, updates)
            np.testing.assert_allclose(so.geometry.norm(y, FILTERS), 1.0, rtol=1e-6)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.9, 2.0])
def test_a_narrow_momentum_of_adamg(rate, mu_dtype):
    x = so.geometry.direction(_normal(0, 16, 3, dtype=float), FILTERS)
    tx = so.adamg(rate, FILTERS, mu_dtype=mu_dtype)
    state, update = tx.init(x), jax.jit(tx.update)
    for seed in range(30):
        updates, state = update(_normal(seed, 16, 3, dtype=float), state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(so.geometry.norm(x, FILTERS), 1.0, rtol=1e-13)


def test_a_state_of_another_length():
    params = _normal(0, 5, 4)
    tx = so.hyperball(optax.identity(), 0.1, LAYER)
    with pytest.raises(ValueError, match=r"hyperball: the state has 2 parts, not 4.*init"):
        tx.update(params, tx.init(params)[:2], params)
