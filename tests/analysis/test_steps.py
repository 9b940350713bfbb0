"""Theorem 2, Table 1, the decomposition of the momentum and Theorem 4, on groups of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..golden import reference
from ..optimizers import SPHERES, random_tree

pytestmark = pytest.mark.usefixtures("x64")

SPECS = {
    ("conv", "kernel"): ((-1,), None, None),
    ("norm", "kernel"): ((-1,), 2, "norm"),
    ("norm", "bias"): ((-1,), 2, "norm"),
    ("heads",): ((1,), None, None),
    ("layer",): ((), None, None),
    ("one_row",): ((-1,), None, None),
    ("conv", "bias"): None,
    ("scalar",): None,
}


def _flat(tree):
    return {path: np.asarray(_get(tree, path)) for path in SPECS}


def _get(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _tree(seed, scale=1.0):
    return random_tree(seed, dtype=jnp.float64, scale=scale)


def _groups():
    flat = _flat(_tree(0))
    return reference.groups({k: v.shape for k, v in flat.items()}, SPECS)[0]


def _vector(tree, group):
    flat = _flat(tree)
    return np.concatenate([flat[leaf].ravel()[where] for leaf, where in group])


def _number(tree, group):
    """What a group-sized tree holds for a group: the same in all of its leaves."""
    (leaf, where), *others = group
    full = np.broadcast_to(_spread(tree, leaf), np.asarray(_get(_tree(0), leaf)).shape)
    values = full.ravel()[where]
    for other, there in others:
        more = np.broadcast_to(_spread(tree, other), np.asarray(_get(_tree(0), other)).shape)
        values = np.concatenate([values, more.ravel()[there]])
    assert np.ptp(values) == 0
    return values[0]


def _spread(tree, leaf):
    """Blocks repeated to the length of their axis."""
    value = np.asarray(_get(tree, leaf))
    length = np.asarray(_get(_tree(0), leaf)).shape[-1]
    repeat = length // value.shape[-1] if SPECS[leaf][1] else 1
    return np.repeat(value, repeat, axis=-1)


@pytest.fixture(params=[0.01, 3.0], ids=["short step", "long step"])
def case(request):
    """x, a, b and eta; the long step takes some groups to the other side of their sphere."""
    b = jax.tree.map(lambda x: jnp.abs(x) + 0.1, _tree(3))
    return _tree(1), _tree(2), b, request.param


def test_image_step_is_what_happens(case):
    x, a, b, eta = case
    step = jax.jit(lambda *args: so.analysis.image_step(*args, SPHERES))(x, a, b, eta)
    after = jax.tree.map(lambda x, a, b: x - eta * a / b, x, a, b)
    for group in _groups():
        x0, x1, a0, b0 = (_vector(tree, group) for tree in (x, after, a, b))
        r, d = np.linalg.norm(x0), len(x0)
        u, u1, rms = x0 / r, x1 / np.linalg.norm(x1), np.linalg.norm(b0) / d**0.5
        c = r * a0 / (b0 / rms)
        along = 1 - eta / (r**2 * rms) * (c @ u)
        c_perp = c - (c @ u) * u
        np.testing.assert_allclose(_number(step.radius, group), r)
        np.testing.assert_allclose(_number(step.next_radius, group), np.linalg.norm(x1))
        np.testing.assert_allclose(
            _number(step.effective_lr, group), eta / (r**2 * rms) / along, rtol=1e-9
        )
        np.testing.assert_allclose(_vector(step.direction, group), c_perp, atol=1e-12)
        np.testing.assert_allclose(_vector(step.next_direction, group), u1, atol=1e-12)
        angle = 2 * np.arctan2(np.linalg.norm(u - u1), np.linalg.norm(u + u1))
        np.testing.assert_allclose(_number(step.angle, group), angle, atol=1e-12)
    off = so.analysis.image_step(x, a, b, eta, SPHERES)
    np.testing.assert_allclose(off.next_direction["conv"]["bias"], after["conv"]["bias"])
    assert off.angle["conv"]["bias"] is None


def test_measured_step_agrees_with_the_image(case):
    x, a, b, eta = case
    image = so.analysis.image_step(x, a, b, eta, SPHERES)
    updates = jax.tree.map(lambda a, b: -eta * a / b, a, b)
    step = jax.jit(lambda x, q: so.analysis.measure_step(x, q, SPHERES))(x, updates)
    for name in ("angle", "radius", "next_radius", "next_direction"):
        jax.tree.map(
            lambda m, i: np.testing.assert_allclose(m, i, rtol=1e-9, atol=1e-12),
            getattr(step, name),
            getattr(image, name),
        )
    for group in _groups():
        x0, q0, c = (_vector(tree, group) for tree in (x, updates, image.direction))
        rate = _number(image.effective_lr, group)
        np.testing.assert_allclose(_vector(step.velocity, group), -rate * c, atol=1e-11)
        np.testing.assert_allclose(
            _number(step.tan_angle, group), rate * np.linalg.norm(c), rtol=1e-8, atol=1e-12
        )
        cosine = x0 @ q0 / (np.linalg.norm(x0) * np.linalg.norm(q0))
        np.testing.assert_allclose(_number(step.radial_cosine, group), cosine, atol=1e-12)


@pytest.mark.parametrize("b", [1, 1.0, np.float64(1.0)])
def test_b_may_be_a_number(b):
    x, a = _tree(1), _tree(2)
    actual = so.analysis.image_step(x, a, b, 0.1, SPHERES)
    expected = so.analysis.image_step(x, a, jax.tree.map(jnp.ones_like, x), 0.1, SPHERES)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def test_never_nan():
    x, zero = _tree(1), jax.tree.map(jnp.zeros_like, _tree(1))
    for point in (x, zero):
        for step in (x, zero, jax.tree.map(jnp.negative, x)):  # the last lands on the origin
            assert _finite(so.analysis.image_step(point, step, 1.0, 0.5, SPHERES))
            assert _finite(so.analysis.measure_step(point, step, SPHERES))
        assert _finite(so.analysis.image_step(point, x, zero, 0.5, SPHERES))
    nowhere = so.analysis.measure_step(zero, x, SPHERES)
    assert not np.any(nowhere.angle["layer"])
    np.testing.assert_allclose(
        nowhere.next_radius["layer"], so.geometry.norm(x, SPHERES)["layer"], rtol=1e-12
    )


def test_low_precision_is_accumulated_in_float32():
    x = {"w": jnp.full((10_000, 1), 0.01, jnp.bfloat16)}
    step = so.analysis.measure_step(x, x, so.Sphere())
    assert step.radius["w"].dtype == jnp.float32
    np.testing.assert_allclose(step.radius_ratio["w"], 2.0, rtol=1e-6)


class TestOrders:
    """The approximations fail at the order that the theorems say."""

    @staticmethod
    def _slope(sizes, errors):
        return np.polyfit(np.log(sizes), np.log(errors), 1)[0]

    def test_exponential_map(self):
        x, a = {"w": _tree(1)["layer"]}, {"w": _tree(2)["layer"]}
        u = so.geometry.direction(x, so.Sphere(()))
        sizes, errors = [], []
        for eta in 10.0 ** np.arange(-3, -1.0, 0.25):
            step = so.analysis.image_step(x, a, 1.0, eta, so.Sphere(()))
            velocity = -step.effective_lr["w"] * step.direction["w"]
            reached = so.geometry.exp(u, {"w": velocity}, so.Sphere(()))["w"]
            length = float(jnp.linalg.norm(velocity))
            error = float(jnp.linalg.norm(reached - step.next_direction["w"]))
            np.testing.assert_allclose(error, length**3 / 3, rtol=3 * length)
            sizes.append(length)
            errors.append(error)
        assert abs(self._slope(sizes, errors) - 3) < 0.02

    def test_sgd_is_adamg_star(self):
        """Directions at a fixed time eta k, apart by the third power of the rate; at the second
        order the constants of Theorem 4 matter: with beta = 1 - eta lambda they are far apart."""
        rng = np.random.default_rng(0)
        matrix = rng.normal(size=(6, 6))
        matrix = jnp.asarray(matrix + matrix.T)
        start = jnp.asarray(rng.normal(size=(6, 1)))

        def loss(x):
            u = x / jnp.linalg.norm(x)
            return jnp.sum(u * (matrix @ u))

        def direction(tx, steps):
            def body(carry, _):
                x, state = carry
                updates, state = tx.update(jax.grad(loss)(x), state, x)
                return (x + updates, state), None

            (x, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=steps)
            return x / jnp.linalg.norm(x)

        rates = [0.08, 0.04, 0.02, 0.01]
        gaps = []
        for rate in rates:
            steps = round(4 / rate)
            sgd = direction(so.sgd(rate, weight_decay=0.1), steps)
            star = direction(so.adamg_star(rate, so.Sphere(), weight_decay=0.1), steps)
            gaps.append(float(jnp.linalg.norm(sgd - star)))
        assert gaps[-1] > 1e-12
        assert abs(self._slope(rates, gaps) - 3) < 0.25

    def test_constants_of_theorem_4(self):
        """AdamG* written with v and the constants is `so.adamg_star`."""
        eta, decay, x = 0.1, 0.05, {"w": _tree(1)["layer"]}
        grads = [{"w": _tree(seed)["layer"]} for seed in range(2, 6)]
        sphere = so.Sphere(())
        star = so.analysis.adamg_star_from_sgd(eta, decay, so.geometry.norm(x, sphere))
        v, u = star.v0["w"], so.geometry.direction(x, sphere)["w"]
        tx = so.adamg_star(eta, sphere, weight_decay=decay)
        state = tx.init(x)
        for step, g in enumerate(grads):
            # The first gradient is taken at x, and is ||x|| times larger on the unit sphere.
            length = so.geometry.norm(x, sphere)["w"] if step == 0 else 1.0
            on_unit = g["w"] * length
            u = u - star.learning_rate * on_unit / jnp.sqrt(v)
            u = u / jnp.linalg.norm(u)
            v = star.beta * v + jnp.sum(on_unit**2)
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
            np.testing.assert_allclose(x["w"], u, rtol=1e-10)

    def test_bad_constants(self):
        with pytest.raises(ValueError, match="below 1"):
            so.analysis.adamg_star_from_sgd(1.0, 1.5, 1.0)
        with pytest.raises(ValueError, match="positive rate"):
            so.analysis.adamg_star_from_sgd(0.0, 0.1, 1.0)
        with pytest.raises(ValueError, match="positive rate"):
            so.analysis.adamg_star_from_sgd(np.float32(-0.1), 0.1, 1.0)

    def test_schedules_have_no_value(self):
        schedule = optax.linear_schedule(0.1, 0.0, 10)
        for call in (
            lambda: so.analysis.adamg_star_from_sgd(schedule, 0.1, 1.0),
            lambda: so.analysis.image_step(_tree(0), _tree(1), 1.0, schedule, None),
            lambda: so.analysis.sgd_equilibrium(schedule, 0.1, 1.0),
            lambda: so.analysis.adamw_equilibrium(schedule, 0.1, 1.0),
        ):
            with pytest.raises(ValueError, match=r"is a schedule; .* schedule\(count\)"):
                call()


class TestTable1:
    """Closed forms against `image_step`, on the gradients of a network with BatchNorm."""

    SPHERES = so.Sphere()
    ETA, DECAY, MOMENTUM, B1, B2, EPS = 0.05, 0.1, 0.9, 0.8, 0.95, 1e-6

    @pytest.fixture
    def run(self):
        return self._run()

    @classmethod
    @functools.cache
    def _run(cls):
        """Points, gradients: a convolution before BatchNorm, whose gradients are tangential."""
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(16, 6, 6, 2)))
        head = jnp.asarray(rng.normal(size=(1, 4)))

        def loss(params):
            y = jax.lax.conv_general_dilated(
                images, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = (y - y.mean((0, 1, 2), keepdims=True)) / y.std((0, 1, 2), keepdims=True)
            logits = jnp.sum(jax.nn.relu(y).mean((1, 2)) * head, -1)
            return jnp.mean(jax.nn.softplus(logits)) + jnp.mean(y**4)

        params = {"w": jnp.asarray(rng.normal(size=(3, 3, 2, 4)))}
        grad, points, grads = jax.jit(jax.grad(loss)), [], []
        tx = so.sgd(cls.ETA, momentum=cls.MOMENTUM, weight_decay=cls.DECAY)
        state = tx.init(params)
        for _ in range(6):
            points.append(params)
            grads.append(grad(params))
            updates, state = tx.update(grads[-1], state, params)
            params = optax.apply_updates(params, updates)
        radial = so.geometry.dot(points[-1], grads[-1], cls.SPHERES)["w"]
        assert float(jnp.max(jnp.abs(radial))) < 1e-13
        return points, grads

    def _equal(self, closed, image):
        np.testing.assert_allclose(closed.effective_lr["w"], image.effective_lr["w"], rtol=1e-12)
        scale = float(jnp.max(jnp.abs(image.direction["w"])))
        np.testing.assert_allclose(closed.direction["w"], image.direction["w"], atol=1e-13 * scale)

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_sgd(self, run, decay):
        points, grads = run
        a = jax.tree.map(lambda g, x: g + decay * x, grads[-1], points[-1])
        image = so.analysis.image_step(points[-1], a, 1.0, self.ETA, self.SPHERES)
        closed = so.analysis.effective_sgd(
            points[-1], grads[-1], self.ETA, self.SPHERES, weight_decay=decay
        )
        self._equal(closed, image)

    def test_sgd_momentum(self, run):
        points, grads = run
        m = jax.tree.map(jnp.zeros_like, points[0])
        for x, g in zip(points, grads, strict=True):
            m = jax.tree.map(lambda m, g, x: self.MOMENTUM * m + g + self.DECAY * x, m, g, x)
        image = so.analysis.image_step(points[-1], m, 1.0, self.ETA, self.SPHERES)
        closed = so.analysis.effective_sgd_momentum(points[-1], m, self.ETA, self.SPHERES)
        self._equal(closed, image)

    def test_adam(self, run):
        points, grads = run
        tx = so.adam(self.ETA, b1=self.B1, b2=self.B2, eps=self.EPS, weight_decay=self.DECAY)
        state = tx.init(points[0])
        for x, g in zip(points, grads, strict=True):
            updates, state = tx.update(g, state, x)
        mu, nu = optax.tree.get(state, "ema"), optax.tree.get(state, "nu")
        t = len(points)
        a = jax.tree.map(lambda m: m / (1 - self.B1), mu)
        scale = (1 - self.B1**t) / (1 - self.B1)
        b = jax.tree.map(lambda v: scale * (jnp.sqrt(v / (1 - self.B2**t)) + self.EPS), nu)
        image = so.analysis.image_step(points[-1], a, b, self.ETA, self.SPHERES)
        closed = so.analysis.effective_adam(
            points[-1], mu, nu, t, self.ETA, self.SPHERES, self.B1, self.B2, self.EPS
        )
        self._equal(closed, image)
        measured = so.analysis.measure_step(points[-1], updates, self.SPHERES)
        np.testing.assert_allclose(measured.angle["w"], image.angle["w"], rtol=1e-10)

    def test_decomposition(self, run):
        """[16-17]: r a = c_grad + lambda r^2 c_L2, and c from them is that of Theorem 2."""
        points, grads = run
        m = jax.tree.map(jnp.zeros_like, points[0])
        for x, g in zip(points, grads, strict=True):
            m = jax.tree.map(lambda m, g, x: self.MOMENTUM * m + g + self.DECAY * x, m, g, x)
        parts = so.analysis.decompose_momentum(points, grads, self.MOMENTUM, self.SPHERES)
        r = so.geometry.norm(points[-1], self.SPHERES)["w"]
        c = parts.c_grad["w"] + self.DECAY * r**2 * parts.c_l2["w"]
        np.testing.assert_allclose(c, r * m["w"], rtol=1e-11)
        image = so.analysis.image_step(points[-1], m, 1.0, self.ETA, self.SPHERES)
        projected = so.geometry.project(points[-1], {"w": c}, self.SPHERES)["w"]
        np.testing.assert_allclose(projected, image.direction["w"], atol=1e-12)
        # As it is written in [17], from directions and gradients on the unit sphere.
        written = 0.0
        for i, (x, g) in enumerate(zip(points, grads, strict=True)):
            ri = so.geometry.norm(x, self.SPHERES)["w"]
            written += self.MOMENTUM ** (len(points) - 1 - i) * (r / ri) * (ri * g["w"])
        np.testing.assert_allclose(parts.c_grad["w"], written, rtol=1e-11)

    def test_decomposition_of_nothing(self):
        with pytest.raises(ValueError, match="1 points and 0 gradients"):
            so.analysis.decompose_momentum([_tree(0)], [], 0.9, None)
        with pytest.raises(ValueError, match="give lists of trees"):
            so.analysis.decompose_momentum(_tree(0), _tree(1), 0.9, None)


class TestEquilibrium:
    """Predicted from random gradients, the walk that the predictions are made for."""

    D, G = 200, 0.7

    def _walk(self, tx, steps):
        rng = np.random.default_rng(0)
        noise = jnp.asarray(rng.normal(size=(steps, self.D, 20)))
        x = jnp.asarray(rng.normal(size=(self.D, 20)))
        sphere = so.Sphere()

        def body(carry, noise):
            x, state = carry
            tangent = so.geometry.project(x, noise, sphere)
            r = so.geometry.norm(x, sphere)
            g = tangent * self.G / (self.D**0.5 * r)
            updates, state = tx.update(g, state, x)
            step = so.analysis.measure_step(x, updates, sphere)
            return (x + updates, state), (step.angle, step.radius)

        _, (angles, radii) = jax.jit(lambda x: jax.lax.scan(body, (x, tx.init(x)), noise))(x)
        late = slice(steps // 2, None)
        rms = [float(jnp.sqrt(jnp.mean(y[late] ** 2))) for y in (angles, radii)]
        return rms

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_sgd(self, momentum):
        tx = so.sgd(0.1, momentum=momentum, weight_decay=0.02 * (1 - momentum) / (1 + momentum))
        decay = 0.02 * (1 - momentum) / (1 + momentum)
        angle, radius = self._walk(tx, 4000)
        predicted = so.analysis.sgd_equilibrium(0.1, decay, self.G, momentum)
        np.testing.assert_allclose(angle, predicted.angle, rtol=0.03)
        np.testing.assert_allclose(radius, predicted.radius, rtol=0.03)

    def test_adamw(self):
        tx = optax.adamw(0.01, b2=0.99, weight_decay=0.2)  # b2: so that v keeps up
        with jax.numpy_dtype_promotion("standard"):
            angle, radius = self._walk(tx, 4000)
        predicted = so.analysis.adamw_equilibrium(0.01, 0.2, self.D)
        np.testing.assert_allclose(angle, predicted.angle, rtol=0.03)
        np.testing.assert_allclose(radius, predicted.radius, rtol=0.03)
