"""ema, trace, rms and quotient, each alone: plain they are Optax's, on spheres the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .golden import reference
from .optimizers import SPHERES, random_tree

SHAPE = (4, 3)  # three filters
FILTERS = {"w": so.Sphere()}


def _columns(seed):
    return np.random.default_rng(seed).normal(size=SHAPE)


def _tree(columns, dtype=None):
    return {"w": jnp.asarray(columns, dtype)}


def _assert_close(actual, expected, **tolerances):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerances), actual, expected)


@pytest.mark.usefixtures("standard_promotion")
class TestPlain:
    """Without spheres, and off the spheres."""

    @pytest.mark.parametrize("spheres", [None, jax.tree.map(lambda _: None, SPHERES)])
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (lambda s: so.ema(0.9, s), optax.ema(0.9)),
            (lambda s: so.ema(0.9, s, debias=False), optax.ema(0.9, debias=False)),
            (lambda s: so.ema(0.9, s, transport=True, rescale=True), optax.ema(0.9)),
            (lambda s: so.trace(0.9, s), optax.trace(0.9)),
            (lambda s: so.trace(0.9, s, transport=True, rescale=True), optax.trace(0.9)),
            (
                lambda s: so.quotient(so.ema(0.9, s), so.rms(0.99, 1e-3, s)),
                optax.scale_by_adam(0.9, 0.99, 1e-3),
            ),
            (
                lambda s: so.quotient(so.ema(0.9, s), so.rms(0.99, 1e-3, s, rescale=True)),
                optax.scale_by_adam(0.9, 0.99, 1e-3),
            ),
        ],
        ids=["ema", "no debias", "transport", "trace", "moved trace", "adam", "rescaled adam"],
    )
    def test_is_optax(self, ours, theirs, spheres):
        ours, params = ours(spheres), random_tree(0)
        our_state, their_state = ours.init(params), theirs.init(params)
        for seed in (1, 2, 3):
            params, grads = random_tree(10 + seed), random_tree(seed)
            actual, our_state = ours.update(grads, our_state, params)
            expected, their_state = theirs.update(grads, their_state, params)
            _assert_close(actual, expected, rtol=1e-6)

    def test_rms_is_the_denominator(self):
        tx, grads = so.rms(0.9, 1e-3), [random_tree(1), random_tree(2)]
        state = tx.init(grads[0])
        for g in grads:
            denominator, state = tx.update(g, state)
        squares = jax.tree.map(lambda a, b: (0.09 * a**2 + 0.1 * b**2) / (1 - 0.81), *grads)
        _assert_close(denominator, jax.tree.map(lambda v: jnp.sqrt(v) + 1e-3, squares), rtol=1e-6)

    def test_accumulator_dtype(self):
        for make in (so.ema, so.trace):
            tx = make(0.9, accumulator_dtype=jnp.bfloat16)
            state = tx.init(random_tree(0))
            assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(state)}
            updates, after = tx.update(random_tree(1), state)
            assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("x64")
class TestRms:
    @pytest.mark.parametrize("reduce", ["mean", "sum"])
    def test_is_one_number_per_group(self, reduce):
        tx = so.rms(0.9, 1e-3, FILTERS, reduce=reduce)
        grads = [_columns(1), _columns(2)]
        state = tx.init(_tree(grads[0]))
        for g in grads:
            denominator, state = tx.update(_tree(g), state)
        squares = [(g**2).mean(0) * (1 if reduce == "mean" else 4) for g in grads]
        expected = np.sqrt((0.09 * squares[0] + 0.1 * squares[1]) / (1 - 0.81)) + 1e-3
        np.testing.assert_allclose(denominator["w"], np.tile(expected, (4, 1)), rtol=1e-12)

    def test_mean_is_the_default_of_eq_20(self):
        grads = _tree(_columns(1))
        outputs = []
        for tx in (so.rms(0.9, 1e-8, FILTERS), so.rms(0.9, 1e-8, FILTERS, reduce="mean")):
            outputs.append(tx.update(grads, tx.init(grads))[0])
        _assert_close(*outputs, rtol=0)

    def test_rescale_follows_the_radius(self):
        tx = so.rms(0.9, 0.0, FILTERS, rescale=True)
        x, g = _columns(0), [_columns(1), _columns(2), _columns(3)]
        points = [x, 2.0 * x, 2.0 * x * np.array([1.0, 0.1, 30.0])]
        state, v = tx.init(_tree(x)), 0.0
        for k, (point, grads) in enumerate(zip(points, g, strict=True)):
            denominator, state = tx.update(_tree(grads), state, _tree(point))
            before = points[max(k - 1, 0)]
            ratio = np.linalg.norm(before, axis=0) / np.linalg.norm(point, axis=0)
            v = 0.9 * ratio**2 * v + 0.1 * (grads**2).mean(0)
            expected = np.sqrt(v / (1 - 0.9 ** (k + 1)))
            np.testing.assert_allclose(denominator["w"][0], expected, rtol=1e-12)

    def test_rescale_of_groups_that_are_zero(self):
        """A group of radius zero starts anew, and later its average counts for nothing."""
        tx = so.rms(0.9, 0.0, FILTERS, rescale=True)
        unit = _columns(0) / np.linalg.norm(_columns(0), axis=0)
        radii = np.array([[0.0, 9.0, 0.0], [0.0, 0.0, 2.0], [3.0, 0.0, 2.0], [6.0, 5.0, 2.0]])
        state, v, before = tx.init(_tree(unit)), np.zeros(3), np.ones(3)
        for k, radius in enumerate(radii):
            grads = _columns(k + 1) * [1.0, 1.0, k > 0]  # the third has none at first
            denominator, state = tx.update(_tree(grads), state, _tree(radius * unit))
            ratio = np.divide(before, radius, out=np.zeros(3), where=radius > 0)
            v = 0.9 * ratio**2 * v + 0.1 * (grads**2).mean(0)
            expected = np.sqrt(v / (1 - 0.9 ** (k + 1)))
            np.testing.assert_allclose(denominator["w"][0], expected, rtol=1e-12)
            before = radius

    def test_negative_second_moments_of_earlier_versions(self):
        """They stood for groups of radius zero, which now keep nothing."""
        tx, x, g = so.rms(0.9, 0.0, FILTERS, rescale=True), _columns(0), _columns(1)
        state = tx.init(_tree(x))
        restored = state._replace(nu={"w": jnp.asarray([[-3.0, -0.0, -1e9]])})
        expected, _ = tx.update(_tree(g), state, _tree(x))
        actual, after = tx.update(_tree(g), restored, _tree(x))
        np.testing.assert_array_equal(actual["w"], expected["w"])
        assert np.all(after.nu["w"] > 0)

    def test_rescale_of_what_is_not_finite(self):
        """As without: it stays to be seen."""
        tx, x = so.rms(0.9, 1e-8, FILTERS, rescale=True), _tree(5.0 * _columns(0))
        state = tx.init(x)
        for broken in (np.inf, 1.0):
            grads = _columns(1)
            grads[0, 1] *= broken
            denominator, state = tx.update(_tree(grads), state, x)
            assert np.isinf(denominator["w"][:, 1]).all()
            assert np.isfinite(denominator["w"][:, ::2]).all()

    @pytest.mark.parametrize("length", [0.0, 1e-170])
    def test_nothing_to_divide_by(self, length):
        """Neither eps nor, to working precision, a gradient: no step."""
        for make in (so.adams, so.adamsrt):
            tx, x = make(0.1, FILTERS, eps=0.0), _tree(_columns(0))
            updates, _ = tx.update(_tree(length * _columns(1)), tx.init(x), x)
            np.testing.assert_array_equal(updates["w"], 0.0)

    def test_rescale_where_the_square_overflows(self):
        """Weight decay alone, at a radius whose fourth power is no float32."""
        tx = so.adamsrt(0.1, FILTERS, weight_decay=0.1)
        x = _tree(1e15 * _columns(0), jnp.float32)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.isfinite(leaf).all()
        assert np.all(np.abs(updates["w"]) < np.abs(x["w"]))

    def test_state_is_per_group(self):
        state = so.rms(0.9, 1e-8, SPHERES, rescale=True).init(random_tree(0))
        assert {(1, 1, 1, 4), (1, 2), (2,), (1, 2, 1), (1, 1)} <= {
            leaf.shape for leaf in jax.tree.leaves(state)
        }
        assert (3, 3, 2, 4) not in {leaf.shape for leaf in jax.tree.leaves(state)}

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("make", [so.adam, so.adamsrt, so.adamp, so.adamh, so.muonh])
    def test_complex_numbers_off_the_spheres(self, make):
        """|g|^2 as in Optax, not g^2."""
        x = {"z": jnp.array([1 + 1j, 2.0]), "w": jnp.asarray(_columns(0))}
        tx, expected = make(0.1, {"z": None, "w": so.Sphere()}), optax.adam(0.1)
        state, other = tx.init(x), expected.init(x)
        for g in (jnp.array([3j, 1 + 1j]), jnp.array([1.0, -2j])):
            grads = {"z": g, "w": x["w"]}
            updates, state = tx.update(grads, state, x)
            theirs, other = expected.update(grads, other, x)
            np.testing.assert_allclose(updates["z"], theirs["z"], rtol=1e-6)

    def test_unknown_reduction(self):
        with pytest.raises(ValueError, match="median"):
            so.rms(0.9, 1e-8, FILTERS, reduce="median").init(_tree(_columns(0)))


def _transported(before, after, vectors):
    """Column by column, explicitly."""
    columns = [
        reference.transport(x / np.linalg.norm(x), y / np.linalg.norm(y), v)
        for x, y, v in zip(before.T, after.T, vectors.T, strict=True)
    ]
    return np.stack(columns, axis=1)


# The step y = a x - s m with one s per group, and whether y is then brought to the unit sphere.
S = np.array([0.3, 0.1, 2.0])
MOVES = {
    "a step": (1.0, S, False),
    "a step back": (1.0, -S, False),
    "decoupled decay": (0.7, S, False),
    "growth": (1.5, S, False),
    "retraction": (1.0, S, True),
    "decay and retraction": (0.7, S, True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", ["ema", "trace"])
def test_transport_is_that_of_the_paper(kind, move, rescale):
    """m <- (r / ||y||) Gamma(m), without the ratio if rescale is off; m has radial parts here.

    What stands for Gamma and the ratio is one projection. A factor a before x (decoupled decay) then
    stands before the ratio as well, and a retraction after y changes nothing.
    """
    if kind == "ema":
        tx, old, new = so.ema(0.9, FILTERS, transport=True, rescale=rescale, debias=False), 0.9, 0.1
    else:
        tx, old, new = so.trace(0.9, FILTERS, transport=True, rescale=rescale), 0.9, 1.0
    a, s, retract = MOVES[move]
    x, m = _columns(0), np.zeros(SHAPE)
    state, before, factor = tx.init(_tree(x)), x, 1.0
    for seed in range(1, 6):
        g = _columns(seed)
        output, state = tx.update(_tree(g), state, _tree(x))
        m = old * factor * _transported(before, x, m) + new * g
        np.testing.assert_allclose(output["w"], m, rtol=1e-9, atol=1e-12)
        before, y = x, a * x - s * m
        if rescale:
            factor = a * np.linalg.norm(x, axis=0) / np.linalg.norm(y, axis=0)
        x = y / np.linalg.norm(y, axis=0) if retract else y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["ema", "trace"])
def test_rescaling_alone(kind):
    """Without transport only the ratio of the radii is left, wherever the point went."""
    make, new = (so.ema, 0.1) if kind == "ema" else (so.trace, 1.0)
    tx = make(0.9, FILTERS, rescale=True, **({"debias": False} if kind == "ema" else {}))
    points, m = [_columns(seed) for seed in range(4)], np.zeros(SHAPE)
    state = tx.init(_tree(points[0]))
    for k, point in enumerate(points):
        g = _columns(10 + k)
        output, state = tx.update(_tree(g), state, _tree(point))
        ratio = np.linalg.norm(points[max(k - 1, 0)], axis=0) / np.linalg.norm(point, axis=0)
        m = 0.9 * ratio * m + new * g
        np.testing.assert_allclose(output["w"], m, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: so.ema(0.9, FILTERS, transport=True),
        lambda: so.ema(0.9, FILTERS, transport=True, rescale=True),
        lambda: so.trace(0.9, FILTERS, transport=True),
        lambda: so.rms(0.9, 1e-8, FILTERS, rescale=True),
    ],
)
def test_missing_parameters(make):
    tx, grads = make(), _tree(_columns(0), jnp.float32)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads, tx.init(grads))


def test_quotient_feeds_both_and_divides():
    tx = so.quotient(optax.scale(6.0), optax.stateless(lambda g, _: jax.tree.map(jnp.square, g)))
    grads = {"w": jnp.asarray([1.0, 2.0, -4.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads, unheard_of=1)
    np.testing.assert_allclose(updates["w"], [6.0, 3.0, -1.5])


def test_quotient_where_nothing_is_below():
    tx = so.quotient(
        optax.identity(), optax.stateless(lambda g, _: jax.tree.map(jnp.zeros_like, g))
    )
    for dtype in (jnp.float32, jnp.float16, jnp.complex64):
        grads = {"w": jnp.asarray([1.0, -2.0, np.inf], dtype)}
        with jax.debug_infs():
            updates, _ = tx.update(jax.tree.map(lambda g: g[:2], grads), tx.init(grads))
        np.testing.assert_array_equal(updates["w"], 0.0)
        assert not np.isfinite(tx.update(grads, tx.init(grads))[0]["w"][2])


def test_functions_and_arguments_of_others():
    """A moment with another update, and an extra argument that is somebody else's."""
    x = {"w": jnp.asarray(_columns(0), jnp.float32)}
    moment, denominator = so.ema(0.9, FILTERS, transport=True), so.rms(0.9, 1e-8, FILTERS)
    expected, _ = so.quotient(moment, denominator).update(
        x, so.quotient(moment, denominator).init(x), x
    )
    for change in (
        lambda tx: tx._replace(update=jax.jit(tx.update)),
        optax.with_extra_args_support,
    ):
        tx = so.quotient(change(moment), change(denominator))
        actual, _ = tx.update(x, tx.init(x), x)
        np.testing.assert_allclose(actual["w"], expected["w"], rtol=1e-6)
    for tx in (moment, denominator):
        plain, _ = tx.update(x, tx.init(x), x)
        other, _ = tx.update(x, tx.init(x), x, products=jnp.ones(3))
        np.testing.assert_array_equal(plain["w"], other["w"])


