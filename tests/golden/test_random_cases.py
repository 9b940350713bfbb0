"""Every optimizer against the numpy reference, on all kinds of groups at once, for 100 steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from ..optimizers import TABLE
from . import reference, replay

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 100

# leaf -> (shape, index_axes or None for a leaf on no sphere, blocks, tie)
LEAVES = {
    "conv": ((3, 3, 2, 4), (-1,), None, None),
    "pointwise": ((1, 1, 6, 5), (-1,), None, None),
    "depthwise": ((3, 3, 1, 6), (-1,), None, None),
    "single_filter": ((3, 3, 4, 1), (-1,), None, None),
    "zero_gradients": ((3, 3, 2, 3), (-1,), None, None),
    "one_row": ((1, 5), (-1,), None, None),  # d = 1
    "every_coordinate": ((2, 3), (0, 1), None, None),  # d = 1
    "layer": ((3, 3, 2, 4), (), None, None),
    "in_out": ((3, 3, 4, 5), (-2, -1), None, None),
    "scanned": ((3, 5, 4), (0, -1), None, None),
    "heads": ((6, 3, 4), (1,), None, None),
    "blocks": ((3, 3, 2, 6), (-1,), 3, None),
    "blocks_of_one": ((4, 6), (-1,), 6, None),
    "scanned_blocks": ((2, 3, 6), (0, -1), 2, None),
    "blocks_inside": ((4, 6, 3), (1,), 2, None),
    "group_norm_kernel": ((3, 3, 2, 6), (-1,), 3, "group norm"),
    "group_norm_bias": ((6,), (-1,), 3, "group norm"),
    "layer_norm_kernel": ((5, 4), (), None, "layer norm"),
    "layer_norm_bias": ((4,), (), None, "layer norm"),
    "filter_kernel": ((5, 4), (-1,), None, "filter and bias"),
    "filter_bias": ((4,), (-1,), None, "filter and bias"),
    "one_row_kernel": ((1, 3), (-1,), None, "d = 2"),
    "one_row_bias": ((3,), (-1,), None, "d = 2"),
    "heads_kernel": ((4, 3, 2), (1,), None, "heads"),
    "heads_bias": ((3, 2), (0,), None, "heads"),
    "free_kernel": ((3, 4), None, None, None),
    "free_scalar": ((), None, None, None),
}
SPHERES = {
    leaf: None if axes is None else so.Sphere(axes, blocks, tie)
    for leaf, (_, axes, blocks, tie) in LEAVES.items()
}
SPECS = {
    leaf: None if axes is None else (axes, blocks, tie)
    for leaf, (_, axes, blocks, tie) in LEAVES.items()
}

# kind of the reference -> (lr, spheres, weight_decay) -> optimizer
OPTIMIZERS = {
    "adam": lambda *a, weight_decay: so.adam(*a, weight_decay=weight_decay),
    "adams": lambda *a, weight_decay: so.adams(*a, weight_decay=weight_decay),
    "adamst": lambda *a, weight_decay: so.adamst(*a, weight_decay=weight_decay),
    "adamsrt": lambda *a, weight_decay: so.adamsrt(*a, weight_decay=weight_decay),
    "adamg": lambda *a, weight_decay: so.adamg(*a, weight_decay=weight_decay),
    "sgd": lambda *a, weight_decay: so.sgd(*a, momentum=0.9, weight_decay=weight_decay),
    "sgd_mrt": lambda *a, weight_decay: so.sgd_mrt(*a, weight_decay=weight_decay),
    "adamg_star": lambda *a, weight_decay: so.adamg_star(*a, weight_decay=weight_decay),
    "adamp": lambda *a, weight_decay: so.adamp(*a, weight_decay=weight_decay),
    "sgdp": lambda *a, weight_decay: so.sgdp(*a, weight_decay=weight_decay),
    "adamh": lambda *a, weight_decay: so.adamh(*a, weight_decay=weight_decay),
    "hyperball": lambda *a, weight_decay: TABLE["hyperball"](*a, weight_decay=weight_decay),
}
assert set(OPTIMIZERS) == {*reference.ADAM_KINDS, *reference.SGD_KINDS}


@functools.cache
def _problem():
    rng = np.random.default_rng(7)
    start, grads = {}, {}
    for leaf, (shape, *_) in LEAVES.items():
        start[leaf] = rng.normal(size=shape)
        # One direction that stays and noise around it, of a different scale for each leaf.
        common, noise = rng.normal(size=shape), rng.normal(size=(STEPS, *shape))
        grads[leaf] = rng.uniform(0.2, 2.0) * (0.7 * common + noise)
    grads["zero_gradients"][..., 1] = 0.0
    return start, grads


HYPER = {
    "constant": (lambda k: 0.02, lambda k: 0.0),
    "l2": (lambda k: 0.02, lambda k: 0.05),
    "schedules": (lambda k: 0.05 * 0.5 ** (k / 20), lambda k: 0.1 / (1 + k)),
}


@functools.cache
def _compiled(kind):
    """Schedules read from tables that are arguments: one compilation serves all of HYPER."""
    grads = jax.tree.map(jnp.asarray, _problem()[1])

    # Compiling is what takes the time here; the recorded cases are replayed with all optimisations.
    @jax.jit
    def run(params, lr, weight_decay):
        tx = OPTIMIZERS[kind](lambda k: lr[k], SPHERES, weight_decay=lambda k: weight_decay[k])
        return replay.scan(tx, params, lambda k, _: {n: g[k] for n, g in grads.items()}, STEPS)

    return run


@functools.cache
def _expected(kind, hyper):
    start, grads = _problem()
    lr, l2 = HYPER[hyper]

    def gradient(k, _):
        return {leaf: g[k] for leaf, g in grads.items()}

    return reference.run(kind, start, SPECS, gradient, reference.Hyper(lr=lr, l2=l2), STEPS)


@pytest.mark.parametrize("hyper", HYPER)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replay(kind, hyper):
    start, _ = _problem()
    tables = [jnp.asarray([schedule(k) for k in range(STEPS)]) for schedule in HYPER[hyper]]
    actual = _compiled(kind)(jax.tree.map(jnp.asarray, start), *tables)
    for leaf, expected in _expected(kind, hyper).items():
        np.testing.assert_allclose(actual[leaf], expected, rtol=1e-10, atol=1e-10, err_msg=leaf)


def test_cases_can_tell_the_variants_apart():
    """Else the replays above could pass with the wrong optimizer."""
    paths = {kind: _expected(kind, "l2") for kind in OPTIMIZERS}
    for leaf, (shape, *_) in LEAVES.items():
        spheres, _ = reference.groups({leaf: shape}, {leaf: SPECS[leaf]})
        if not spheres:
            continue
        ends = [paths[kind][leaf][-1] for kind in OPTIMIZERS]
        for i, end in enumerate(ends):
            for other in ends[:i]:
                assert np.linalg.norm(end - other) > 1e-4, leaf
