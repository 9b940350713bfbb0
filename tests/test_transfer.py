"""The learning rate over the width: training against a plain loop, the statistics, the command line."""

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
from benchmarks.reporting import intervals
from benchmarks.transfer import __main__ as command
from benchmarks.transfer import (
    findings,
    methods,
    network,
    picture,
    statistics,
    table,
    training,
)

from .command_line import expect_one_error_line

STEPS = 20  # an epoch of 18 batches and the beginning of another


@pytest.fixture(scope="module")
def split():
    return network.load_split()


@pytest.fixture(scope="module")
def spheres(split):
    return network.find_shared_spheres(split[0].images)


# --- network ----------------------------------------------------------------------------------


def test_the_split_is_fixed_and_shares_no_image(split):
    train, validation = split
    assert train.images.shape == (1200, 64)
    assert validation.images.shape == (597, 64)
    assert set(np.unique(validation.labels)) == set(range(10))
    again, _ = network.load_split()
    np.testing.assert_array_equal(train.images, again.images)
    rows = {np.asarray(image).tobytes() for image in train.images}
    assert not rows & {np.asarray(image).tobytes() for image in validation.images}


def test_the_spheres_of_the_narrow_network_fit_the_wide_one(split, spheres):
    images, width = split[0].images, 128
    network.check_shared_spheres(spheres, width, images)
    params = network.init_params(jax.random.key(2), width, images)
    found = so.find_spheres(
        lambda params: network.predict(params, images[:32]), params, key=jax.random.key(3)
    )
    assert found == spheres
    radii = so.geometry.norm(params, spheres)
    for layer, radius in radii.items():
        assert (layer == network.HEAD) == (radius["kernel"] is None)
        if layer != network.HEAD:
            kernel = np.linalg.norm(params[layer]["kernel"])  # the biases are zero at first
            np.testing.assert_allclose(np.squeeze(radius["kernel"]), kernel, rtol=1e-6)


def test_spheres_that_do_not_fit_are_refused(split, spheres):
    sphere = so.Sphere((), tie=network.HEAD)
    wrong = {**spheres, network.HEAD: {"kernel": sphere, "bias": sphere}}
    with pytest.raises(AssertionError):
        network.check_shared_spheres(wrong, 64, split[0].images)


# --- training ---------------------------------------------------------------------------------


def test_the_batches_are_those_of_whole_epochs():
    batches = np.asarray(training.draw_batches(jax.random.key(0), 1200, STEPS))
    assert batches.shape == (STEPS, 64)
    first, second = batches[:18], batches[18:]
    assert len(np.unique(first)) == first.size
    assert len(np.unique(second)) == second.size
    assert (first[:2] != second).any()


def test_the_rate_decays_linearly_to_zero():
    schedule = training.decay_linearly(0.5, 10)
    np.testing.assert_allclose([schedule(t) for t in range(11)], np.linspace(0.5, 0, 11), atol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_training_is_that_of_a_plain_loop(split, spheres):
    train, validation = split
    rate, seed, width = 0.01, 1, 16
    experiment = training.Experiment(train, validation, spheres, STEPS)
    found = experiment.train(methods.METHODS["adam"], width, [0.1, rate], [0, seed])
    assert found.loss.shape == found.accuracy.shape == (2, 2)

    @jax.jit
    def compute_loss(params, images, labels):
        logits = network.predict(params, images)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 10), -1))

    compute_grads = jax.jit(jax.grad(compute_loss))
    init_key, order_key = jax.random.split(jax.random.key(seed))
    params = network.init_params(init_key, width, train.images)
    tx = optax.adam(optax.linear_schedule(rate, 0.0, STEPS))
    state = tx.init(params)
    for batch in training.draw_batches(order_key, len(train.labels), STEPS):
        grads = compute_grads(params, train.images[batch], train.labels[batch])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found.loss[1, 1], compute_loss(params, *train), rtol=1e-3)
    hits = network.predict(params, validation.images).argmax(-1) == validation.labels
    assert abs(found.accuracy[1, 1] - hits.mean()) <= 2 / 597
    assert found.loss[1, 0] != found.loss[1, 1]  # another seed, other weights


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_step_of_each_method_does_to_the_radii(split, spheres):
    train, _ = split
    params = network.init_params(jax.random.key(0), 16, train.images)

    @jax.jit
    def step_all(params):
        """The relative change of every radius in two steps."""
        found = {}
        for name, method in methods.METHODS.items():
            tx, x = method.make(0.05, spheres), params
            state = tx.init(x)
            for _ in range(2):
                updates, state = tx.update(jax.grad(training.compute_loss)(x, *train), state, x)
                x = optax.apply_updates(x, updates)
            radii = (so.geometry.norm(tree, spheres) for tree in (x, params))
            found[name] = jax.tree.map(lambda after, before: jnp.ravel(after / before - 1), *radii)
        return found

    for name, layers in step_all(params).items():
        changes = [
            abs(float(layer["kernel"][0]))
            for layer in layers.values()
            if layer["kernel"] is not None
        ]
        assert len(changes) == 1 + 2 * network.BLOCKS
        for change in changes:
            assert (change < 1e-5) == (name in {"adamh", "muonh"}), (name, changes)


