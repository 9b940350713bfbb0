"""The blocks of norm control: retract with parts, normalize with a mean or a floor, center, decouple."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .compiling import usual_jit
from .optimizers import SPHERES, random_tree

pytestmark = pytest.mark.usefixtures("standard_promotion")  # of Optax's own optimizers
W = so.Sphere(())


def _update(tx, updates, params):
    return tx.update(updates, tx.init(params), params)[0]


def _move(tx, params, grads, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# -- retract


@pytest.mark.parametrize("radius", ["current", "initial", 1.5])
@pytest.mark.parametrize(("outward", "inward"), [(0.5, 1.0), (0.0, 1.0), (1.0, 0.0), (0.3, 0.2)])
def test_parts_of_a_retraction(radius, outward, inward):
    params, updates = random_tree(0), random_tree(1, scale=0.3)
    tx = so.retract(SPHERES, radius, outward=outward, inward=inward)
    moved = optax.apply_updates(params, _update(tx, updates, params))
    free = optax.apply_updates(params, updates)
    for name, axes in (("layer", (0, 1)), ("heads", (0, 2))):
        before, after, y = (
            np.sqrt(np.sum(np.square(tree[name]), axis=axes, keepdims=True))
            for tree in (params, moved, free)
        )
        wanted = radius if isinstance(radius, float) else before
        part = np.where(y > wanted, outward, inward)
        np.testing.assert_allclose(after, wanted + part * (y - wanted), rtol=1e-5)
        np.testing.assert_allclose(moved[name] / after, free[name] / y, rtol=1e-5)
    np.testing.assert_array_equal(moved["conv"]["bias"], free["conv"]["bias"])


def test_both_parts_are_no_constraint():
    params, updates = random_tree(0), random_tree(1)
    found = _update(so.retract(SPHERES, outward=1.0, inward=1.0), updates, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_ball_holds_back_only_what_leaves_it():
    params = {"w": jnp.array([[0.5, 2.0], [0.0, 0.0]])}
    tx = so.retract(so.Sphere(), 1.0, inward=1.0)
    moved = optax.apply_updates(
        params, _update(tx, {"w": jnp.array([[0.1, 1.0], [0.0, 0.0]])}, params)
    )
    np.testing.assert_allclose(moved["w"], [[0.6, 1.0], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("part", [-0.1, 1.5, jnp.ones(2), "half", float("nan")])
@pytest.mark.parametrize("name", ["outward", "inward"])
def test_parts_have_to_be_parts(name, part):
    with pytest.raises(ValueError, match=f"retract: {name} is"):
        so.retract(so.Sphere(), **{name: part})


def test_parts_by_inject_hyperparams():
    def brake(outward):
        return so.retract(so.Sphere(), outward=outward, inward=1.0)

    params, updates = {"w": jnp.ones((3, 2))}, {"w": jnp.full((3, 2), 0.5)}
    tx = optax.inject_hyperparams(brake)(outward=lambda count: 0.5)
    found = jax.jit(tx.update)(updates, tx.init(params), params)[0]
    np.testing.assert_allclose(found["w"], 0.25, rtol=1e-6)


# -- normalize


def test_running_mean_of_lengths():
    """Against NumPy, with an update that is ten times as long as the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3))
    steps = rng.normal(size=(6, 4, 3)) * np.array([1, 1, 10, 1, 0, 1])[:, None, None]
    tx = so.normalize(so.Sphere(), decay=0.8)
    params = {"w": jnp.asarray(x, jnp.float32)}
    state, nu = tx.init(params), np.zeros((1, 3))
    for t, q in enumerate(steps, 1):
        found, state = tx.update({"w": jnp.asarray(q, jnp.float32)}, state, params)
        nu = 0.8 * nu + 0.2 * np.sum(q**2, axis=0, keepdims=True)
        r = np.sqrt(np.sum(x**2, axis=0, keepdims=True))
        np.testing.assert_allclose(
            found["w"], r * q / np.sqrt(nu / (1 - 0.8**t)), rtol=1e-5, atol=1e-7
        )
    assert state.nu["w"].shape == (1, 3)


