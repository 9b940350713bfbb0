"""Geometry on trees: axioms as properties, and every function against its formula group by group."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spherical_optax as so

from .golden import reference

geometry = so.geometry
pytestmark = pytest.mark.usefixtures("x64")

# leaf -> (shape, index_axes, blocks, tie), or None for no sphere
LEAVES = {
    "kernel": ((3, 3, 2, 4), (-1,), None, None),
    "layer": ((5, 3), (), None, None),
    "in_out": ((3, 2, 3), (-1, 1), None, None),
    "norm_kernel": ((2, 3, 6), (-1,), 3, "norm"),
    "norm_bias": ((6,), (-1,), 3, "norm"),
    "heads": ((4, 3, 2), (1,), None, "heads"),
    "heads_bias": ((3, 2), (0,), None, "heads"),
    "blocks_inside": ((2, 6, 4), (0, 1), 2, None),
    "free": ((4,), None, None, None),
}
SHAPES = {leaf: spec[0] for leaf, spec in LEAVES.items()}
SPHERES = {
    leaf: None if axes is None else so.Sphere(axes, blocks, tie)
    for leaf, (_, axes, blocks, tie) in LEAVES.items()
}
GROUPED = {  # leaf -> keepdims shape of its scalars
    "kernel": (1, 1, 1, 4),
    "layer": (1, 1),
    "in_out": (1, 2, 3),
    "norm_kernel": (1, 1, 3),
    "norm_bias": (3,),
    "heads": (1, 3, 1),
    "heads_bias": (3, 1),
    "blocks_inside": (2, 2, 1),
    "free": None,
}
GROUPS, _ = reference.groups(
    SHAPES, {leaf: None if spec[1] is None else spec[1:] for leaf, spec in LEAVES.items()}
)

seeds = st.integers(0, 2**32 - 1)
angles = st.floats(1e-6, 3.1)
log_radii = st.floats(-3, 3)


def _jitted(name):
    return jax.jit(lambda *trees: getattr(geometry, name)(*trees, SPHERES))


NAMES = ("dot", "norm", "direction", "project", "transport", "exp", "log", "retract", "angle")
DOT, NORM, DIRECTION, PROJECT, TRANSPORT, EXP, LOG, RETRACT, ANGLE = map(_jitted, NAMES)

RETRACT_TO = jax.jit(lambda x, v, radius: geometry.retract(x, v, SPHERES, radius))


def _random(seed, log_radius=0.0):
    rng = np.random.default_rng(seed)
    return {leaf: 10**log_radius * rng.normal(size=shape) for leaf, shape in SHAPES.items()}


def _per_group(*trees):
    """The flat vectors of each group, tree by tree."""
    trees = [{leaf: np.asarray(x) for leaf, x in tree.items()} for tree in trees]
    for group in GROUPS:
        yield [reference.gather(tree, group) for tree in trees]


def _build(function, *trees):
    """A tree whose groups are function(vectors of the group); the free leaf is the first tree's."""
    built = {leaf: np.array(x) for leaf, x in trees[0].items()}
    for group, vectors in zip(GROUPS, _per_group(*trees), strict=True):
        reference.scatter(built, group, function(*vectors))
    return built


def _unit(x):
    return x / np.linalg.norm(x)


def _tangent(x, v):
    return v - (v @ _unit(x)) * _unit(x)


def _turn(x, v, angle):
    """x turned by an angle in the direction of v."""
    r = np.linalg.norm(x)
    return r * (np.cos(angle) * _unit(x) + np.sin(angle) * _unit(_tangent(x, v)))


def _per_scalar(tree):
    """The scalars of each group, from a tree of dot products, norms or angles."""
    expanded = {}
    for leaf, (shape, axes, blocks, _) in LEAVES.items():
        if axes is None:
            assert tree[leaf] is None
            continue
        assert tree[leaf].shape == GROUPED[leaf]
        positions = reference.labels(shape, axes, blocks)
        listed = [a % len(shape) for a in axes]
        others = [a for a in range(len(shape)) if a not in listed]
        flat = np.asarray(tree[leaf]).transpose(listed + others).ravel()
        expanded[leaf] = flat[positions]
    for group in GROUPS:
        values = reference.gather(expanded, group)
        assert np.ptp(values) == 0  # one number for the group, the same in all tied leaves
        yield values[0]


def _close(actual, expected, tolerance=1e-10):
    for (a,), (e,) in zip(_per_group(actual), _per_group(expected), strict=True):
        assert np.linalg.norm(a - e) <= tolerance * max(1.0, np.linalg.norm(e))


