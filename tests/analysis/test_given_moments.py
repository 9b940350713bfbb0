"""`so.track` with moments that a state declares, and with b1 and eps that the user gives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from spherical_optax._core.moments import Moments

from ..optimizers import random_tree

pytestmark = pytest.mark.usefixtures("standard_promotion")

SPHERES = {"conv": so.Sphere(), "dense": so.Sphere((0,)), "bias": None}
B1, B2, EPS = 0.8, 0.95, 1e-4


def _random(seed):
    return random_tree(seed, {"conv": (3, 3, 2, 4), "dense": (6, 4), "bias": (4,)})


def _adam(rate=0.05):
    return optax.adam(rate, B1, B2, EPS)


def _run(tx, steps=3, **extra):
    """The last parameters, updates and state."""
    params = _random(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, steps + 1):
        before = params
        updates, state = update(_random(seed), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return before, updates, state


def _get_rate(tx, leaf="conv", extra=None, **kwargs):
    """The effective learning rates of a leaf after three steps."""
    return _run(so.track(tx, SPHERES, **kwargs), **(extra or {}))[2].effective_lr[leaf]


class AdamState(NamedTuple):
    """A state as a user writes it, with a field that holds no moment, and one with another state."""

    MOMENTS = Moments(average="m", square="v")

    m: Any
    v: Any
    steps: Any
    schedule: optax.OptState


class SumState(NamedTuple):
    MOMENTS = Moments(sum="total")

    total: Any


class WrongState(NamedTuple):
    MOMENTS = Moments(average="mu")

    m: Any


class CachedState(NamedTuple):
    """Declares its moment, and has an array as large as the parameters beside it."""

    MOMENTS = Moments(average="m")

    m: Any
    last: Any


def _zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def _declared_adam(schedule):
    """Adam without bias correction."""

    def init(params):
        return AdamState(_zeros(params), _zeros(params), jnp.zeros([]), schedule.init(params))

    def update(grads, state, params=None):
        m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, state.v, grads)
        step = jax.tree.map(lambda m, v: -m / (jnp.sqrt(v) + EPS), m, v)
        step, inner = schedule.update(step, state.schedule, params)
        return step, AdamState(m, v, state.steps + 1, inner)

    return optax.GradientTransformation(init, update)


def _declared_sgd(decay=0.9):
    def update(grads, state, params=None):
        del params
        total = jax.tree.map(lambda m, g: decay * m + g, state.total, grads)
        return jax.tree.map(lambda m: -0.1 * m, total), SumState(total)

    return optax.GradientTransformation(lambda params: SumState(_zeros(params)), update)


def _with_cache(state_class):
    def update(grads, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.m, grads)
        return jax.tree.map(lambda m: -0.1 * m, m), state_class(m, *state[1:-1], grads)

    return optax.GradientTransformation(
        lambda params: state_class(_zeros(params), _zeros(params)), update
    )


def _bare_rms():
    """A denominator per coordinate whose state is a tree of arrays."""

    def update(grads, state, params=None):
        del params
        v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, state, grads)
        return jax.tree.map(lambda v: jnp.sqrt(v) + EPS, v), v

    return optax.GradientTransformation(_zeros, update)


class TestDeclaredMoments:
    @pytest.mark.parametrize("inner", ["schedule", "nothing"])
    def test_average_and_square(self, inner):
        constant = optax.scale_by_schedule(lambda _: 0.05)
        tx = so.track(
            _declared_adam(constant if inner == "schedule" else optax.scale(0.05)), SPHERES
        )
        x, updates, state = _run(tx)
        m, v = state.inner_state.m, state.inner_state.v
        a = jax.tree.map(lambda m: m / (1 - B1), m)
        b = jax.tree.map(lambda v: (jnp.sqrt(v) + EPS) / (1 - B1), v)
        expected = so.analysis.image_step(x, a, b, 0.05, SPHERES)
        for leaf in ("conv", "dense"):
            np.testing.assert_allclose(state.effective_lr[leaf], expected.effective_lr[leaf], 1e-3)
        measured = so.analysis.measure_step(x, updates, SPHERES)
        np.testing.assert_allclose(state.angle["conv"], measured.angle["conv"], 1e-4)

    def test_sum(self):
        expected = _get_rate(optax.sgd(0.1, momentum=0.9))
        np.testing.assert_allclose(_get_rate(_declared_sgd()), expected, 1e-4)

    def test_a_second_momentum_is_not_understood(self):
        assert _get_rate(optax.chain(_declared_sgd(), optax.trace(0.5))) is None

    def test_a_name_of_no_field(self):
        tx = optax.GradientTransformation(
            lambda params: WrongState(_zeros(params)), lambda g, state, _=None: (g, state)
        )
        with pytest.raises(
            ValueError, match=r"^track: MOMENTS of WrongState .* 'mu', .* fields m$"
        ):
            so.track(tx, SPHERES).init(_random(0))

    def test_large_arrays_beside_the_moments(self):
        """They may be a moment of an inner transformation; b1 and eps say that they are none."""
        tx = _with_cache(CachedState)
        assert _get_rate(tx) is None
        rate = _get_rate(tx, b1=B1, eps=0.0)
        x, _, state = _run(so.track(tx, SPHERES, b1=B1, eps=0.0))
        a = jax.tree.map(lambda m: m / (1 - B1), state.inner_state.m)
        expected = so.analysis.image_step(x, a, 1.0, 0.1 * (1 - B1), SPHERES)
        np.testing.assert_allclose(rate, expected.effective_lr["conv"], 1e-3)

    @pytest.mark.parametrize("make", [so.adamst, so.adamg, so.sgd_mrt])
    def test_an_optimizer_on_finer_spheres(self, make):
        """Its arrays of one number per group are then larger than those of `track`."""
        tx = make(0.1, {"conv": so.Sphere((1, 2, 3)), "dense": so.Sphere((0,)), "bias": None})
        assert _get_rate(tx, "dense") is not None
        spheres = {"conv": None, "dense": so.Sphere(()), "bias": None}
        assert _run(so.track(tx, spheres))[2].effective_lr["dense"] is not None

    def test_bare_state_in_a_quotient(self):
        """Its state could be anything, also where one active coordinate hides that in the direction."""
        quotient = so.quotient(so.ema(0.9), _bare_rms())
        tx = optax.chain(quotient, optax.scale(-0.1))
        assert _get_rate(tx) is None


# The tiny tree is no place for these: its steps are long, and clipped; it has no loss to hand over.
NEED_HELP = {
    "a clip that is never reached": (optax.chain(_adam(), optax.clip(0.3)), {}),
    "a state of another class": (optax.apply_if_finite(_adam(), 3), {}),
    "the loss": (
        optax.chain(_adam(), optax.contrib.reduce_on_plateau()),
        {"value": jnp.float32(1.0)},
    ),
}


class TestGivenNumbers:
    @pytest.mark.parametrize("name", NEED_HELP)
    @pytest.mark.parametrize("every", [1, 2])
    def test_where_the_fit_fails(self, name, every):
        tx, extra = NEED_HELP[name]
        missing = _get_rate(tx, every=every, extra=extra)
        assert missing is None or bool(jnp.isnan(missing).all())
        rate = _get_rate(tx, every=every, b1=B1, eps=EPS, extra=extra)
        np.testing.assert_allclose(rate, _get_rate(_adam(), every=every), 1e-3)

    @pytest.mark.parametrize(
        "given", [{"b1": B1}, {"eps": EPS}, {"b1": np.float32(B1), "eps": jnp.float32(EPS)}]
    )
    def test_the_same_as_fitted(self, given):
        np.testing.assert_allclose(_get_rate(_adam(), **given), _get_rate(_adam()), 1e-3)
        clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
        np.testing.assert_allclose(_get_rate(clipped, **given), _get_rate(clipped), 1e-4)

    @pytest.mark.parametrize("given", [{"b1": 0.6}, {"b1": 0.6, "eps": EPS}])
    def test_the_rate_is_proportional_to_one_minus_b1(self, given):
        """No direction tells a wrong b1, which only scales a."""
        expected = _get_rate(_adam()) * (1 - 0.6) / (1 - B1)
        np.testing.assert_allclose(_get_rate(_adam(), **given), expected, 1e-3)

    @pytest.mark.parametrize("given", [{"eps": 1.0}, {"b1": B1, "eps": 1.0}])
    def test_a_wrong_eps_gives_nan(self, given):
        for leaf in ("conv", "dense"):
            assert bool(jnp.isnan(_get_rate(_adam(), leaf, **given)).all())

    @pytest.mark.parametrize(
        "tx",
        [
            optax.sgd(0.1, momentum=0.9, nesterov=True),
            optax.chain(optax.adam(0.1), optax.clip(0.02)),
            optax.nadam(0.1),
            optax.lion(0.1),
            optax.adam(0.1, eps_root=1.0),
            optax.chain(optax.adam(0.1), _bare_rms()),
            optax.contrib.muon(0.1),
            optax.GradientTransformation(_zeros, _bare_rms().update),
        ],
    )
    def test_never_pretends(self, tx):
        """What is no step along a / b has no rate, whatever b1 and eps are said to be."""
        rate = _get_rate(tx, b1=0.9, eps=1e-8)
        assert rate is None or bool(jnp.isnan(rate).all())

    @pytest.mark.parametrize("b1", [-0.1, 1.0, 1, np.nan, "0.9", True, (0.9,), jnp.ones(2), 0.9j])
    def test_no_b1(self, b1):
        with pytest.raises(ValueError, match=r"^track: b1 is .*, not a number from 0 to below 1$"):
            so.track(_adam(), SPHERES, b1=b1)

    @pytest.mark.parametrize("eps", [-1e-8, np.inf, np.nan, "small", False, lambda _: 1e-8])
    def test_no_eps(self, eps):
        with pytest.raises(ValueError, match=r"^track: eps is .*, not a number of at least 0$"):
            so.track(_adam(), SPHERES, eps=eps)

    def test_traced_numbers(self):
        with pytest.raises(ValueError, match=r"^track: b1 is .*, not a number"):
            jax.jit(lambda b1: so.track(_adam(), SPHERES, b1=b1).init(_random(0)))(0.9)
