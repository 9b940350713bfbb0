"""`so.track`: the true effective learning rate, [14] over whole runs, and what a state tells."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so

from ..compiling import usual_jit
from ..optimizers import SPHERES, TABLE, random_tree

SMALL = {"conv": (3, 3, 2, 4), "dense": (6, 4), "bias": (4,)}
ON = {"conv": so.Sphere(), "dense": so.Sphere((0,)), "bias": None}


@pytest.fixture
def promotion():
    """Optax's schedules and bias corrections mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _small(seed, dtype=jnp.float64):
    return random_tree(seed, SMALL, dtype)


def _rayleigh(seed):
    """A radially invariant loss of every group, with gradients that are tangential to rounding."""
    targets = _small(100 + seed)

    def loss(params):
        u = so.geometry.direction(params, ON)
        aligned = jax.tree.map(lambda a, b: jnp.sum(jnp.sin(3 * a) * b), u, targets)
        return sum(jax.tree.leaves(aligned))

    return jax.jit(jax.grad(loss))


@pytest.mark.usefixtures("x64", "promotion")
class TestEffectiveRate:
    """Against Theorem 2 with a and b worked out by hand."""

    ETA, B1, B2, EPS, MU, DECAY = 0.05, 0.8, 0.95, 1e-4, 0.7, 0.3

    def _adam(self, history, t, rate, grouped=False, decay=0.0):
        """a and b of Adam [9] after the gradients of a history."""
        m = v = jax.tree.map(jnp.zeros_like, history[0][1])
        for x, g in history:
            g = jax.tree.map(lambda g, x: g + decay * x, g, x)
            m = jax.tree.map(lambda m, g: self.B1 * m + (1 - self.B1) * g, m, g)
            v = jax.tree.map(lambda v, g: self.B2 * v + (1 - self.B2) * g * g, v, g)
        a = jax.tree.map(lambda m: m / (1 - self.B1), m)
        scale = (1 - self.B1**t) / (1 - self.B1)
        return (
            a,
            jax.tree.map(lambda v: scale * (jnp.sqrt(v / (1 - self.B2**t)) + self.EPS), v),
            rate,
        )

    def _sgd(self, history, t, rate):
        del t
        a = jax.tree.map(jnp.zeros_like, history[0][1])
        for x, g in history:
            a = jax.tree.map(lambda a, g, x: self.MU * a + g + self.DECAY * x, a, g, x)
        return a, 1.0, rate

    def _check(self, tx, by_hand, rate=None, leaves=("conv", "dense")):
        tx = so.track(tx, ON)
        grad, params, history = _rayleigh(0), _small(1), []
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(5):
            # Not tangential: the radial part has to be accounted for too.
            grads = jax.tree.map(lambda g, x: g + 0.1 * x, grad(params), params)
            history.append((params, grads))
            updates, state = update(grads, state, params)
            a, b, eta = by_hand(history, step + 1, rate(step) if rate else self.ETA)
            expected = so.analysis.image_step(params, a, b, eta, ON)
            measured = so.analysis.measure_step(params, updates, ON)
            for leaf in leaves:
                np.testing.assert_allclose(
                    optax.tree.get(state, "effective_lr")[leaf],
                    expected.effective_lr[leaf],
                    rtol=1e-6 if rate else 1e-8,  # Optax's schedules are in float32
                )
                np.testing.assert_allclose(state.angle[leaf], measured.angle[leaf], rtol=1e-8)
            params = optax.apply_updates(params, updates)
        return state

    def _optax_adam(self, rate=ETA, **kwargs):
        return optax.adam(rate, self.B1, self.B2, self.EPS, **kwargs)

    def test_adam(self):
        state = self._check(self._optax_adam(), self._adam)
        assert state.effective_lr["bias"] is None

    def test_adam_with_l2(self):
        tx = so.adam(self.ETA, None, self.B1, self.B2, self.EPS, weight_decay=self.DECAY)
        self._check(tx, lambda *args: self._adam(*args, decay=self.DECAY))

    def test_adamw(self):
        """A decoupled decay divides the rate by 1 - eta lambda."""

        def by_hand(history, t, rate):
            a, b, rate = self._adam(history, t, rate)
            return a, b, rate / (1 - rate * self.DECAY)

        tx = optax.adamw(self.ETA, self.B1, self.B2, self.EPS, weight_decay=self.DECAY)
        self._check(tx, by_hand)

    def test_sgd(self):
        l2 = optax.add_decayed_weights(self.DECAY)
        tx = optax.chain(l2, optax.sgd(self.ETA, momentum=self.MU))
        self._check(tx, self._sgd)
        self._check(so.sgd(self.ETA, momentum=self.MU, weight_decay=self.DECAY), self._sgd)

    def test_schedule_from_zero(self):
        schedule = optax.linear_schedule(0.0, self.ETA, 3)
        self._check(self._optax_adam(schedule), self._adam, lambda s: float(schedule(s)))

    def test_injected_hyperparameters(self):
        schedule = optax.exponential_decay(self.ETA, 2, 0.5)
        tx = optax.inject_hyperparams(optax.adam)(schedule, b1=self.B1, b2=self.B2, eps=self.EPS)
        self._check(tx, self._adam, lambda s: float(schedule(s)))

    def test_partition(self):
        parts = {"adam": self._optax_adam(), "lion": optax.lion(0.1)}
        tx = optax.partition(parts, {"conv": "adam", "dense": "lion", "bias": "adam"})
        tracked = so.track(tx, ON)
        # Lion's state may do anything, so nothing is known of the other part either.
        rates = optax.tree.get(tracked.init(_small(1)), "effective_lr")
        assert jax.tree.leaves(rates) == []
        parts = {"adam": self._optax_adam(), "sgd": optax.sgd(0.3)}
        tx = optax.partition(parts, {"conv": "adam", "dense": "sgd", "bias": "sgd"})
        self._check(tx, self._adam, leaves=("conv",))

    def test_accumulated_gradients(self):
        tx = so.track(optax.MultiSteps(optax.sgd(self.ETA), 2), ON)
        params, first, second = _small(1), _small(2), _small(3)
        state = tx.init(params)
        updates, state = tx.update(first, state, params)
        assert not np.any(state.angle["conv"])
        updates, state = tx.update(second, state, params)
        moved = so.analysis.measure_step(params, updates, ON)
        np.testing.assert_allclose(state.angle["conv"], moved.angle["conv"])

    @pytest.mark.parametrize("name", TABLE)
    def test_ours(self, name):
        """eta^e c_perp is the step that was made, with c_perp of the momentum in the state."""
        tx = so.track(TABLE[name](0.05, SPHERES, weight_decay=0.1), SPHERES)
        params = random_tree(1, dtype=jnp.float64)
        state, update = tx.init(params), jax.jit(tx.update)
        for seed in range(2, 6):
            grads = random_tree(seed, dtype=jnp.float64)
            updates, state = update(grads, state, params)
            before, params = params, optax.apply_updates(params, updates)
        if name in ("muonh", "rotational", "decoupled"):  # no a / b: no rate, or 0 at d = 1
            rates = jax.tree.leaves(state.effective_lr)
            assert not any(bool(jnp.any(rate != 0)) for rate in rates)
            assert state.effective_lr["conv"]["kernel"] is None
            return
        if TABLE[name].elementwise:
            return  # see test_adam_with_l2
        # Whatever is in the state is a, up to the 1 - b1 of an average.
        inner = [
            node
            for node in jax.tree.leaves(state.inner_state, is_leaf=_has_momentum)
            if _has_momentum(node)
        ]
        a, gain = grads, 1.0
        for node in inner:
            a, gain = (node.ema, 0.1) if hasattr(node, "ema") else (node.trace, 1.0)
        measured = so.analysis.measure_step(before, updates, SPHERES)
        image = so.analysis.image_step(
            before, jax.tree.map(lambda a: a / gain, a), 1.0, 1.0, SPHERES
        )
        steps = so.geometry.scale(image.direction, state.effective_lr, SPHERES)
        for (path, leaf), expected in zip(
            jax.tree.leaves_with_path(measured.velocity), jax.tree.leaves(steps), strict=True
        ):
            keys = "/".join(k.key for k in path)
            if keys not in ("conv/bias", "scalar", "one_row"):
                np.testing.assert_allclose(leaf, -expected, rtol=1e-7, atol=1e-12)