@pytest.mark.usefixtures("x64")
def test_quotient_of_a_moment_inside_a_condition():
    """Its sums are unknown outside of the condition; the quotient is the same."""
    moment = so.ema(0.9, FILTERS, transport=True, rescale=True)
    inside = optax.conditionally_transform(moment, lambda step: step >= 0)
    denominator = so.rms(0.9, 1e-8, FILTERS, rescale=True)
    x, results = _tree(_columns(0)), []
    for a in (moment, inside, optax.chain(moment)):
        tx = so.quotient(a, denominator)
        state, update = tx.init(x), jax.jit(tx.update)
        for seed in (1, 2):
            updates, state = update(_tree(_columns(seed)), state, _tree(_columns(seed + 2)))
        results.append(updates["w"])
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-12)


def test_quotient_passes_extra_arguments_on():
    def update(updates, state, params=None, *, factor, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: factor * g, updates), state

    def init(params):
        del params
        return optax.EmptyState()

    needs_factor = optax.GradientTransformationExtraArgs(init, update)
    tx = so.quotient(needs_factor, optax.stateless(lambda g, _: jax.tree.map(jnp.ones_like, g)))
    grads = {"w": jnp.asarray([1.0, 2.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads, factor=3.0)
    np.testing.assert_allclose(updates["w"], [3.0, 6.0])


@pytest.mark.usefixtures("standard_promotion")
def test_integers_are_divided_by_nothing():
    """An integer among the parameters, whose moments are rounded to 0: it stays, without a warning."""
    params = {"n": jnp.asarray([0, 1, 4], jnp.int32)}
    tx = so.adam(0.1)
    np.testing.assert_array_equal(tx.update(params, tx.init(params), params)[0]["n"], 0.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: so.quotient(0.9, 0.99), "quotient: 0.9 is no optax.GradientTransformation"),
        (lambda: so.hyperball(0.1, optax.scale_by_adam(), FILTERS), "hyperball: 0.1 is no"),
        (lambda: so.stacked(so.adamsrt(0.1, FILTERS), FILTERS), "stacked: .* is not a function"),
        (lambda: so.adamp(0.1, FILTERS, optax.constant_schedule(0.9)), "ema: .*inject_hyperparams"),
        (lambda: so.adamp(0.1, b2=optax.constant_schedule(0.9)), "rms: .*inject_hyperparams"),
        (
            lambda: so.sgdp(0.1, FILTERS, optax.constant_schedule(0.9)),
            "trace: .*inject_hyperparams",
        ),
    ],
)
def test_what_is_no_transformation_and_no_number(make, says):
    with pytest.raises(ValueError, match=says):
        make()