# --- statistics -------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_t_distribution():
    values = np.random.default_rng(0).normal(size=3)
    found = intervals.estimate_mean(values)
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    np.testing.assert_allclose(
        (found.mean - found.halfwidth, found.mean + found.halfwidth), (low, high)
    )
    for without in (values[:1], np.array([1.0, np.inf])):
        alone = intervals.estimate_mean(without)
        assert np.isnan(alone.halfwidth)
        assert not alone.excludes_zero()


def test_the_best_rate_is_the_minimum_of_the_parabola():
    exponents, minima = range(-9, -2), np.array([-6.3, -4.8, -7.0])
    grid = np.array(exponents)[:, None]
    losses = 0.01 * np.exp(np.array([0.2, 0.5, 1.0]) * (grid - minima) ** 2)
    np.testing.assert_allclose(statistics.find_best_exponents(exponents, losses), minima)
    rng = np.random.default_rng(0)
    noisy = losses * np.exp(0.1 * rng.normal(size=losses.shape))
    for found, column in zip(
        statistics.find_best_exponents(exponents, noisy), noisy.T, strict=True
    ):
        i = int(np.argmin(column))
        a, b, _ = np.polyfit(exponents[i - 1 : i + 2], np.log(column[i - 1 : i + 2]), 2)
        np.testing.assert_allclose(found, -b / (2 * a))


def test_at_an_edge_and_beside_a_run_that_diverged_the_best_rate_is_the_best_of_the_grid():
    losses = np.array([[1.0, 9.0], [2.0, 2.0], [3.0, 1.0], [4.0, np.nan]])
    np.testing.assert_array_equal(statistics.find_best_exponents(range(-5, -1), losses), [-5, -3])
    assert statistics.is_at_edge(losses)
    assert not statistics.is_at_edge(losses[:, 1:])
    assert statistics.find_best_cell(losses[1:]) == 1  # of 2 2, 3 1 and 4 NaN


def test_slopes_are_fitted_seed_by_seed():
    widths, rng = [32, 64, 128, 256], np.random.default_rng(0)
    best = 3 * rng.normal(size=3) - 0.5 * np.log2(widths)[:, None] + 0.05 * rng.normal(size=(4, 3))
    slopes = [stats.linregress(np.log2(widths), column).slope for column in best.T]
    found = statistics.fit_slope(widths, best)
    np.testing.assert_allclose(found, intervals.estimate_mean(np.array(slopes)))
    # Without the seeds, the scatter of their levels would hide the slope.
    assert found.excludes_zero()
    assert stats.linregress(np.repeat(np.log2(widths), 3), best.ravel()).pvalue > 0.05


def test_losses_are_compared_as_ratios():
    losses = np.array([[2.0, 8.0], [1.0, 2.0]])
    factor = findings.to_factor(statistics.compare_losses(losses, 0))
    np.testing.assert_allclose(factor["mean"], np.sqrt(2 * 4))
    assert factor["low"] < 2 < 4 < factor["high"]
    assert statistics.compare_losses(losses, 1) == (0, 0)


def make_outcome(slope, scatter):
    """An outcome of AdamH whose best rates are on a line over log2 of the width."""
    exponents = np.array(methods.METHODS["adamh"].exponents)[:, None]
    slopes = slope + scatter * np.array([-1.0, 0.0, 1.0])  # of the seeds
    ends = {}
    for i, width in zip((-1, 0, 1), (32, 64, 128), strict=True):
        losses = np.exp((exponents - exponents[4] - slopes * i) ** 2)
        ends[width] = training.Ends(losses, np.ones_like(losses))
    return findings.Outcome("adamh", ends)