def _has_momentum(node):
    return isinstance(node, tuple) and (hasattr(node, "ema") or hasattr(node, "trace"))


@pytest.mark.usefixtures("x64", "promotion")
@pytest.mark.parametrize("every", [1, 10])
def test_equation_14_over_a_run(every):
    """From radius, angle and radial cosine of a step follows the radius of the next."""
    tx = so.track(optax.adamw(0.05, weight_decay=0.5), ON, every=every)
    grad, params = _rayleigh(0), _small(1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(60):
        measured = int(state.calls) % every == 0
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
        if measured:
            assert int(state.step) == int(state.calls)
            for leaf in ("conv", "dense"):
                r, theta = state.radius[leaf], state.angle[leaf]
                phi = jnp.arccos(state.radial_cosine[leaf])
                following = r * jnp.sin(phi) / jnp.sin(phi - theta)
                np.testing.assert_allclose(following, so.geometry.norm(params, ON)[leaf], rtol=1e-9)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize(
    "make", [lambda: optax.adam(0.1), lambda: optax.lion(0.1), lambda: so.adamsrt(0.1, ON)]
)
def test_every(make):
    """What is measured now and then is what is measured always; the rest stays as it was."""
    always, seldom = so.track(make(), ON), so.track(make(), ON, every=4)
    params = _small(0, jnp.float32)
    states = [tx.init(params) for tx in (always, seldom)]
    updates = [usual_jit(tx.update) for tx in (always, seldom)]
    last = None
    for call in range(1, 10):
        grads = _small(call, jnp.float32)
        (q, states[0]), (q2, states[1]) = (
            u(grads, s, params) for u, s in zip(updates, states, strict=True)
        )
        jax.tree.map(np.testing.assert_array_equal, q, q2)
        if call % 4 == 1:
            last = states[0]
        assert int(states[1].step) == int(last.calls)
        for name in ("radius", "angle", "effective_lr", "radial_cosine"):
            jax.tree.map(
                lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 2e-6),
                getattr(states[1], name),
                getattr(last, name),
            )
        params = optax.apply_updates(params, q)