SMALL = {"k": jnp.ones((3, 2)), "b": jnp.ones(2)}
ON_K = {"k": so.Sphere(), "b": None}


class TestUpdatesThatDoNotFit:
    """They might broadcast, or blame the spheres."""

    @pytest.mark.parametrize("shape", [(2, 3), (1, 2)])
    @pytest.mark.parametrize("make", [so.adamsrt, so.adamg_star, so.adamh, so.muonh, so.adamp])
    def test_shape(self, make, shape):
        tx = make(0.1, ON_K)
        with pytest.raises(ValueError, match=r"'k' has shape .* and the parameter \(3, 2\)"):
            tx.update({**SMALL, "k": jnp.ones(shape)}, tx.init(SMALL), SMALL)

    def test_missing(self):
        tx = so.adamsrt(0.1, ON_K)
        with pytest.raises(ValueError, match="the updates have no entry 'b'"):
            tx.update({"k": SMALL["k"]}, tx.init(SMALL), SMALL)

    def test_geometry(self):
        x = {"k": jnp.ones((3, 2))}
        with pytest.raises(ValueError, match=r"'k' has shape \(1, 2\) in one tree"):
            so.geometry.dot(x, {"k": jnp.ones((1, 2))}, so.Sphere())
        with pytest.raises(ValueError, match=r"'k' has shape \(\) in one tree"):
            so.geometry.scale(x, {"k": 2.0}, so.Sphere())