def test_the_sentence_says_whether_the_best_rate_moves():
    assert (
        "falls with the width; log2 of it changes by -0.60 ± 0.12 per doubling"
        in findings.write_movement(make_outcome(-0.6, 0.05))
    )
    assert "rises with the width" in findings.write_movement(make_outcome(0.6, 0.05))
    text = findings.write_movement(make_outcome(-0.1, 0.5))
    assert "no movement of the best rate with the width is told apart from none" in text
    widest = make_outcome(-1.0, 0.0)
    assert widest.penalty.mean == pytest.approx(4.0)  # two steps away from the minimum
    assert "rate of width 32 multiplies the loss at width 128 by 54.60" in findings.write_movement(
        widest
    )
    assert findings.write_edges([widest]).startswith("No seed")
    far = make_outcome(-4.0, 0.0)
    assert "AdamH at width 32; AdamH at width 128" in findings.write_edges([far])


# --- command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a tiny run of the command printed, and the folder with what it wrote."""
    out, printed = tmp_path_factory.mktemp("transfer"), io.StringIO()
    options = ["--widths", "16", "8", "--steps", "3", "--seeds", "2", "--out", str(out)]
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
        assert command.main([*options, "--methods", "adam", "muonh"]) == 0
    return printed.getvalue(), out


def test_the_command_writes_numbers_and_figure(finished):
    printed, out = finished
    assert "MuonH" in printed
    assert {path.name for path in out.iterdir()} == {"transfer.json", "transfer.png"}
    assert (out / "transfer.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "transfer.json").read_text("utf-8"))
    assert content["command"].startswith("python -m benchmarks.transfer --widths 8 16 --steps 3")
    assert str(out) not in json.dumps(content)
    assert list(content["methods"]) == ["adam", "muonh"]
    assert len(content["verdict"]) == 3
    assert set(picture.STYLES) == set(methods.METHODS)


def test_every_cell_is_in_the_file(finished):
    _, out = finished
    content = json.loads((out / "transfer.json").read_text("utf-8"))
    for name, row in content["methods"].items():
        exponents = methods.METHODS[name].exponents
        np.testing.assert_array_equal(np.log2(row["rates"]), exponents)
        assert list(row["widths"]) == ["8", "16"]
        for width in row["widths"].values():
            losses = np.array(width["losses"])
            assert losses.shape == np.shape(width["accuracies"]) == (len(exponents), 2)
            means = stats.gmean(losses, axis=1)
            assert width["best_cell"] == np.argmin(means)
            np.testing.assert_allclose(width["loss"]["mean"], means.min(), rtol=1e-4)
            best = statistics.find_best_exponents(exponents, losses)
            np.testing.assert_allclose(width["log2_best_rate"]["mean"], best.mean(), atol=1e-3)
        best = [width["log2_best_rate_of_seeds"] for width in row["widths"].values()]
        np.testing.assert_allclose(
            row["slope"]["mean"], np.mean(best[1]) - np.mean(best[0]), atol=1e-4
        )
        narrow, wide = row["widths"].values()
        ratios = np.divide(wide["losses"][narrow["best_cell"]], wide["losses"][wide["best_cell"]])
        np.testing.assert_allclose(row["penalty"]["mean"], stats.gmean(ratios), rtol=1e-4)


def test_the_tables_can_be_made_from_the_file(finished):
    printed, out = finished
    rows = json.loads((out / "transfer.json").read_text("utf-8"))["methods"]
    for make in (table.format_rates, table.format_penalties, table.format_losses):
        for line in make(rows):
            assert all(cell in printed for cell in line), line


@pytest.mark.usefixtures("standard_promotion")
def test_one_width_and_one_seed_have_nothing_to_compare(capsys):
    assert command.main(["--widths", "8", "--steps", "1", "--seeds", "1", "--methods", "adam"]) == 0
    assert "Adam: a single width, nothing to compare." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "4"], "--widths: must be at least 8, got 4"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seeds", "x"], "--seeds: invalid int value: 'x'"),
        (["--methods", "adagrad"], "adagrad"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(capsys, options, message):
    expect_one_error_line(capsys, lambda: command.main(options), message)