def test_at_least():
    """Columns of length 5 and 0.5 at radius 2: only the second is shorter than 0.35 of the radius."""
    params = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}
    updates = {"w": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    found = _update(so.normalize(so.Sphere(), at_least=0.35), updates, params)["w"]
    np.testing.assert_allclose(found, [[3.0, 0.42], [4.0, 0.56]], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.9}, {"at_least": 0.5}, {"decay": 0.9, "at_least": 0.5}]
)
def test_normalize_leaves_zeros(options):
    tx = so.normalize(so.Sphere(), **options)
    params = {"w": jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])}
    updates = {"w": jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
    found = _update(tx, updates, params)["w"]
    np.testing.assert_array_equal(found[:, 1:], updates["w"][:, 1:])
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "0.9"}, "normalize: the rate of decay is '0.9', not a number"),
        ({"decay": lambda t: 0.9}, "is a schedule"),
        ({"decay": jnp.bfloat16(0.9)}, "the rate of decay is bfloat16"),
        ({"at_least": "a third"}, "normalize: at_least is 'a third', not a number"),
    ],
)
def test_normalize_wants_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        so.normalize(so.Sphere(), **options)


def test_normalize_compares_its_state():
    params = {"w": jnp.ones((4, 3))}
    state = so.normalize(W, decay=0.9).init(params)
    with pytest.raises(
        ValueError, match=r"nu of the state has shape \(1, 1\) for the parameter 'w'"
    ):
        so.normalize(so.Sphere(), decay=0.9).update(params, state, params)


# -- center


def test_center():
    updates = random_tree(1)
    found = _update(so.center(SPHERES), updates, None or updates)
    np.testing.assert_allclose(found["layer"].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(found["conv"]["kernel"].mean((0, 1, 2)), 0.0, atol=1e-6)
    np.testing.assert_allclose(found["heads"].mean((0, 2)), 0.0, atol=1e-6)
    # kernel (5, 4) and bias (4,) in two blocks of two outputs, tied: twelve coordinates
    kernel, bias = found["norm"]["kernel"], found["norm"]["bias"]
    for block in (slice(0, 2), slice(2, 4)):
        mean = kernel[:, block].sum() + bias[block].sum()
        np.testing.assert_allclose(mean, 0.0, atol=1e-5)
    for name in ("scalar", "one_row"):
        np.testing.assert_array_equal(found[name], updates[name])
    np.testing.assert_array_equal(found["conv"]["bias"], updates["conv"]["bias"])
    # without parameters, too
    tx = so.center(SPHERES)
    np.testing.assert_array_equal(tx.update(updates, tx.init(updates))[0]["layer"], found["layer"])


def test_centred_updates_keep_the_mean_of_weights():
    """As weight standardisation asks. `optax.centralize` has the axes of PyTorch."""
    params, grads = {"w": jnp.arange(12.0).reshape(4, 3)}, {"w": jnp.ones((4, 3)).at[0, 0].set(5.0)}
    moved, _ = _move(optax.chain(so.center(so.Sphere()), optax.sgd(0.1)), params, grads)
    np.testing.assert_allclose(moved["w"].mean(0), params["w"].mean(0), rtol=1e-6)
    other, _ = _move(optax.chain(optax.centralize(), optax.sgd(0.1)), params, grads)
    assert float(jnp.abs(other["w"].mean(0) - params["w"].mean(0)).max()) > 1e-2


# -- on_spheres


def test_on_spheres():
    params = random_tree(0)
    mask = so.on_spheres(SPHERES)(params)
    assert mask == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"kernel": True, "bias": True},
        "heads": True,
        "layer": True,
        "one_row": False,  # groups of one coordinate
        "scalar": False,
    }
    # as a mask, and as labels
    decayed = _update(optax.add_decayed_weights(0.1, so.on_spheres(SPHERES)), params, params)
    np.testing.assert_allclose(decayed["layer"], 1.1 * params["layer"], rtol=1e-6)
    np.testing.assert_array_equal(decayed["scalar"], params["scalar"])
    frozen = optax.partition(
        {True: optax.set_to_zero(), False: optax.identity()}, so.on_spheres(SPHERES)
    )
    found = _update(frozen, params, params)
    assert not jnp.any(found["layer"])
    np.testing.assert_array_equal(found["one_row"], params["one_row"])
    assert so.on_spheres({"a": so.Sphere(), "b": None})({"a": jnp.ones((2, 2)), "b": None}) == {
        "a": True,
        "b": False,
    }
    with pytest.raises(ValueError, match="no entry for the parameter 'b'"):
        so.on_spheres({"a": so.Sphere()})({"a": jnp.ones((2, 2)), "b": jnp.ones(2)})


# -- decouple