class TestNumbers:
    def test_a_number_in_place_of_spheres(self):
        with pytest.raises(ValueError, match=r"adam: spheres is 0\.9"):
            so.adam(1e-3, 0.9, 0.999)
        with pytest.raises(ValueError, match=r"sgd: .* write momentum=0\.9"):
            so.sgd(0.1, 0.9)

    @pytest.mark.parametrize("wrong", [None, "0.9", {"k": 0.9}, so.Sphere()])
    def test_no_number(self, wrong):
        with pytest.raises(ValueError, match=r"rate of decay is .*, not a number"):
            so.ema(wrong)
        with pytest.raises(ValueError, match=r"rms: eps is .*, not a number"):
            so.rms(0.9, wrong)

    def test_a_schedule(self):
        with pytest.raises(ValueError, match=r"inject_hyperparams\(so\.adamsrt"):
            so.adamsrt(0.1, so.Sphere(), b2=lambda count: 0.9)

    @pytest.mark.parametrize("wrong", [{"k": 2.0}, object(), jnp.ones(2), -1.0, True, None])
    def test_a_radius(self, wrong):
        with pytest.raises(ValueError, match="retract: radius is"):
            so.retract(so.Sphere(), wrong)

    def test_integers_of_numpy(self):
        assert so.Sphere((np.int64(-1),), np.int64(2)) == so.Sphere((-1,), 2)

    def test_a_pattern_without_a_signature(self):
        found = so.spheres_where({"conv": jnp.ones((2, 2)), "b": jnp.ones(2)}, "conv".startswith)
        assert found == {"conv": so.Sphere(), "b": None}

    def test_stacked_around_what_is_no_optimizer(self):
        with pytest.raises(ValueError, match="is no optimizer"):
            so.stacked(lambda spheres: None, so.Sphere()).init({"k": jnp.ones((2, 2))})

    def test_no_equilibrium(self):
        with pytest.raises(ValueError, match="negative"):
            so.analysis.adamw_equilibrium(1e-3, -0.1, size=9)