FORMULAS = {
    "dot": (DOT, lambda x, y: x @ y, 2),
    "norm": (NORM, lambda x: np.linalg.norm(x), 1),
    "angle": (ANGLE, lambda x, y: np.arccos(_unit(x) @ _unit(y)), 2),
}
VECTOR_FORMULAS = {
    "direction": (DIRECTION, _unit, 1),
    "project": (PROJECT, _tangent, 2),
    "transport": (TRANSPORT, lambda x, y, v: reference.transport(_unit(x), _unit(y), v), 3),
    "retract": (RETRACT, lambda x, v: np.linalg.norm(x) * _unit(x + v), 2),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(seed=seeds, log_radius=log_radii)
def test_scalars_group_by_group(name, seed, log_radius):
    function, formula, count = FORMULAS[name]
    trees = [_random(seed, log_radius), _random(seed + 1)][:count]
    expected = [formula(*vectors) for vectors in _per_group(*trees)]
    np.testing.assert_allclose(list(_per_scalar(function(*trees))), expected, 1e-10, 1e-12)


@pytest.mark.parametrize("name", VECTOR_FORMULAS)
@given(seed=seeds, log_radius=log_radii)
def test_vectors_group_by_group(name, seed, log_radius):
    function, formula, count = VECTOR_FORMULAS[name]
    trees = [_random(seed, log_radius), _random(seed + 1), _random(seed + 2)][:count]
    _close(function(*trees), _build(formula, *trees))


@given(seed=seeds, radius=st.floats(1e-3, 1e3))
def test_retract_to_a_radius(seed, radius):
    point, velocity = _random(seed), _random(seed + 1)
    reached = RETRACT_TO(point, velocity, radius)
    _close(reached, _build(lambda x, v: radius * _unit(x + v), point, velocity))


@given(seed=seeds, angle=angles, log_radius=log_radii)
def test_transport_is_an_isometry_onto_the_tangent_space_at_the_end(seed, angle, log_radius):
    start = _random(seed, log_radius)
    end = _build(lambda x, v: 7.0 * _turn(x, v, angle), start, _random(seed + 1))
    v, w = (_build(_tangent, start, _random(seed + i)) for i in (2, 3))
    v_end, w_end = TRANSPORT(start, end, v), TRANSPORT(start, end, w)
    for e, a, b, a_end, b_end in _per_group(end, v, w, v_end, w_end):
        assert abs(a @ b - a_end @ b_end) < 1e-9 * max(1.0, np.linalg.norm(a) * np.linalg.norm(b))
        assert abs(_unit(e) @ a_end) < 1e-10 * max(1.0, np.linalg.norm(a))
    # and back again
    _close(TRANSPORT(end, start, v_end), v, 1e-9)


@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_transport_to_the_same_direction_is_the_projection(seed, factor):
    start, vectors = _random(seed), _random(seed + 1)
    end = jax.tree.map(lambda x: factor * x, start)
    _close(TRANSPORT(start, end, vectors), _build(_tangent, start, vectors))


@given(seed=seeds, angle=angles)
def test_geodesics(seed, angle):
    """exp follows the great circle; transport carries its velocity; log and angle undo exp."""
    point = _build(_unit, _random(seed))
    velocity = _build(lambda u, v: angle * _unit(_tangent(u, v)), point, _random(seed + 1))
    end = EXP(point, velocity)
    _close(end, _build(lambda u, v: _turn(u, v, angle), point, velocity))
    arrived = _build(lambda u, v: np.cos(angle) * v - np.sin(angle) * angle * u, point, velocity)
    _close(TRANSPORT(point, end, velocity), arrived, 1e-8)
    _close(LOG(point, end), velocity, 1e-9)
    _close(LOG(end, point), jax.tree.map(np.negative, arrived), 1e-8)
    np.testing.assert_allclose(list(_per_scalar(ANGLE(point, end))), angle, 1e-8)


@given(seed=seeds, log_radius=log_radii)
def test_exp_inverts_log(seed, log_radius):
    start, end = _random(seed, log_radius), _random(seed + 1)
    velocity = LOG(start, end)
    _close(EXP(DIRECTION(start), velocity), _build(_unit, end))
    for x, v in _per_group(start, velocity):
        assert abs(_unit(x) @ v) < 1e-10


@given(seed=seeds)
def test_projection_is_orthogonal(seed):
    point, vectors = _random(seed), _random(seed + 1)
    tangent = PROJECT(point, vectors)
    _close(PROJECT(point, tangent), tangent, 1e-12)
    for x, t, v in _per_group(point, tangent, vectors):
        assert abs(t @ _unit(x)) < 1e-12
        assert abs(t @ (v - t)) < 1e-11


@given(seed=seeds, log_radius=log_radii, other=log_radii)
def test_base_points_count_by_their_direction_only(seed, log_radius, other):
    x, y, v = (_random(seed + i) for i in range(3))
    far_x, far_y = _random(seed, log_radius), _random(seed + 1, other)
    _close(PROJECT(far_x, v), PROJECT(x, v))
    _close(TRANSPORT(far_x, far_y, v), TRANSPORT(x, y, v))
    _close(LOG(far_x, far_y), LOG(x, y))
    _close(DIRECTION(far_x), DIRECTION(x))
    np.testing.assert_allclose(
        list(_per_scalar(ANGLE(far_x, far_y))), list(_per_scalar(ANGLE(x, y))), 1e-10
    )


@given(seed=seeds, angle=angles)
def test_angle_is_symmetric(seed, angle):
    x = _random(seed)
    y = _build(lambda x, v: _turn(x, v, angle), x, _random(seed + 1))
    there, back = (list(_per_scalar(ANGLE(*pair))) for pair in ((x, y), (y, x)))
    np.testing.assert_allclose(there, back, 1e-12, 1e-14)
    np.testing.assert_allclose(there, angle, 1e-8)


def test_leaves_on_no_sphere_are_flat():
    x, y, v = (_random(seed)["free"] for seed in range(3))
    trees = [_random(seed) for seed in range(3)]
    expected = {
        DIRECTION: (1, x),
        PROJECT: (2, y),
        TRANSPORT: (3, v),
        EXP: (2, x + y),
        RETRACT: (2, x + y),
        LOG: (2, y - x),
    }
    for function, (count, value) in expected.items():
        np.testing.assert_array_equal(function(*trees[:count])["free"], value)
    assert DOT(*trees[:2])["free"] is None
    assert NORM(trees[0])["free"] is None
    assert ANGLE(*trees[:2])["free"] is None