@pytest.mark.usefixtures("promotion")
def test_compiled_without_being_seen_before():
    """What an optimizer is, is found while it is compiled: no call outside of jit has to come first."""
    tx = so.track(optax.adamw(0.1), ON, every=2)

    @jax.jit
    def both(params, grads):
        return tx.update(grads, tx.init(params), params)

    params, grads = _small(0, jnp.float32), _small(1, jnp.float32)
    _, state = both(params, grads)
    again = so.track(optax.adamw(0.1), ON, every=2)
    _, expected = again.update(grads, again.init(params), params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, 1e-5),
        state.effective_lr,
        expected.effective_lr,
    )
    assert state.effective_lr["conv"].shape == (1, 1, 1, 4)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_nnx(every):
    """In `nnx.Optimizer`, whose state is made of variables, and in the summary of its state."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    with jax.numpy_rank_promotion("allow"):
        model = Net(nnx.Rngs(0))
        spheres = so.spheres_where(nnx.state(model, nnx.Param), "linear/kernel")
        tx = so.track(optax.adam(0.1), spheres, every=every)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        inputs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(inputs) ** 3))(model))

        for _ in range(3):
            step(model, optimizer)
        found = so.analysis.summary(optimizer.opt_state)
    assert found["step"] == (3 if every == 1 else 1)
    assert set(found) == {"step"} | {
        f"{name}/linear/kernel" for name in ("radius", "angle", "effective_lr", "radial_cosine")
    }
    assert found["effective_lr/linear/kernel"] > 0


@pytest.mark.usefixtures("promotion")
def test_accumulation_around_which_a_period_would_miss_every_step():
    tx = so.track(optax.MultiSteps(optax.adam(0.1), 2), ON, every=2)
    params = _small(0, jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for call in range(1, 5):
        _, state = update(_small(call, jnp.float32), state, params)
    assert int(state.step) == 4
    assert float(jnp.min(state.angle["conv"])) > 0


class TestState:
    def test_size(self):
        params = {"w": jnp.ones((64, 64, 8)), "b": jnp.ones((8,))}
        spheres = {"w": so.Sphere(), "b": None}
        tx = so.track(so.sgd(0.1), spheres)
        sizes = [x.size for x in jax.tree.leaves(tx.init(params))]
        assert sum(sizes) == 4 * 8 + 3

    @pytest.mark.parametrize("reduce", [jnp.median, jnp.max])
    def test_reduce(self, reduce):
        params, grads = _small(0, jnp.float32), _small(1, jnp.float32)
        full, short = so.track(so.sgd(0.1), ON), so.track(so.sgd(0.1), ON, reduce=reduce)
        for run in (lambda f: f, jax.jit):
            _, state = run(full.update)(grads, full.init(params), params)
            _, reduced = run(short.update)(grads, short.init(params), params)
            for name in ("radius", "angle", "effective_lr", "radial_cosine"):
                values = getattr(reduced, name)
                assert values["bias"] is None
                assert values["conv"].shape == ()
                np.testing.assert_allclose(
                    values["conv"], reduce(getattr(state, name)["conv"]), rtol=1e-6
                )

    def test_names_are_unique_around_ours(self):
        for row in TABLE.values():
            state = so.track(row(0.1, SPHERES), SPHERES).init(random_tree(0))
            for name in ("radius", "angle", "effective_lr", "radial_cosine"):
                assert optax.tree.get(state, name) is not None
        state = so.track(so.retract(SPHERES, "initial"), SPHERES).init(random_tree(0))
        assert optax.tree.get(state, "radius")["layer"].shape == (1, 1)

    def test_map_params(self):
        """What is kept is not shaped like the parameters: their shardings are not for it."""
        tx = so.track(so.sgd(0.1, momentum=0.9), ON)
        params = _small(0, jnp.float32)
        state = tx.init(params)
        mapped = optax.tree.map_params(tx, lambda s, p: p, state, params)
        jax.tree.map(np.testing.assert_array_equal, mapped.radius, state.radius)
        trace = optax.tree.get(mapped.inner_state, "trace")
        jax.tree.map(np.testing.assert_array_equal, trace, params)

    def test_zero_filters_and_missing_updates(self):
        params = {"w": jnp.zeros((3, 2)), "frozen": jnp.ones((3, 2)), "gone": None}
        spheres = {"w": so.Sphere(), "frozen": so.Sphere(), "gone": None}
        grads = {"w": jnp.ones((3, 2)), "frozen": None, "gone": None}
        for tx in (so.sgd(0.1), so.adam(0.1), so.adamsrt(0.1, spheres)):
            for every in (1, 2):
                tracked = so.track(tx, spheres, every=every)
                updates, state = jax.jit(tracked.update)(grads, tracked.init(params), params)
                assert updates["frozen"] is None
                for name in ("radius", "angle", "effective_lr", "radial_cosine"):
                    for value in jax.tree.leaves(getattr(state, name)):
                        assert bool(jnp.all(jnp.isfinite(value)))
                assert not np.any(state.angle["frozen"])

    def test_explicit_sharding(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
            params = {"w": jax.device_put(np.eye(8, dtype=np.float32) + 1, over)}
            for every in (1, 2):
                tx = so.track(so.adam(0.1), so.Sphere(), every=every)
                state = tx.init(params)
                updates, after = jax.jit(tx.update)(params, state, params)
                assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
                assert jax.typeof(updates["w"]) == jax.typeof(params["w"])

    def test_bad_input(self):
        for every in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="positive integer"):
                so.track(so.sgd(0.1), ON, every=every)
        assert so.track(so.sgd(0.1), ON, every=np.int64(5))
        for no_optimizer in (ON, optax.adam, None):
            with pytest.raises(ValueError, match=r"^track: .* is no optimizer; write track\(optax"):
                so.track(no_optimizer, ON)
        with pytest.raises(ValueError, match="'median', not a function"):
            so.track(so.sgd(0.1), ON, reduce="median")
        params = _small(0, jnp.float32)
        tx = so.track(so.sgd(0.1), ON)
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(params, tx.init(params))
        with pytest.raises(ValueError, match=r"'conv' of shape \(3, 3, 2, 4\)"):
            so.track(so.sgd(0.1), {**ON, "conv": so.Sphere((7,))}).init(params)

    def test_going_on_from_an_untracked_state(self):
        params = _small(0, jnp.float32)
        plain = so.sgd(0.1, momentum=0.9)
        _, state = plain.update(params, plain.init(params), params)
        tx = so.track(plain, ON)
        with pytest.raises(
            ValueError, match=r"a tuple, not one of so.track; .*_replace\(inner_state"
        ):
            tx.update(params, state, params)
        updates, _ = tx.update(params, tx.init(params)._replace(inner_state=state), params)
        jax.tree.map(np.testing.assert_array_equal, updates, plain.update(params, state, params)[0])


def _bare_momentum(decay):
    """Heavy ball with a plain tree for a state."""

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(lambda m, g: decay * m + g, state, updates)
        return state, state

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def _cautious(updates, params):
    del params
    return jax.tree.map(
        lambda u: jnp.where(jnp.arange(u.size).reshape(u.shape) // 4 % 2, u, 0), updates
    )


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.adam(0.1), optax.clip(0.02)),
        optax.chain(optax.clip(0.1), optax.sgd(0.1)),
        optax.chain(optax.trace(0.9), optax.scale_by_sign(), optax.scale(-0.1)),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.nadam(0.1),
        optax.adam(0.1, eps_root=1.0),
        optax.chain(optax.adam(0.1), optax.adam(0.1)),
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.chain(_bare_momentum(0.9), optax.scale(-0.1)),
        optax.chain(optax.adam(0.1), _bare_momentum(0.9)),
        optax.chain(optax.adam(0.1), optax.stateless(_cautious)),
        optax.MultiSteps(optax.sgd(0.1), 2),
    ],
)
def test_never_pretends(tx, every):
    """What looks like Adam or SGD in its state, but does something else with it."""
    tracked = so.track(tx, ON, every=every)
    params = _small(0, jnp.float32)
    state, update = tracked.init(params), jax.jit(tracked.update)
    for seed in range(1, 5):
        updates, state = update(_small(seed, jnp.float32), state, params)
        before, params = params, optax.apply_updates(params, updates)
    rate = state.effective_lr["conv"]
    assert rate is None or bool(jnp.all(jnp.isnan(rate)))
    assert "effective_lr/conv" not in so.analysis.summary(state)
    if int(state.step) < 4:
        return
    measured = so.analysis.measure_step(before, updates, ON)
    np.testing.assert_allclose(state.angle["conv"], measured.angle["conv"], rtol=1e-3)


def _dict_adam(updates, state, params=None):
    del params
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], updates)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["v"], updates)
    return jax.tree.map(lambda m, v: -0.1 * m / (jnp.sqrt(v) + 1e-8), m, v), {"m": m, "v": v}


def _zeros(names):
    return lambda params: {name: jax.tree.map(jnp.zeros_like, params) for name in names}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamax(0.1),
        optax.radam(0.1),
        optax.adam(0.1, eps_root=1e-4),
        optax.adam(0.1, eps_root=1e-6),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.nadam(0.1),
        optax.GradientTransformation(_zeros("mv"), _dict_adam),
    ],
)
def test_not_from_the_direction_alone(tx):
    """One active coordinate: every update has the direction of the gradient, whatever its length."""
    tracked = so.track(tx, so.Sphere())
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 1)), jnp.float32)}
    grads = {"w": jnp.zeros((16, 1)).at[5].set(0.01)}
    state, update = tracked.init(params), jax.jit(tracked.update)
    for _ in range(3):
        _, state = update(grads, state, params)
        rate = state.effective_lr["w"]
        assert rate is None or bool(jnp.isnan(rate).all())


@pytest.mark.usefixtures("promotion")
def test_steps_that_are_not_finite():
    """They have moved, to nowhere: not 0, and the period is kept."""
    params = _small(0, jnp.float32)
    tx = so.track(optax.adam(0.1), ON, every=3)
    state, update = tx.init(params), jax.jit(tx.update)
    steps = []
    for _ in range(4):
        _, state = update(jax.tree.map(lambda x: x * jnp.nan, params), state, params)
        steps.append(int(state.step))
        for name in ("angle", "effective_lr", "radial_cosine"):
            assert np.isnan(getattr(state, name)["conv"]).all()
    assert steps == [1, 1, 1, 4]


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_nearly_radial_updates(ratio):
    """Little is tangential, and all of its digits are there."""
    x, t = np.random.default_rng(0).normal(size=(2, 64, 1))
    t -= x * (x * t).sum() / (x * x).sum()
    t *= np.linalg.norm(x) / np.linalg.norm(t)
    params = {"w": jnp.asarray(x, jnp.float32)}
    grads = {"w": jnp.asarray(0.5 * x + 0.5 * ratio * t, jnp.float32)}
    tx = so.track(optax.sgd(1.0), so.Sphere())
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.angle["w"], np.arctan(ratio), 1e-6 / ratio)
    np.testing.assert_allclose(state.effective_lr["w"], 2 / (x * x).sum(), 1e-6 / ratio)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_parameters_that_vary_over_devices(every):
    tx = so.track(optax.sgd(0.1), so.Sphere(), every=every)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(x):
        params = {"w": x}
        state = tx.init(params)

        def body(carry, _):
            turned = {"w": carry[0]["w"][::-1] * jnp.array([[1.0], [-1.0]])}
            updates, state = tx.update(turned, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, state), None, length=3)[0][1].radius["w"]

    spec = jax.sharding.PartitionSpec("x")
    x = jnp.arange(1.0, 17.0).reshape(16, 1)
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    measured_at = {1: 2, 3: 0}[every]
    start = np.linalg.norm(np.arange(1.0, 17.0).reshape(8, 2), axis=1)
    expected = start * 1.01 ** (measured_at / 2)
    np.testing.assert_allclose(found[:, 0], expected, 1e-5)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_what_init_and_update_look_at(every):
    """Values in `init`, numbers of Python in the state: no rate then, and nothing else changes."""
    scaled = optax.GradientTransformation(
        lambda params: {"most": float(jnp.abs(params["conv"]).max())},
        lambda u, s, p=None: (jax.tree.map(lambda g: -0.1 * g, u), s),
    )
    first = optax.GradientTransformation(
        lambda params: {"first": True},
        lambda u, s, p=None: (
            jax.tree.map(lambda g: -0.1 * g if s["first"] else -g, u),
            {"first": False},
        ),
    )
    params = _small(0, jnp.float32)
    tx = so.track(scaled, ON, every=every)
    state = tx.init(params)
    assert state.effective_lr["conv"] is None
    assert float(tx.update(params, state, params)[1].angle["conv"].max()) < 1e-3

    def twice(params):
        tx = so.track(first, ON, every=every)
        updates, state = tx.update(params, tx.init(params), params)
        return updates, tx.update(params, state, params)[0]

    for updates, scale in zip(jax.jit(twice)(params), (-0.1, -1.0), strict=True):
        np.testing.assert_allclose(updates["conv"], scale * params["conv"], 1e-6)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_state_of_other_spheres(every):
    params = _small(0, jnp.float32)
    state = so.track(optax.sgd(0.1), ON).init(params)
    tx = so.track(optax.sgd(0.1), {**ON, "conv": so.Sphere(())}, every=every)
    with pytest.raises(
        ValueError, match=r"^track: 'conv' has radii of shape \(1, 1, 1, 4\) in the"
    ):
        tx.update(params, state, params)
    tx = so.track(optax.sgd(0.1), {**ON, "conv": None}, every=every)
    with pytest.raises(ValueError, match="has 2 parameters on spheres, not the 1 that"):
        tx.update(params, state, params)


@pytest.mark.usefixtures("promotion")
def test_rates_of_each_leaf():
    """What scales the leaves of one Adam differently, by size or mask, is in their rates."""

    def per_leaf(updates, params):
        del params
        return jax.tree.map(lambda u: u / u.size, updates)

    params, grads = _small(0, jnp.float32), _small(1, jnp.float32)
    plain = so.track(optax.adam(0.1), ON)
    scaled = so.track(optax.chain(optax.adam(0.1), optax.stateless(per_leaf)), ON)
    _, expected = plain.update(grads, plain.init(params), params)
    _, state = scaled.update(grads, scaled.init(params), params)
    for leaf in ("conv", "dense"):
        np.testing.assert_allclose(
            state.effective_lr[leaf] * params[leaf].size / expected.effective_lr[leaf], 1.0, 0.1
        )
    labels = lambda tree: jax.tree.map(lambda x: "a" if x.size > 50 else "b", tree)  # noqa: E731
    tx = so.track(optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels), ON)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.leaves(state.effective_lr) == []
    assert float(jnp.min(state.angle["conv"])) > 0


class TestSummary:
    def _state(self, tx=None):
        tracked = so.track(so.sgd(0.1) if tx is None else tx, ON)
        params = _small(0, jnp.float32)
        return tracked.update(_small(1, jnp.float32), tracked.init(params), params)[1]

    def test_plain_floats(self):
        state = self._state()
        found = so.analysis.summary(state)
        assert found["step"] == 1
        assert all(type(value) is float for value in found.values())
        assert found["angle/conv"] == pytest.approx(float(jnp.median(state.angle["conv"])))
        assert set(found) == {"step"} | {
            f"{q}/{leaf}"
            for q in ("radius", "angle", "effective_lr", "radial_cosine")
            for leaf in ("conv", "dense")
        }
        largest = so.analysis.summary(state, reduce=np.max)
        assert largest["angle/conv"] == pytest.approx(float(jnp.max(state.angle["conv"])))

    @pytest.mark.usefixtures("promotion")
    def test_unknown_rate_is_absent(self):
        found = so.analysis.summary(self._state(optax.lion(0.1)))
        assert "angle/conv" in found
        assert not any(name.startswith("effective_lr") for name in found)

    @pytest.mark.usefixtures("promotion")
    def test_is_found_within(self):
        params = _small(0, jnp.float32)
        tx = optax.MultiSteps(so.track(so.sgd(0.1), ON), 2)
        assert so.analysis.summary(tx.init(params))["step"] == 0
        with pytest.raises(ValueError, match="no TrackState in dict"):
            so.analysis.summary({"a": params})
        with pytest.raises(ValueError, match="2 TrackStates"):
            so.analysis.summary([self._state(), self._state()])

    @pytest.mark.usefixtures("promotion")
    def test_one_run_of_several(self):
        seeds = jax.tree.map(lambda *x: jnp.stack(x), self._state(), self._state())
        with pytest.raises(ValueError, match=r"of \(2,\) runs, of jax.vmap; take one"):
            so.analysis.summary(seeds)
        one = jax.tree.map(lambda x: x[0], seeds)
        assert so.analysis.summary(one) == so.analysis.summary(self._state())

    def test_writers(self, tmp_path):
        tensorboard = pytest.importorskip("tensorboardX")
        state = self._state()

        class Clu:
            def write_scalars(self, step, scalars):
                self.written = step, scalars

        clu = Clu()
        so.analysis.write_summary(clu, state, prefix="run")
        assert clu.written[0] == 1
        assert "run/radius/conv" in clu.written[1]
        with tensorboard.SummaryWriter(str(tmp_path / "a")) as writer:
            so.analysis.write_summary(writer, state)
        so.analysis.write_summary(tmp_path / "b", state)
        for folder in ("a", "b"):
            events = list((tmp_path / folder).glob("events.*"))
            assert events
            assert b"spheres/angle/conv" in events[0].read_bytes()
        with pytest.raises(TypeError, match="add_scalar"):
            so.analysis.write_summary(3, state)

    @pytest.mark.usefixtures("promotion")
    def test_table(self):
        console = pytest.importorskip("rich.console").Console(
            width=160, record=True, file=io.StringIO()
        )
        console.print(so.analysis.summary_table(self._state(optax.lion(0.1))))
        text = console.export_text()
        assert "conv" in text
        assert "unknown" in text
        assert "angle, rad" in text


def test_scalar_and_empty_parameters():
    """A moment that is one number, in another precision than where it is tried; no number at all."""
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "s": jnp.ones((), jnp.bfloat16)}
    spheres = {"w": so.Sphere(), "s": None}
    _tracked_is_untracked(optax.sgd(0.1, momentum=0.9), params, spheres)
    params = {"w": jnp.ones((3, 2)), "e": jnp.zeros((0, 3))}
    with jax.debug_nans(True):
        _tracked_is_untracked(so.adamsrt(0.1, so.Sphere()), params, so.Sphere())


def _tracked_is_untracked(tx, params, spheres):
    tracked = so.track(tx, spheres)
    expected, _ = tx.update(params, tx.init(params), params)
    actual, _ = tracked.update(params, tracked.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


DECAYED = {
    "adamw": optax.adamw(1e-2, weight_decay=1e-4),
    "sgd": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9)),
    "adamsrt": so.adamsrt(1e-2, so.Sphere(), weight_decay=1e-4),
    "sgd_mrt": so.sgd_mrt(1e-2, so.Sphere(), weight_decay=1e-4),
}


class TestDeadFilters:
    """A filter without a gradient, which weight decay moves along its radius alone."""

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("inner", DECAYED.values(), ids=DECAYED)
    @pytest.mark.usefixtures("standard_promotion")
    def test_the_others_keep_their_rates(self, inner, dtype):
        tx = so.track(inner, so.Sphere())
        params = {"kernel": random_tree(0, {"kernel": (3, 3, 4, 8)}, dtype)["kernel"]}
        with jax.debug_nans(True):
            state = tx.init(params)
            for seed in range(1, 4):
                grads = random_tree(seed, {"kernel": (3, 3, 4, 8)}, dtype)["kernel"]
                grads = {"kernel": grads.at[..., 0].set(0)}
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
        rates = np.asarray(state.effective_lr["kernel"], float).ravel()
        assert rates[0] == 0
        assert (rates[1:] > 0).all()
        assert so.analysis.summary(state)["effective_lr/kernel"] == np.median(rates)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, 0.9, nesterov=True),
        optax.chain(optax.adamw(1e-3), optax.clip(1e-4)),
        optax.adam(1e-3, eps_root=1e-4),
        optax.adamax(1e-3),
        optax.nadam(1e-3),
    ],
    ids=["nesterov", "clip by value", "eps_root", "adamax", "nadam"],
)
def test_no_nan_for_a_step_that_is_no_quotient(tx):
    """The rate is absent: the first update on the tiny tree shows it."""
    tracked, params = so.track(tx, so.Sphere()), {"w": jnp.ones((4, 3))}
    with jax.debug_nans(True):
        state = tracked.init(params)
        assert state.effective_lr == {"w": None}
        for seed in range(2):
            grads = random_tree(seed, {"w": (4, 3)})
            _, state = jax.jit(tracked.update)(grads, state, params)
    assert "effective_lr/w" not in so.analysis.summary(state)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("every", [1, 2])
def test_eager_vmap_over_learning_rates(every):
    params, rates = {"w": jnp.arange(12.0).reshape(4, 3) + 1}, jnp.array([0.1, 0.2])

    def run(rate):
        tx = so.track(optax.sgd(rate), so.Sphere(), every=every)
        x, state = params, tx.init(params)
        for seed in range(3):
            updates, state = tx.update(random_tree(seed, {"w": (4, 3)}), state, x)
            x = optax.apply_updates(x, updates)
        return state.angle["w"]

    together = jax.vmap(run)(rates)
    np.testing.assert_allclose(together, jnp.stack([run(rate) for rate in rates]), 1e-5)


def test_reduce_has_to_be_traceable():
    with pytest.raises(ValueError, match=r"which JAX cannot trace; take jnp.median, not np.median"):
        so.track(optax.sgd(0.1), so.Sphere(), reduce=np.median)
