"""The paper's hypotheses, measured: the quantities against their definitions, the command line."""

import contextlib
import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from benchmarks.assumptions import __main__ as command
from benchmarks.assumptions import hypotheses, recording
from benchmarks.training import models, recipes

from .command_line import expect_one_error_line

TINY = partial(models.ResNet, widths=(4,), blocks=0)  # compiles fast
B1, B2, EPS = 0.9, 0.99, 1e-8


def normal(seed):
    return {"w": 0.1 * jax.random.normal(jax.random.key(seed), (6, 4), float)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["SGD", "SGD-M", "Adam"])
def test_one_step_agrees_with_the_definitions(name):
    """1 - A <c, u> is A / eta^e, with a and b from the recurrences of the paper."""
    tx, rate, decay = recording.make_optimizers("cifar10", "resnet20", so.Sphere())[name]
    watched = recording.watch(tx, so.Sphere())
    x = normal(0)
    state, m, v = watched.init(x), 0.0, 0.0
    for count in range(1, 4):
        params, grads = x, normal(count)
        total = grads["w"] + decay * params["w"]
        momentum, gain = {"SGD": (0.0, 1.0), "SGD-M": (0.9, 1.0), "Adam": (B1, 1 - B1)}[name]
        m, v = momentum * m + gain * total, B2 * v + (1 - B2) * total**2
        updates, state = watched.update(grads, state, params)
        x = optax.apply_updates(params, updates)
    a, b = m / gain, jnp.ones_like(m)
    if name == "Adam":
        b = (1 - B1**3) / (1 - B1) * (jnp.sqrt(v / (1 - B2**3)) + EPS)

    image = so.analysis.image_step(params, {"w": a}, {"w": b}, rate, so.Sphere())
    radius = jnp.linalg.norm(params["w"], axis=0)
    big_a = rate / (radius**2 * jnp.sqrt(jnp.mean(b**2, axis=0)))
    found = state.step
    np.testing.assert_allclose(found.factor, big_a / image.effective_lr["w"][0], rtol=1e-12)
    np.testing.assert_allclose(found.angle, image.angle["w"][0], rtol=1e-12)
    np.testing.assert_allclose(found.next_radius, image.next_radius["w"][0], rtol=1e-12)
    np.testing.assert_allclose(found.next_radius, jnp.linalg.norm(x["w"], axis=0), rtol=1e-12)
    measured = so.analysis.measure_step(params, updates, so.Sphere())
    np.testing.assert_allclose(
        found.factor, measured.radius_ratio["w"][0] * jnp.cos(found.angle), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_theorem_4_lacks_what_is_called_neglected(rate):
    x, decay = normal(0), 0.01
    grads = so.geometry.project(x, normal(1), so.Sphere())
    tx = so.sgd(rate, so.Sphere(), weight_decay=decay)
    updates, _ = tx.update(grads, tx.init(x), x)
    step = recording.measure(x, grads, updates, so.Sphere())
    exact = jnp.linalg.norm(x["w"] + updates["w"], axis=0) ** 4
    predicted = hypotheses.predict_by_theorem_4(step.radius**4, step.gradient, rate, decay)
    term = hypotheses.compute_neglected(step.radius, step.gradient, rate)
    np.testing.assert_allclose(exact, predicted + term, rtol=1e-12)
    # Relative to r'^4, it is what the angle alone tells.
    np.testing.assert_allclose(term / exact, jnp.sin(step.angle) ** 4, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_what_theorem_4_neglects_adds_up():
    rate, decay, x, kept = 0.1, 0.01, normal(0), []
    tx = so.sgd(rate, so.Sphere(), weight_decay=decay)
    for count in range(1, 6):
        grads = so.geometry.project(x, normal(count), so.Sphere())
        updates, _ = tx.update(grads, tx.init(x), x)
        kept.append(recording.measure(x, grads, updates, so.Sphere()))
        x = optax.apply_updates(x, updates)
    steps = recording.Step(*(np.stack(column) for column in zip(*kept, strict=True)))
    terms = hypotheses.compute_neglected(steps.radius, steps.gradient, rate)
    beta = (1 - rate * decay) ** 4
    missing = (beta ** np.arange(4, -1, -1)) @ terms / steps.next_radius[-1] ** 4
    drift = hypotheses.measure_drift(steps, recording.Optimizer(tx, rate, decay))
    assert missing.min() > 1e-5  # else there is nothing to see
    off = 1 - (1 - missing) ** 0.25
    np.testing.assert_allclose(
        (drift["median"], drift["max"]), (np.median(off), off.max()), rtol=1e-9
    )


def test_violations_are_counted_and_told():
    good = recording.Step(*np.full((5, 2, 3), 0.5))
    bad = good._replace(factor=np.array([[0.5, -0.25, 0.0], [0.5, 0.5, 0.5]]))
    rates = dict.fromkeys(("SGD", "SGD-M", "Adam"), 0.1)
    for adam, violations, words in ((good, 0, "positive at every"), (bad, 2, "NOT always")):
        values = hypotheses.compute_values({"SGD": good, "SGD-M": good, "Adam": adam}, rates)
        rows = hypotheses.summarize_all(values)
        assert rows["factor"]["Adam"]["violations"] == violations
        assert rows["factor"]["SGD"]["violations"] == 0
        assert rows["factor"]["Adam"]["values"] == 6
        assert rows["factor"]["Adam"]["worst_after_the_first_steps"] is None
        assert words in hypotheses.write_verdict(rows)["factor"]


# --- command line -----------------------------------------------------------------------------


def arguments(tmp_path, **changes):
    options = {"dataset": "digits", "model": "digits", "steps": 2, "out": tmp_path / "out"}
    return [word for k, v in (options | changes).items() for word in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run of the command recorded, printed and wrote."""
    folder, kept = tmp_path_factory.mktemp("assumptions"), []
    record = command.record

    def record_and_keep(*args):
        kept.extend(record(*args))
        return kept

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(models.MODELS, "digits", TINY)
        patch.setattr(command, "record", record_and_keep)
        assert command.main(arguments(folder, steps=3, limit=150)) == 0
    return *kept, printed.getvalue(), folder / "out"


def test_recorded_steps_follow_each_other(finished):
    compared, steps, *_ = finished
    assert list(compared) == list(steps) == ["SGD", "SGD-M", "Adam"]
    for step in steps.values():
        assert {array.shape for array in step} == {(3, 4)}
        np.testing.assert_allclose(step.next_radius[:-1], step.radius[1:], rtol=1e-6)


def test_theorem_4_on_a_network(finished):
    """Its gradients are tangential up to BatchNorm's epsilon."""
    compared, steps, *_ = finished
    sgd, (_, rate, decay) = steps["SGD"], compared["SGD"]
    np.testing.assert_allclose(sgd.factor, 1 - rate * decay, rtol=1e-5)
    predicted = hypotheses.predict_by_theorem_4(sgd.radius**4, sgd.gradient, rate, decay)
    term = hypotheses.compute_neglected(sgd.radius, sgd.gradient, rate)
    np.testing.assert_allclose(predicted + term, sgd.next_radius**4, rtol=1e-5)


def test_the_command_writes_numbers_and_figure(finished):
    *_, printed, out = finished
    assert "SGD-M" in printed
    assert "positive at every step" in printed
    assert {path.name for path in out.iterdir()} == {"assumptions.json", "assumptions.png"}
    content = json.loads((out / "assumptions.json").read_text("utf-8"))
    assert "--limit 150" in content["command"]
    assert str(out.parent) not in json.dumps(content)
    assert set(content["quantities"]["angle"]) == {"meaning", "SGD", "SGD-M", "Adam"}
    row = content["quantities"]["neglected"]["SGD"]
    assert row["values"] == 3 * content["filters"] == 12
    assert 0 <= row["min"] <= row["median"] <= row["max"] < 1
    assert (out / "assumptions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps: must be at least 1, got 0"),
        ({"model": "alexnet"}, "resnet20"),
        ({"limit": 20}, "20 training images are too few for one batch of 128"),
        ({"dataset": "cifar10", "data-dir": "nowhere"}, "nowhere holds neither cifar10.npz"),
        ({"model": "vgg16"}, "at least 32x32"),
        ({"out": __file__}, "--out"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setitem(models.MODELS, "digits", TINY)
    expect_one_error_line(capsys, lambda: command.main(arguments(tmp_path, **changes)), message)


def test_a_run_that_diverges_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "digits", TINY)
    monkeypatch.setitem(recipes.LEARNING_RATES, "sgd", 1e30)
    with pytest.raises(SystemExit):
        command.main(arguments(tmp_path, steps=4))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: SGD diverged in step ")