def _reparametrise(params, gains, z, phi):
    for spheres, values in zip(gains, z, strict=True):
        params = so.geometry.scale(params, jax.tree.map(phi, values), spheres)
    return params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "phi", [lambda z: z, jax.nn.softplus, jnp.exp], ids=["z", "softplus", "exp"]
)
def test_decouple_is_training_of_u_and_z(phi):
    """Seven steps of Adam on W are those of Adam on U and of SGD on z, in a network that has both."""
    gains = (
        {"a": so.Sphere(blocks=2, tie="a"), "b": so.Sphere(blocks=2, tie="a"), "c": None},
        {"a": so.Sphere((0,)), "b": None, "c": so.Sphere(())},
    )
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 4), "b": (4,), "c": (3, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    target = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}

    def loss(w):
        return sum(jnp.sum(jnp.sin(w[k] - target[k]) ** 2) for k in shapes)

    direction, magnitude = optax.adam(0.03), optax.sgd(0.01)
    tx = so.decouple(direction, magnitude, gains, phi=phi)
    w, state = params, tx.init(params)
    u, z = params, jax.tree.map(lambda x: x, state.z)
    u_state, z_state = direction.init(u), magnitude.init(z)

    def whole(u, z):
        return loss(_reparametrise(u, gains, z, phi))

    for _ in range(7):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
        du, dz = jax.grad(whole, (0, 1))(u, z)
        # A tied group has one z, which the state holds for each of its arrays.
        dz[0]["b"] = dz[0]["a"] = (dz[0]["a"].reshape(-1) + dz[0]["b"]).reshape(dz[0]["a"].shape)
        dz[0]["b"] = dz[0]["b"].reshape(-1)
        step, u_state = direction.update(du, u_state, u)
        u = optax.apply_updates(u, step)
        step, z_state = magnitude.update(dz, z_state, z)
        z = optax.apply_updates(z, step)
        expected = _reparametrise(u, gains, z, phi)
        for k in shapes:
            np.testing.assert_allclose(w[k], expected[k], rtol=1e-11, atol=1e-12, err_msg=k)


