"""Tasks one after another: the runs against a plain loop, the statistics, the command line."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import spherical_optax as so
from benchmarks.plasticity import __main__ as command
from benchmarks.plasticity import (
    findings,
    grid,
    methods,
    picture,
    statistics,
    table,
    tasks,
    training,
)
from benchmarks.reporting import differences, intervals

from .command_line import expect_one_error_line

STEPS = 5  # of a task: an epoch and the first batch of another


@pytest.fixture(scope="module")
def images():
    return tasks.load_images()


@pytest.fixture(scope="module")
def spheres(images):
    return tasks.find_hidden_spheres(images)


# --- tasks ------------------------------------------------------------------------------------


def test_the_images(images):
    assert images.shape == (256, 64)
    assert images.dtype == jnp.float32
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_the_hidden_layers_are_on_spheres_and_the_head_is_not(images, spheres):
    params = tasks.init_params(jax.random.key(0), images)

    def network(params):
        return tasks.predict(params, images[:32])

    assert so.check_spheres(network, params, spheres, key=jax.random.key(1)).ok
    assert not so.check_spheres(network, params, tasks.add_head(spheres), key=jax.random.key(1)).ok


def test_a_task_has_random_labels_and_whole_epochs():
    task = tasks.draw_task(jax.random.key(0), 10)
    other = tasks.draw_task(jax.random.key(1), 10)
    assert set(np.unique(task.labels)) == set(range(10))
    assert 0.05 < np.mean(task.labels == other.labels) < 0.2
    assert task.batches.shape == (10, 64)
    epochs = np.asarray(task.batches[:8]).reshape(2, 256)
    assert (np.sort(epochs, 1) == np.arange(256)).all()
    assert (epochs[0] != epochs[1]).any()
    assert len(np.unique(task.batches[8:])) == 128


# --- methods ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_step_of_each_method_does_to_the_radii(images, spheres):
    params = tasks.init_params(jax.random.key(0), images)
    everywhere = tasks.add_head(spheres)
    labels = tasks.draw_task(jax.random.key(1), 1).labels

    def loss(params):
        logits = tasks.predict(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step_all(params):
        """The relative change of every radius in two steps."""
        found = {}
        for name, method in methods.METHODS.items():
            tx, x = method.make(0.05, method.decays[0], spheres), params
            state = tx.init(x)
            for _ in range(2):
                updates, state = tx.update(jax.grad(loss)(x), state, x)
                x = optax.apply_updates(x, updates)
            radii = (so.geometry.norm(tree, everywhere) for tree in (x, params))
            found[name] = jax.tree.map(lambda after, before: jnp.ravel(after / before - 1), *radii)
        return found

    change = {
        name: {layer: abs(float(tree[layer]["kernel"][0])) for layer in everywhere}
        for name, tree in step_all(params).items()
    }
    keep_hidden, keep_head = {"nap", "nap-head", "adamh"}, {"nap-head"}
    for name, layers in change.items():
        for layer in (tasks.FIRST, tasks.SECOND):
            assert (layers[layer] < 1e-5) == (name in keep_hidden), (name, layers)
        assert (layers[tasks.HEAD] < 1e-5) == (name in keep_head), (name, layers)


def test_the_edges_of_a_grid():
    rates, decays = methods.RATES, methods.DECAYS
    adam, adamw = methods.METHODS["adam"], methods.METHODS["adamw"]
    assert len(adamw.list_cells()) == len(rates) * len(decays)
    inside = methods.Cell(rates[1], decays[1])
    assert not adamw.is_at_edge(inside)
    assert adamw.is_at_edge(inside._replace(weight_decay=decays[-1]))
    assert adamw.is_at_edge(inside._replace(learning_rate=rates[0]))
    assert not adam.is_at_edge(methods.Cell(rates[1], 0.0))  # its grid has one decay
    assert set(picture.STYLES) == set(methods.METHODS)


# --- training ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_the_curves_are_those_of_a_plain_loop(images, spheres):
    rate, seed, count = 0.01, 3, 2
    experiment = training.Experiment(images, spheres, count, STEPS)
    cells = [methods.Cell(0.1, 0.0), methods.Cell(rate, 0.0)]
    found = experiment.train(methods.METHODS["adam"], cells, [seed - 1, seed])
    assert found.accuracy.shape == (2, 2, count)

    def flatten(params):
        layer = params[tasks.SECOND]
        return np.concatenate([np.ravel(layer[name]) for name in ("kernel", "bias")]).astype(float)

    @jax.jit
    def compute_grads(params, x, labels):
        def loss(params):
            logits = tasks.predict(params, x)
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 10), -1))

        return jax.grad(loss)(params)

    init_key, tasks_key = jax.random.split(jax.random.key(seed))
    params = tasks.init_params(init_key, images)
    tx = optax.adam(rate)
    state = tx.init(params)
    for number, key in enumerate(jax.random.split(tasks_key, count)):
        task = tasks.draw_task(key, STEPS)
        radii, angles = [], []
        for batch in task.batches:
            grads = compute_grads(params, images[batch], task.labels[batch])
            updates, state = tx.update(grads, state, params)
            before, params = flatten(params), optax.apply_updates(params, updates)
            after = flatten(params)
            radii.append(np.linalg.norm(before))
            cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
            angles.append(np.arccos(cosine))
        logits = np.asarray(tasks.predict(params, images))
        accuracy = np.mean(logits.argmax(1) == np.asarray(task.labels))
        head = np.sqrt(sum(float(jnp.sum(x**2)) for x in params[tasks.HEAD].values()))
        one = jax.tree.map(lambda x, number=number: x[1, 1, number], found)
        assert abs(one.accuracy - accuracy) <= 1 / 256
        np.testing.assert_allclose(one.radius, np.mean(radii), rtol=1e-4)
        np.testing.assert_allclose(one.angle, np.mean(angles), rtol=1e-2)
        np.testing.assert_allclose(one.head_radius, head, rtol=1e-3)
        assert 0 < one.effective_lr < rate


# --- statistics -------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_t_distribution():
    values = np.random.default_rng(0).normal(size=10)
    found = intervals.estimate_mean(values)
    low, high = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    np.testing.assert_allclose(
        (found.mean - found.halfwidth, found.mean + found.halfwidth), (low, high)
    )
    of_three = stats.t.interval(1 - 0.05 / 3, 9, values.mean(), stats.sem(values))
    halfwidth = intervals.estimate_mean(values, 3).halfwidth
    np.testing.assert_allclose(2 * halfwidth, of_three[1] - of_three[0])
    alone = intervals.estimate_mean(values[:1])
    assert np.isnan(alone.halfwidth)
    assert not alone.excludes_zero()


def test_the_last_tasks_are_ten_or_all():
    accuracy = np.arange(24.0).reshape(2, 12)
    np.testing.assert_array_equal(statistics.average_last_tasks(accuracy), [6.5, 18.5])
    np.testing.assert_array_equal(statistics.average_last_tasks(accuracy[:, :3]), [1, 13])


def test_differences_are_taken_seed_by_seed():
    of_seeds = np.random.default_rng(0).normal(size=10)
    noise = 0.01 * np.random.default_rng(1).normal(size=(2, 10))
    values = {"a": of_seeds, "b": 0.1 + of_seeds + noise[0], "c": of_seeds - 0.1 + noise[1]}
    pairs = differences.compare_all(values)
    assert [(pair.ahead, pair.behind) for pair in pairs] == [("b", "a"), ("b", "c"), ("a", "c")]
    expected = stats.ttest_rel(values["b"], values["a"]).confidence_interval(0.95)
    mean, halfwidth = pairs[0].estimate
    np.testing.assert_allclose((mean - halfwidth, mean + halfwidth), expected)
    assert all(pair.is_told_apart() for pair in pairs)
    assert all(pair.among_all.halfwidth > pair.estimate.halfwidth for pair in pairs)
    # Without the pairs, the scatter of the seeds would hide the differences.
    assert stats.ttest_ind(values["b"], values["a"]).pvalue > 0.5


def test_pairs_that_are_not_told_apart_are_named():
    def make(mean, halfwidth):
        estimate = intervals.Estimate(mean, halfwidth)
        return differences.Difference("adamh", "adam", estimate, estimate)

    def write(pairs):
        return differences.write_pairs("Last tasks", pairs, findings.get_label)

    text = write([make(0.2, 0.1), make(0.1, 0.2)])
    assert "1 of the 2 pairs" in text
    assert "Not told apart: AdamH and Adam." in text
    assert "Not told apart" not in write([make(0.2, 0.1)])


def test_the_cell_with_the_highest_mean_is_chosen():
    cells = methods.METHODS["adam"].list_cells()[:3]
    accuracies = np.array([[0.5, 0.1], [0.4, 0.4], [0.4, 0.4]])
    assert grid.choose(cells, accuracies) == cells[1]


# --- command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a tiny run of the command printed, and the folder with what it wrote."""
    out, printed = tmp_path_factory.mktemp("plasticity"), io.StringIO()
    options = ["--tasks", "3", "--steps", str(STEPS), "--seeds", "2", "--out", str(out)]
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
        assert command.main([*options, "--methods", "adam", "decoupled"]) == 0
    return printed.getvalue(), out


