"""Optimizers that others have published, as lines of this package: recorded runs of their own code.

The data are the public golden set `norm_control`. Every run has 30 gradients, which do not depend on the
point, and row t of a trajectory is the point at which gradient t is taken.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from . import recorded

DATA = recorded.DATA / "norm_control"
CASES = {case["id"]: case for case in json.loads((DATA / "cases.json").read_text())["cases"]}

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


def arrays(name):
    return recorded.arrays(f"norm_control/{name}")


def rate(count):
    """The schedule of the problem, looked up: computed, it would be float32."""
    return jnp.asarray(arrays("problem")["lr"])[count]


def read_spheres(case):
    """The groups as recorded."""
    return {
        name: None
        if (axes := leaf["group_index_axes"]) is None
        else so.Sphere(tuple(axes), tie="tie" if case["hyper"].get("tied") else None)
        for name, leaf in case["leaves"].items()
    }


def replay(case, tx, jit=True):
    """Largest deviation from the recorded run, relative to its largest entry."""
    recorded = {name: arrays("trajectories")[f"{case['id']}__{name}"] for name in case["leaves"]}
    params = {name: jnp.asarray(rows[0]) for name, rows in recorded.items()}
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    worst = 0.0
    for t in range(30):
        grads = {k: jnp.asarray(arrays("problem")[f"{k}__grads"][t]) for k in params}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, x in params.items():
            rows = recorded[name]
            worst = max(worst, float(np.abs(x - rows[t + 1]).max() / np.abs(rows).max()))
    return worst


def simbav2(S, h):
    return optax.chain(optax.adam(rate), so.retract(S, 1.0))


def nap(S, h):
    return optax.chain(optax.adam(rate), so.retract(S, "initial"))


def ngpt(S, h):
    return optax.chain(optax.adamw(rate, b2=0.95, weight_decay=0.0), so.retract(S, 1.0))


def edm2(S, h):
    """The radius is the root of fan_in, which differs between the leaves."""
    return optax.chain(
        optax.adam(rate, b2=0.99),
        optax.partition(
            {"kernel": so.retract(so.Sphere(), 6**0.5), "conv": so.retract(so.Sphere(), 18**0.5)},
            {"kernel": "kernel", "conv": "conv"},
        ),
    )


INNER = {
    "rotational adamw": lambda h: optax.scale_by_adam(h["b1"], h["b2"]),
    "rotational lion": lambda h: optax.scale_by_lion(h["b1"], h["b2"]),
    "rotational sgdm": lambda h: optax.trace(h["momentum"]),
}


def rotational(S, h):
    decay = h["update_norm_decay_factor"]
    return optax.chain(
        INNER[h["method"]](h),
        so.center(S) if h["zero_mean"] else optax.identity(),
        so.project(S),
        so.normalize(S, decay=decay) if decay else so.normalize(S),
        optax.scale_by_learning_rate(h["eta"]),
        so.retract(S, "initial"),
    )


def md(S, h):
    axes = {"row": so.Sphere((-1,)), "col": so.Sphere((0,))}
    return so.decouple(
        optax.chain(optax.adam(rate), so.retract(S, "initial")),
        optax.adam(h["gain_lr"]),
        tuple(axes[name] for name in h["gain_axes"]),
        phi=jax.nn.softplus,
    )


def polar(x):
    """U V^T of a matrix U S V^T, where Muon has Newton-Schulz iterations."""
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    return u @ vt


def polar_factors():
    return optax.stateless(lambda updates, params: jax.tree.map(polar, updates))


def angular_muown(S, h):
    def warm(updates, params):  # sqrt(max(1, out / in))
        return jax.tree.map(lambda q: q * max(1.0, q.shape[1] / q.shape[0]) ** 0.5, updates)

    def decayed(count):
        return rate(count) / (1 + h["decay_scale"] * count)

    return so.decouple(
        optax.chain(
            so.project(S),
            optax.trace(h["momentum"], nesterov=True),
            polar_factors(),
            optax.stateless(warm),
            optax.scale_by_learning_rate(decayed),
            so.retract(S, 1.0),
        ),
        optax.adam(rate, b2=0.95),
        (so.Sphere(),),
        start=lambda params: (so.geometry.direction(params, S), (so.geometry.norm(params, S),)),
    )


def adamc(S, h):
    """AdamW whose decay on the spheres is wd lr_t (lr_t / lr_max)."""
    on = so.on_spheres(S)

    def off(params):
        return jax.tree.map(lambda x: not x, on(params))

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(lambda t: h["weight_decay"] * rate(t) / h["lr_max"], mask=on),
        optax.add_decayed_weights(h["weight_decay"], mask=off),
        optax.scale_by_learning_rate(rate),
    )


def radial_brake(S, h):
    return optax.chain(optax.adam(rate), so.retract(S, outward=h["outward"], inward=h["inward"]))


def adamhr(S, h):
    return optax.chain(
        so.project(S),
        so.quotient(so.ema(0.9, S, transport=True, rescale=True), so.rms(0.95)),
        optax.scale_by_learning_rate(rate),
        so.retract(S),
    )


def oblique(S, h):
    return optax.chain(
        optax.trace(0.9), so.project(S), optax.scale_by_learning_rate(rate), so.retract(S, 1.0)
    )


def layca(S, h):
    return so.hyperball(optax.chain(optax.scale_by_adam(), so.project(S)), rate, S)


def normuonh(S, h):
    return so.hyperball(
        optax.chain(
            so.ema(0.95, nesterov=True),
            polar_factors(),
            so.quotient(optax.identity(), so.rms(0.95, 1e-10, so.Sphere())),
        ),
        rate,
        S,
        "initial",
    )


def nero(S, h):
    """Off the spheres every entry moves by its rate times the size that it had at first."""
    return optax.chain(
        so.quotient(optax.identity(), so.rms(h["beta"], h["eps"], S, reduce="sum")),
        optax.masked(optax.scale(0.01), {k: k == "bias" for k in S}),
        optax.scale_by_learning_rate(rate),
        so.center(S),
        so.retract(S, 1.0),
    )


# The line of each method, and its deviation: rounding, or their eps where ours has none.
LINES = {
    "simbav2": (simbav2, 1e-12),
    "nap_every1": (nap, 1e-12),
    "nap_scale_offset": (nap, 1e-12),
    "ngpt": (ngpt, 1e-12),
    "edm2": (edm2, 2e-4),
    **{name: (rotational, 1e-8) for name in CASES if name.startswith("rv_")},
    "md_adam_rowcol": (md, 1e-12),
    "md_adam_row": (md, 1e-12),
    "angular_muown": (angular_muown, 1e-12),
    "adamc": (adamc, 1e-12),
    "radial_brake_layer": (radial_brake, 1e-12),
    "adamhr": (adamhr, 1e-12),
    "oblique_sgd_dim1": (oblique, 1e-12),
    "layca_adam": (layca, 1e-12),
    "normuonh": (normuonh, 1e-10),
    "nero": (nero, 1e-12),
}
# Not built: a decay whose strength is a Lagrange multiplier.
LEFT_OUT = {"adamcpr"}


def make_line(name, line=None, spheres=None):
    case = CASES[name]
    hyper = case["hyper"] | {"method": case["method"]}
    return (line or LINES[name][0])(spheres or read_spheres(case), hyper)


@pytest.mark.parametrize("name", LINES)
def test_line(name):
    assert replay(CASES[name], make_line(name)) < LINES[name][1]


def test_every_recorded_method_is_a_line():
    assert set(LINES) | LEFT_OUT == set(CASES)


@pytest.mark.parametrize(
    ("name", "leaf", "wrong"),
    [
        ("simbav2", "kernel", so.Sphere((0,))),  # per input
        ("simbav2", "stack", so.Sphere()),  # both critics in one group
        ("ngpt", "out", so.Sphere()),  # per output where the model dimension is the output
        ("nap_every1", "conv", so.Sphere()),  # per filter in place of per array
        ("nap_every1", "head", so.Sphere(())),  # the head, which is free
        ("adamhr", "stack", so.Sphere(())),  # the axis of layers swallowed
        ("rv_lion_neuron_centred_undf0.9", "conv", so.Sphere(())),
    ],
)
def test_wrong_groups_show(name, leaf, wrong):
    spheres = read_spheres(CASES[name]) | {leaf: wrong}
    assert replay(CASES[name], make_line(name, spheres=spheres)) > 1e-2


@pytest.mark.parametrize(
    "name", ["simbav2", "nap_every1", "ngpt", "oblique_sgd_dim1", "layca_adam"]
)
def test_before_in_place_of_after_the_update_shows(name):
    """A retraction of the gradient, and not of the step."""

    def line(S, h):
        return optax.chain(so.retract(S), optax.adam(rate))

    assert replay(CASES[name], make_line(name, line)) > 1e-2


@pytest.mark.parametrize(
    ("name", "line"),
    [
        # without centring, without a running mean, without the brake, without the warm start of a count
        ("rv_adamw_neuron_centred_undf0.9", lambda S, h: rotational(S, h | {"zero_mean": False})),
        (
            "rv_adamw_neuron_plain_undf0.9",
            lambda S, h: rotational(S, h | {"update_norm_decay_factor": 0.0}),
        ),
        ("radial_brake_layer", lambda S, h: radial_brake(S, {"outward": 1.0, "inward": 0.5})),
        ("md_adam_row", lambda S, h: md(S, h | {"gain_axes": ["col"]})),
        ("md_adam_rowcol", lambda S, h: md(S, h | {"gain_axes": ["row"]})),
    ],
)
def test_other_lines_show(name, line):
    assert replay(CASES[name], make_line(name, line)) > 1e-3


def test_equilibrium_angles_of_rotational_optimizers():
    for case in CASES.values():
        h = case["hyper"]
        angles = {
            "rotational adamw": lambda h=h: so.analysis.adamw_equilibrium(
                h["lr"], h["weight_decay"], 1, h["b1"]
            ),
            "rotational lion": lambda h=h: so.analysis.lion_equilibrium(
                h["lr"], h["weight_decay"], 1, h["b1"], h["b2"]
            ),
            "rotational sgdm": lambda h=h: so.analysis.sgd_equilibrium(
                h["lr"], h["weight_decay"], 1.0, h["momentum"]
            ),
        }
        if case["method"] in angles:
            np.testing.assert_allclose(angles[case["method"]]().angle, h["eta"], rtol=1e-12)