def test_decouple_leaves_the_rest_to_direction():
    params, grads = random_tree(0), random_tree(1)
    gains = ({k: so.Sphere() if k == "layer" else None for k in params},)
    tx = so.decouple(optax.adam(0.1), optax.adam(0.1), gains)
    state = tx.init(params)
    assert [x.shape for x in jax.tree.leaves(state.z)] == [(1, 3)]
    assert [x.shape for x in jax.tree.leaves(state.u)] == [(4, 3)]
    found, expected = _update(tx, grads, params), _update(optax.adam(0.1), grads, params)
    for k in set(params) - {"layer"}:
        for a, b in zip(jax.tree.leaves(found[k]), jax.tree.leaves(expected[k]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_start_of_ones_own():
    params = {"w": jnp.array([[3.0, 0.0], [4.0, 2.0]])}

    def start(params):
        return so.geometry.direction(params, so.Sphere()), (so.geometry.norm(params, so.Sphere()),)

    state = so.decouple(optax.sgd(0.1), optax.sgd(0.1), (so.Sphere(),), start=start).init(params)
    np.testing.assert_allclose(state.z[0]["w"], [[5.0, 2.0]])
    np.testing.assert_allclose(state.u["w"], [[0.6, 0.0], [0.8, 1.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gains": so.Sphere()}, "not a tuple of spheres"),
        ({"gains": ()}, "not a tuple of spheres"),
        ({"direction": 0.1}, "decouple: 0.1 is no optax.GradientTransformation"),
        ({"phi": lambda z: 0 * z}, "is 1 nowhere in"),
        ({"start": lambda p: (p, ())}, "start returns 0 trees of magnitudes for 1 gains"),
        (
            {"start": lambda p: (p, ({"w": jnp.ones((4, 1))},))},
            r"z\[0\] of start has shape \(4, 1\) at 'w', not \(1, 3\)",
        ),
        (
            {"start": lambda p: ({"w": jnp.ones((4, 1))}, ({"w": jnp.ones((1, 3))},))},
            r"U of start has shape \(4, 1\) at 'w', not \(4, 3\)",
        ),
        ({"gains": (so.Sphere((2,)),)}, "axis 2 is out of range"),
    ],
)
def test_what_decouple_refuses(options, message):
    options = {
        "direction": optax.sgd(0.1), "magnitude": optax.sgd(0.1), "gains": (so.Sphere(),)
    } | options  # fmt: skip
    with pytest.raises(ValueError, match=message):
        so.decouple(**options).init({"w": jnp.ones((4, 3))})


def test_decouple_compares_its_state():
    params = {"w": jnp.ones((4, 3))}
    one = so.decouple(optax.sgd(0.1), optax.sgd(0.1), (so.Sphere(),))
    two = so.decouple(optax.sgd(0.1), optax.sgd(0.1), (so.Sphere(), so.Sphere((0,))))
    rows = so.decouple(optax.sgd(0.1), optax.sgd(0.1), (so.Sphere((0,)),))
    with pytest.raises(
        ValueError, match="1 trees of magnitudes, and there are 2 gains: the state was"
    ):
        two.update(params, one.init(params), params)
    with pytest.raises(
        ValueError, match=r"z\[0\] of the state has shape \(4, 1\) for the parameter 'w'"
    ):
        one.update(params, rows.init(params), params)
    with pytest.raises(ValueError, match="needs the parameters"):
        one.update(params, one.init(params))


def test_parameters_and_state_may_be_donated():
    """U is a copy of W, and no second name of its buffer."""
    tx = so.decouple(optax.sgd(0.1), optax.sgd(0.1), (so.Sphere(),))
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    step = jax.jit(lambda x, s: tx.update(x, s, x), donate_argnums=(0, 1))
    updates, _ = step(params, state)
    assert bool(jnp.isfinite(updates["w"]).all())


def test_parameters_that_were_changed_from_outside_count():
    """A later transformation, a checkpoint or a user: U follows, and the gains stay."""
    params, grads = (
        {"w": jnp.ones((4, 3)), "b": jnp.ones(3)},
        {"w": jnp.ones((4, 3)), "b": jnp.ones(3)},
    )
    tx = so.decouple(optax.sgd(0.1), optax.sgd(0.1), ({"w": so.Sphere(), "b": None},))
    params, state = _move(tx, params, grads, steps=3)
    changed = {**params, "w": params["w"].at[1, 2].set(-7.0)}
    nothing = jax.tree.map(jnp.zeros_like, grads)
    updates, state = tx.update(nothing, state, changed)
    assert not any(jnp.any(x) for x in jax.tree.leaves(updates))
    np.testing.assert_allclose(state.u["w"] * state.z[0]["w"], changed["w"], rtol=1e-6)
    # Decay behind it in a chain is not undone by the next step.
    decayed = optax.chain(tx, optax.add_decayed_weights(-0.1))
    moved, _ = _move(decayed, {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, nothing, steps=10)
    np.testing.assert_allclose(moved["w"], 0.9**10, rtol=1e-5)


@pytest.mark.parametrize("kept", ["initial", None])
def test_no_drift_in_bfloat16(kept):
    """W is U times its gains after 10,000 steps, up to the rounding of one."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)}
    inner = optax.sgd(1e-2)
    inner = optax.chain(inner, so.retract(W, "initial")) if kept else inner
    gains = (so.Sphere(), so.Sphere((0,)))
    tx = so.decouple(inner, optax.sgd(1e-3), gains, phi=jax.nn.softplus)

    @usual_jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            grads = {"w": jax.random.normal(key, (16, 8), jnp.bfloat16)}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 10_000)
        return jax.lax.scan(step, (params, state), keys)[0]

    state = tx.init(params)
    moved, state = run(params, state)
    assert {x.dtype for x in jax.tree.leaves(state.z)} == {jnp.dtype("float32")}
    assert state.u["w"].dtype == jnp.bfloat16
    upcast = {"w": state.u["w"].astype(jnp.float32)}
    product = _reparametrise(upcast, gains, state.z, jax.nn.softplus)["w"]
    np.testing.assert_allclose(moved["w"].astype(jnp.float32), product, rtol=2**-6, atol=2**-8)
    assert float(jnp.abs(jnp.concatenate([x["w"].ravel() for x in state.z]) - 0.5413).max()) > 0.02
    if kept:
        radius = float(so.geometry.norm(upcast, W)["w"].item())
        assert abs(radius / float(so.geometry.norm(params, W)["w"].item()) - 1) < 1e-3


def test_slow_gains_move_bfloat16_weights():
    """Steps of the gains that are too small to move a weight of bfloat16 are not lost."""
    params = {"w": jnp.full((4, 2), 1.0, jnp.bfloat16)}
    tx = so.decouple(optax.set_to_zero(), optax.sgd(1e-5), (so.Sphere(),))
    update = jax.jit(tx.update)
    state, grads = tx.init(params), {"w": jnp.full((4, 2), -1.0, jnp.bfloat16)}
    for _ in range(2000):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.z[0]["w"], 1 + 2000 * 4e-5, rtol=1e-3)
    np.testing.assert_allclose(params["w"].astype(jnp.float32), 1.08, rtol=1e-2)


def test_track_around_and_inside():
    rng = np.random.default_rng(0)
    params, grads = ({"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)} for _ in range(2))
    inside = so.track(optax.adam(0.1), so.Sphere())
    tx = so.track(so.decouple(inside, optax.adam(0.1), (W,)), so.Sphere())
    moved, state = _move(tx, params, grads, steps=3)
    around, within = state.angle["w"], state.inner_state.direction.angle["w"]
    assert around.shape == within.shape == (1, 3)
    assert float(around.min()) > 0
    assert float(within.min()) > 0
    # The gains are of whole matrices: they turn no filter.
    np.testing.assert_allclose(around, within, rtol=1e-4)
    # The moments inside are those of U, and not of W: no rate is claimed for W.
    assert np.isfinite(state.inner_state.direction.effective_lr["w"]).all()
    assert state.effective_lr["w"] is None
    np.testing.assert_allclose(
        state.radius["w"], so.geometry.norm(moved, so.Sphere())["w"], rtol=0.2
    )


# -- methods that are a recipe more than a block


def test_every_few_steps():
    """Normalize-and-Project at every third step."""
    params, grads = {"w": jnp.ones((4, 3))}, {"w": jnp.arange(12.0).reshape(4, 3)}
    project = optax.conditionally_transform(so.retract(W, "initial"), lambda step: step % 3 == 2)
    tx = optax.chain(optax.adam(0.1), project)
    state, radii = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        radii.append(float(so.geometry.norm(params, W)["w"].item()))
    first = 12**0.5
    np.testing.assert_allclose([radii[2], radii[5]], first, rtol=1e-6)
    assert all(abs(radii[k] - first) > 1e-2 for k in (0, 1, 3, 4))


@pytest.mark.parametrize(
    ("shape", "sphere", "radii"),
    [
        ((2, 6, 4), so.Sphere((0, -1)), (2, 1, 4)),  # stacked critics: per copy and output
        ((3, 6, 4), so.Sphere((0,)), (3, 1, 1)),  # experts or scanned layers: per matrix
        ((3, 5, 6, 4), so.Sphere((0, 1)), (3, 5, 1, 1)),  # scanned layers of experts
        ((2, 3, 3, 2, 4), so.Sphere((0, -1)), (2, 1, 1, 1, 4)),  # scanned convolutions
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda S: optax.chain(optax.adam(0.1), so.retract(S, 1.0)),
        lambda S: so.hyperball(optax.chain(optax.scale_by_adam(), so.project(S)), 0.1, S, 1.0),
        lambda S: optax.chain(
            optax.scale_by_lion(),
            so.center(S),
            so.project(S),
            so.normalize(S, decay=0.9),
            optax.scale_by_learning_rate(0.1),
            so.retract(S, 1.0),
        ),
        lambda S: so.decouple(
            optax.chain(optax.adam(0.1), so.retract(S, 1.0)), optax.set_to_zero(), (S,)
        ),
    ],
    ids=["retract", "hyperball", "rotational", "decouple"],
)
def test_stacks(make, shape, sphere, radii):
    """Each copy takes the steps that it takes alone."""
    rng = np.random.default_rng(0)
    params, grads = ({"w": jnp.asarray(rng.normal(size=shape), jnp.float32)} for _ in range(2))
    moved, _ = _move(make(sphere), params, grads, steps=3)
    norms = so.geometry.norm(moved, sphere)["w"]
    assert norms.shape == radii
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
    stacked = len(sphere.index_axes) - (-1 in sphere.index_axes)
    alone = so.Sphere((-1,) if -1 in sphere.index_axes else ())
    first = (0,) * stacked
    one = functools.partial(jax.tree.map, lambda x: x[first])
    expected, _ = _move(make(alone), one(params), one(grads), steps=3)
    np.testing.assert_allclose(moved["w"][first], expected["w"], rtol=2e-5, atol=1e-6)