def test_the_command_writes_numbers_and_figure(finished):
    printed, out = finished
    assert "decoupled" in printed
    assert {path.name for path in out.iterdir()} == {"plasticity.json", "plasticity.png"}
    assert (out / "plasticity.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "plasticity.json").read_text("utf-8"))
    assert content["command"].startswith("python -m benchmarks.plasticity --tasks 3 --steps 5")
    assert str(out) not in json.dumps(content)
    assert not set(content["seeds"]) & set(content["grid_seeds"])
    assert list(content["methods"]) == ["adam", "decoupled"]
    assert len(content["pairs"]) == 1


def test_every_cell_and_curve_is_in_the_file(finished):
    _, out = finished
    content = json.loads((out / "plasticity.json").read_text("utf-8"))
    for name, row in content["methods"].items():
        cells = row["grid"]
        assert len(cells) == len(methods.METHODS[name].list_cells())
        best = max(cells, key=lambda cell: cell["mean"])
        assert row["learning_rate"] == best["learning_rate"]
        for cell in cells:
            assert len(cell["seeds"]) == 3
            np.testing.assert_allclose(cell["mean"], np.mean(cell["seeds"]), rtol=1e-6)
        for curve in row["curves"].values():
            assert len(curve["mean"]) == len(curve["std"]) == 3
        last = row["last_accuracy"]["mean"]
        np.testing.assert_allclose(last, np.mean(row["curves"]["accuracy"]["mean"]), rtol=1e-5)
        np.testing.assert_allclose(last, np.mean(row["last_accuracy_of_seeds"]), rtol=1e-5)
    adam, decoupled = content["methods"].values()
    assert adam["minus_reference"] is None
    assert decoupled["minus_reference"]["halfwidth"] > 0
    assert min(adam["curves"]["effective_lr"]["mean"]) > 0
    assert decoupled["curves"]["effective_lr"]["mean"] == [None] * 3  # not known
    assert min(decoupled["curves"]["angle"]["mean"]) > 0


def test_the_tables_can_be_made_from_the_file(finished):
    printed, out = finished
    rows = json.loads((out / "plasticity.json").read_text("utf-8"))["methods"]
    for line in (*table.format_accuracies(rows), *table.format_turns(rows)):
        assert all(cell in printed for cell in line), line


@pytest.mark.usefixtures("standard_promotion")
def test_the_small_form_takes_the_chosen_values(finished, monkeypatch, capsys):
    _, out = finished
    monkeypatch.setattr(command, "CHOSEN", out / "plasticity.json")
    chosen = json.loads((out / "plasticity.json").read_text("utf-8"))["methods"]["adam"]
    few = ["--small", "--tasks", "1", "--steps", "1", "--seeds", "1", "--methods", "adam"]
    assert command.main(few) == 0
    printed = capsys.readouterr().out
    assert f"{chosen['learning_rate']:g}" in printed
    assert "nothing to compare" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "0"], "--tasks: must be at least 1, got 0"),
        (["--seeds", "x"], "--seeds: invalid int value: 'x'"),
        (["--methods", "adagrad"], "adagrad"),
        (["--out", __file__], "--out"),
        (["--small"], "--small: no chosen rates"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(command, "CHOSEN", tmp_path / "none.json")
    expect_one_error_line(capsys, lambda: command.main(options), message)
