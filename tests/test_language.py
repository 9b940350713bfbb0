"""The small language model: text, decoder, spheres, training against a plain loop, the command line."""

import contextlib
import io
import json
import shutil

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import spherical_optax as so
from benchmarks.language import __main__ as command
from benchmarks.language import (
    findings,
    grid,
    methods,
    network,
    picture,
    runs,
    spheres,
    table,
    text,
    training,
)

from .command_line import expect_one_error_line

SIZES = network.Sizes(width=16, layers=1, heads=2, context=8, characters=12)
BATCH, STEPS = 4, 12
CELL = methods.Cell(2.0**-6, 0.1, 0.5)


@pytest.fixture(scope="module")
def corpus():
    """A short one: an endless alphabet with slips of the pen."""
    letters = np.arange(600) % SIZES.characters
    slips = np.random.default_rng(0).integers(0, SIZES.characters, 600)
    letters = jnp.asarray(np.where(slips < 2, slips, letters), jnp.int32)
    return text.Corpus(letters[:500], letters[500:], "abcdefghijkl", "none")


@pytest.fixture(scope="module")
def params():
    return network.init_params(jax.random.key(0), SIZES)


@pytest.fixture(scope="module")
def both_spheres(params):
    return methods.Spheres(spheres.find_narrow_spheres(SIZES), spheres.declare_matrices(params))


# --- text -------------------------------------------------------------------------------------


def test_every_paragraph_is_there_once_and_none_in_both_parts():
    paragraphs = text.list_paragraphs()
    words = [" ".join(paragraph.split()) for paragraph in paragraphs]
    assert len(set(words)) == len(words) > 1000
    topics = " ".join(" ".join(topic.split()) for topic in text.topics.values())
    assert all(paragraph in topics for paragraph in words)
    train, validation = text.split(paragraphs)
    assert sorted(train + validation) == sorted(paragraphs)
    assert not {" ".join(p.split()) for p in train} & {" ".join(p.split()) for p in validation}


def test_a_tenth_is_held_out_in_a_few_blocks():
    paragraphs = text.list_paragraphs()
    train, validation = text.split(paragraphs)
    share = sum(map(len, validation)) / sum(map(len, paragraphs))
    assert 0.08 < share < 0.12
    is_held_out = np.isin(paragraphs, validation)
    assert np.sum(is_held_out[1:] & ~is_held_out[:-1]) == text.BLOCKS // text.EVERY
    assert len(train) > 0


def test_the_numbers_stand_for_the_characters_of_the_text():
    corpus = text.load_corpus()
    train, validation = text.split(text.list_paragraphs())
    for numbers, part in ((corpus.training, train), (corpus.validation, validation)):
        decoded = "".join(corpus.characters[number] for number in numbers.tolist())
        assert decoded == text.SEPARATOR.join(part)
    assert len(corpus.sha256) == 64
    assert text.load_corpus().sha256 == corpus.sha256


def test_the_windows_of_the_validation_text_predict_every_character_once():
    numbers = jnp.arange(23)
    windows = np.asarray(text.cut_windows(numbers, 4))
    assert windows.shape == (5, 5)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 21))
    np.testing.assert_array_equal(windows[:, :-1].ravel(), np.arange(20))


def test_the_windows_of_a_batch_begin_anywhere_in_the_text():
    windows = np.asarray(text.draw_windows(jax.random.key(0), jnp.arange(12), 500, 4))
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(5), (500, 1)))
    assert set(windows[:, 0]) == set(range(8))  # the last one ends with the text


# --- network and spheres ----------------------------------------------------------------------


def test_no_logit_depends_on_a_later_character(params):
    x = jax.random.randint(jax.random.key(1), (3, SIZES.context), 0, SIZES.characters)
    place = 5
    y = x.at[:, place].set((x[:, place] + 1) % SIZES.characters)
    first, second = (np.asarray(network.predict(params, z, SIZES)) for z in (x, y))
    np.testing.assert_array_equal(first[:, :place], second[:, :place])
    assert (np.abs(first[:, place:] - second[:, place:]).max(-1) > 1e-4).all()


@pytest.mark.usefixtures("standard_promotion")
def test_activations_in_bfloat16_change_the_logits_by_their_rounding_alone(params):
    x = jax.random.randint(jax.random.key(1), (3, SIZES.context), 0, SIZES.characters)
    low = network.predict(params, x, SIZES._replace(dtype="bfloat16"))
    exact = np.asarray(network.predict(params, x, SIZES))
    assert low.dtype == jnp.float32
    deviation = np.abs(np.asarray(low) - exact).max() / np.abs(exact).max()
    assert 1e-4 < deviation < 0.03


def test_scores_depend_on_the_distance_alone():
    one, other = jax.random.normal(jax.random.key(0), (2, 8))
    tiled = jnp.tile(one, (1, 6, 1, 1)), jnp.tile(other, (1, 6, 1, 1))
    query, key = (np.asarray(network.rotate(x))[0, :, 0] for x in tiled)
    np.testing.assert_allclose(np.linalg.norm(query, axis=-1), np.linalg.norm(one), rtol=1e-5)
    scores = query @ key.T
    for distance in range(-5, 6):
        np.testing.assert_allclose(np.ptp(np.diagonal(scores, distance)), 0, atol=1e-5)
    assert np.ptp(scores[0]) > 0.1


def test_the_measured_spheres_are_queries_and_keys_by_head(params, both_spheres):
    found = so.geometry.norm(params, both_spheres.measured)["block_0"]
    for name in network.HIDDEN:
        radius = found[name]["kernel"]
        assert (radius is not None) == (name in network.NORMALISED)
        if radius is not None:
            kernel = np.reshape(params["block_0"][name]["kernel"], (16, 2, 8))
            np.testing.assert_allclose(
                np.ravel(radius), np.linalg.norm(kernel, axis=(0, 2)), rtol=1e-6
            )


def test_the_narrow_copy_declares_the_spheres_of_the_wide_decoder(both_spheres):
    wide = SIZES._replace(width=48, context=12)
    params = network.init_params(jax.random.key(3), wide)
    x = jax.random.randint(jax.random.key(4), (8, 12), 0, wide.characters)

    def check(spheres):
        return so.check_spheres(
            lambda p: network.predict(p, x, wide), params, spheres, key=jax.random.key(5)
        )

    check(both_spheres.measured).assert_ok()
    # Whole matrices are a constraint, and not what the network is invariant to.
    assert not check(spheres.declare_matrices(params)).ok


# --- methods ----------------------------------------------------------------------------------


def take_steps(method, cell, both_spheres, params, corpus, count=2):
    tx = methods.METHODS[method].make(cell.learning_rate, *cell[1:], both_spheres)

    @jax.jit
    def run(x):
        state = tx.init(x)
        for number in range(count):
            key = jax.random.key(number)
            windows = text.draw_windows(key, corpus.training, BATCH, SIZES.context)
            grads = jax.grad(training.compute_loss)(x, windows, SIZES)
            updates, state = tx.update(grads, state, x)
            x = optax.apply_updates(x, updates)
        return x

    return run(params)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("method", ["adamh", "muonh"])
def test_hyperballs_keep_the_radius_of_every_matrix(method, both_spheres, params, corpus):
    after = take_steps(method, CELL, both_spheres, params, corpus)
    before, radii = (so.geometry.norm(x, both_spheres.declared) for x in (params, after))
    assert len(jax.tree.leaves(radii)) == len(network.HIDDEN)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), before, radii)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("method", ["adamw-ratio", "adamh", "decoupled"])
def test_the_ratio_changes_the_rate_of_the_others_alone(method, both_spheres, params, corpus):
    steps = {}
    for ratio in (1.0, 4.0):
        cell = CELL._replace(ratio=ratio)
        after = take_steps(method, cell, both_spheres, params, corpus, count=1)
        steps[ratio] = jax.tree.map(lambda x, y: np.asarray(x - y), after, params)
    for name in (network.EMBEDDING, network.HEAD, "norm"):
        for slow, fast in zip(*(jax.tree.leaves(steps[r][name]) for r in steps), strict=True):
            assert np.abs(slow).max() > 0.005
            np.testing.assert_allclose(4 * slow, fast, atol=1e-5)
    if method != "decoupled":  # whose gains are moved at the rate of the others
        for name in network.HIDDEN:
            slow, fast = (steps[ratio]["block_0"][name]["kernel"] for ratio in steps)
            np.testing.assert_allclose(slow, fast, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_adamsrt_is_adamw_off_the_measured_spheres(both_spheres, params, corpus):
    adamw, adamsrt = (
        take_steps(name, CELL, both_spheres, params, corpus, count=1)
        for name in ("adamw", "adamsrt")
    )
    measured = so.on_spheres(both_spheres.measured)(params)
    for on, start, one, other in zip(
        *map(jax.tree.leaves, (measured, params, adamw, adamsrt)), strict=True
    ):
        moved = np.abs(np.asarray(one - start)).max()
        assert moved > 0.005
        assert (np.abs(np.asarray(one - other)).max() > 0.1 * moved) == on


@pytest.mark.usefixtures("standard_promotion")
def test_gains_do_not_decay(both_spheres, params, corpus):
    found = [
        take_steps("adamw", CELL._replace(weight_decay=decay), both_spheres, params, corpus, 1)
        for decay in (0.0, 1.0)
    ]
    free, decayed = found
    jax.tree.map(np.testing.assert_array_equal, free["norm"], decayed["norm"])
    head = (free[network.HEAD]["kernel"] - decayed[network.HEAD]["kernel"]) / CELL.learning_rate
    np.testing.assert_allclose(head, params[network.HEAD]["kernel"], atol=1e-4)


# --- training ---------------------------------------------------------------------------------


def make_trainer(method, both_spheres, corpus):
    setting = training.Setting(corpus, SIZES, BATCH, STEPS)
    return training.Trainer(setting, methods.METHODS[method], both_spheres)


@pytest.fixture(scope="module")
def record(both_spheres, corpus):
    with jax.numpy_dtype_promotion("standard"):
        return make_trainer("adamw", both_spheres, corpus).train(CELL, 1, 4)


def test_the_rate_warms_up_and_decays_to_zero():
    schedule = training.warm_up_and_decay(0.5, 100)
    rates = np.array([schedule(count) for count in range(101)])
    np.testing.assert_allclose(rates[:10], np.linspace(0.05, 0.5, 10), rtol=1e-5)
    assert rates.argmax() == 9
    np.testing.assert_allclose(np.diff(rates[9:]), -0.5 / 91, rtol=1e-3)
    np.testing.assert_allclose(rates[100], 0, atol=1e-7)
    assert training.warm_up_and_decay(0.5, 1)(0) == 0.5


def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end():
    assert training.list_stops(600, 12) == list(range(50, 601, 50))
    assert training.list_stops(7, 3) == [2, 4, 7]
    assert training.list_stops(2, 12) == [1, 2]


@pytest.mark.usefixtures("standard_promotion")
def test_training_is_that_of_a_plain_loop(record, corpus):
    params = network.init_params(jax.random.key(1), SIZES)
    tx = optax.adamw(
        training.warm_up_and_decay(CELL.learning_rate, STEPS),
        weight_decay=CELL.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim == 2, params),
    )

    @jax.jit
    def compute_loss(params, windows):
        logits = network.predict(params, windows[:, :-1], SIZES)
        hot = jax.nn.one_hot(windows[:, 1:], SIZES.characters)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * hot, -1))

    state, losses, compute_grads = tx.init(params), [], jax.jit(jax.value_and_grad(compute_loss))
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 1), number)
        windows = text.draw_windows(key, corpus.training, BATCH, SIZES.context)
        loss, grads = compute_grads(params, windows)
        losses.append(float(loss))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert record.steps == [3, 6, 9, 12]
    np.testing.assert_allclose(record.training, np.reshape(losses, (4, 3)).mean(1), rtol=1e-4)
    whole = np.asarray(corpus.validation)[:97]  # 12 windows of 8, and the character in front
    windows = np.stack([whole[start : start + 9] for start in range(0, 96, 8)])
    np.testing.assert_allclose(
        record.validation[-1], compute_loss(params, jnp.asarray(windows)), rtol=1e-4
    )


def test_rates_radii_and_angles_are_recorded(record):
    for turn in record.turns.values():
        for values in turn:
            assert len(values) == 4
            assert min(values) > 0
    # Larger by the warm-up, and smaller at the end.
    angles = record.turns["normalised"].angle
    assert angles[-1] < max(angles)


@pytest.mark.usefixtures("standard_promotion")
def test_all_methods_see_the_same_weights_and_batches(both_spheres, corpus):
    """At a rate of zero the losses tell nothing but weights and batches."""
    still = CELL._replace(learning_rate=0.0)
    found = {}
    for name in ("adamw", "adamh"):
        trainer = make_trainer(name, both_spheres, corpus)
        found[name] = [trainer.train(still, seed, STEPS).training for seed in (1, 2)]
    np.testing.assert_allclose(*found.values(), rtol=1e-5)
    one, other = found["adamh"]
    assert np.abs(np.subtract(one, other)).max() > 0.01
    assert len({round(loss, 5) for loss in one}) == STEPS  # no batch twice


# --- runs and grid ----------------------------------------------------------------------------


JOB = runs.Job("muonh", CELL, 3, 2)


def make_record(validation=(2.0, 1.0), rate=float("nan")):
    turn = training.Turn([1.0, 2.0], [0.1, 0.2], [rate, rate])
    turns = dict.fromkeys(training.GROUPS, turn)
    return training.Record([1, 2], list(validation), [2.5, 1.5], turns, 0.5)


def complete(folder, recipe, train):
    return runs.Runs(folder, recipe).complete([JOB], train, lambda *job: None)[0]


def test_a_finished_run_is_not_trained_again(tmp_path):
    complete(tmp_path, {"steps": 2}, lambda *job: make_record())
    read = complete(tmp_path, {"steps": 2}, None)
    np.testing.assert_equal(read, make_record())
    other = complete(tmp_path, {"steps": 3}, lambda *job: make_record((3.0, 3.0)))
    assert other.validation == [3.0, 3.0]
    assert complete(tmp_path, {"steps": 2}, None).validation == [2.0, 1.0]


def test_a_torn_file_is_trained_again(tmp_path):
    complete(tmp_path, {}, lambda *job: make_record())
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text("utf-8")[:100], encoding="utf-8")
    again = complete(tmp_path, {}, lambda *job: make_record((9.0, 8.0)))
    assert again.validation == [9.0, 8.0]


def test_a_run_of_another_process_is_waited_for(tmp_path, monkeypatch):
    store = runs.Runs(tmp_path, {})
    lock = filelock.FileLock(tmp_path / f"{store.make_name(JOB)}.lock")
    lock.acquire()
    waits = []

    def end_the_other(seconds):
        waits.append(seconds)
        lock.release()

    monkeypatch.setattr(runs.time, "sleep", end_the_other)
    trained = []
    store.complete([JOB], lambda *job: trained.append(job) or make_record(), lambda *job: None)
    assert len(waits) == 1
    assert trained == [JOB[1:]]


def test_the_cell_with_the_smallest_loss_is_chosen():
    cells = methods.METHODS["adamw"].list_first()
    assert grid.Search(cells, [np.nan, 2.0, 1.0, 1.0]).chosen == cells[2]


@pytest.mark.parametrize("best", [(-6, 0), (-2, 2), (-12, 1), (0, 4), (-14, -3)])
@pytest.mark.parametrize("name", methods.METHODS)
def test_the_search_ends_with_the_best_cell_inside_of_what_was_tried(name, best):
    method, (exponent, other) = methods.METHODS[name], best
    decay = method.decays[abs(other) % len(method.decays)]
    ratio = 4.0**other if method.has_ratio else methods.RATIO

    def compute_loss(cell):
        rates, ratios = (np.log2(cell.learning_rate) - exponent, np.log2(cell.ratio / ratio))
        return abs(rates) + abs(ratios) + (cell.weight_decay != decay) if rates < 9 else np.nan

    found = grid.search(method, lambda cells: [compute_loss(cell) for cell in cells])
    assert found.chosen == methods.Cell(2.0**exponent, decay, ratio)
    assert set(method.list_beside(found.chosen)) <= set(found.cells)
    assert len(set(found.cells)) == len(found.cells)


# --- findings ---------------------------------------------------------------------------------


def make_outcome(name, losses, decay=0.1):
    """The chosen cell has this decay, if the method has a choice."""
    cells = methods.METHODS[name].list_beside(methods.METHODS[name].list_first()[1])
    search = grid.Search(cells, [float(cell.weight_decay != decay) for cell in cells])
    return findings.Outcome(name, search, [make_record((2.0, loss)) for loss in losses], 1.0)


def test_the_verdict_names_what_is_told_apart_and_what_is_not():
    level = np.array([1.70, 1.75, 1.72])
    wide = level + np.array([0.2, -0.1, 0.0])
    outcomes = [
        make_outcome("adamw", level),
        make_outcome("adamh", level - 0.1 + 0.001 * np.arange(3)),
        make_outcome("muonh", level + 0.2 + 0.001 * np.arange(3)),
        make_outcome("decoupled", wide),
    ]
    found = findings.describe(outcomes)
    pairs, reference, edges = found["verdict"]
    assert pairs.startswith("Validation loss: 3 of the 6 pairs")
    assert "Lower than AdamW: AdamH (-0.099 ± " in reference
    assert "Higher than AdamW: MuonH (+0.201 ± " in reference
    assert "Not told apart from AdamW: decoupled (+0.033 ± " in reference
    assert edges == "No decay was chosen at the edge."
    expected = stats.ttest_rel(outcomes[1].losses, level).confidence_interval(0.95)
    row = found["methods"]["adamh"]["minus_reference"]
    np.testing.assert_allclose(
        (row["mean"] - row["halfwidth"], row["mean"] + row["halfwidth"]), expected
    )


def test_nothing_is_told_apart_by_one_seed():
    outcomes = [make_outcome("adamw", [1.7]), make_outcome("adamh", [1.2])]
    pairs, reference, _ = findings.describe(outcomes)["verdict"]
    assert "0 of the 1 pairs" in pairs
    assert "Not told apart from AdamW: AdamH (-0.500)." in reference
    alone = findings.describe(outcomes[:1])["verdict"]
    assert alone[0] == "One method alone: nothing to compare."
    assert len(alone) == 2


@pytest.mark.parametrize(
    ("name", "decay", "is_told"),
    [("adamw", 0.0, False), ("adamw", 1.0, True), ("adamw-ratio", 0.1, False)],
)
def test_the_largest_decay_is_told(name, decay, is_told):
    text = findings.write_edges([make_outcome(name, [1.7, 1.8], decay)])
    assert text.endswith(f"may lie outside, for {methods.METHODS[name].label}.") == is_told
    assert text.startswith("No decay") != is_told


# --- command line -----------------------------------------------------------------------------

OPTIONS = [
    *("--width", "8", "--layers", "1", "--heads", "2", "--context", "4", "--batch", "2"),
    *("--steps", "2", "--seeds", "2", "--methods", "adamw", "muonh", "--out"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """What a tiny run of the command printed, and the folder with what it wrote."""
    out, printed = tmp_path_factory.mktemp("language"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(command, "load_corpus", lambda: corpus)
        with contextlib.redirect_stdout(printed):
            assert command.main([*OPTIONS, str(out)]) == 0
    return printed.getvalue(), out


def read(out):
    return json.loads((out / "language.json").read_text("utf-8"))


def test_the_command_writes_numbers_and_figure(finished):
    printed, out = finished
    assert "MuonH" in printed
    assert {path.name for path in out.iterdir()} == {"language.json", "language.png", "runs"}
    assert (out / "language.png").read_bytes().startswith(b"\x89PNG")
    content = read(out)
    assert content["command"].startswith("python -m benchmarks.language --width 8 --layers 1")
    assert str(out) not in json.dumps(content)
    assert not set(content["seeds"]) & set(content["grid_seeds"])
    assert content["environment"]["python"]
    assert content["text"]["training_characters"] == 500
    assert content["evaluated_after"] == [1, 2]
    assert list(content["methods"]) == ["adamw", "muonh"]
    assert len(content["pairs"]) == 1
    assert set(picture.STYLES) == set(methods.METHODS)


def test_every_cell_and_curve_is_in_the_file(finished):
    _, out = finished
    content = read(out)
    for name, row in content["methods"].items():
        cells = row["grid"]
        tried = [methods.Cell(*(cell[number] for number in methods.Cell._fields)) for cell in cells]
        assert set(methods.METHODS[name].list_first()) <= set(tried)
        best = min(cells, key=lambda cell: cell["loss"])
        for number in methods.Cell._fields:
            assert row[number] == best[number]
        assert len(row["loss_of_seeds"]) == 2
        np.testing.assert_allclose(row["loss"]["mean"], np.mean(row["loss_of_seeds"]), rtol=1e-5)
        np.testing.assert_allclose(row["validation"]["mean"][-1], row["loss"]["mean"], rtol=1e-5)
    adamw, muonh = content["methods"].values()
    gap = np.subtract(muonh["loss_of_seeds"], adamw["loss_of_seeds"])
    np.testing.assert_allclose(muonh["minus_reference"]["mean"], gap.mean(), atol=1e-5)
    for group in training.GROUPS:
        assert min(adamw["turns"][group]["effective_lr"]["mean"]) > 0
        assert muonh["turns"][group]["effective_lr"]["mean"] == [None] * 2  # not known
        assert min(muonh["turns"][group]["angle"]["mean"]) > 0


def test_the_tables_can_be_made_from_the_file(finished):
    printed, out = finished
    rows = read(out)["methods"]
    for line in (*table.format_losses(rows), *table.format_turns(rows)):
        assert all(word in printed for cell in line for word in cell.split()), line
    lines = table.format_grid(rows)
    assert sum("**" in cell for line in lines for cell in line) == 2
    assert {len(line) for line in lines} == {len(table.make_grid_header(rows))}


@pytest.mark.usefixtures("standard_promotion")
def test_a_stopped_command_goes_on_where_it_was(finished, corpus, monkeypatch, tmp_path):
    out = shutil.copytree(finished[1], tmp_path / "again")
    before = read(out)["methods"]["adamw"]
    (lost,) = (out / "runs").glob("adamw_*_seed1_*.json")
    lost.unlink()
    trained, train = [], training.Trainer.train

    def count(self, cell, seed, evaluations):
        trained.append(seed)
        return train(self, cell, seed, evaluations)

    monkeypatch.setattr(training.Trainer, "train", count)
    monkeypatch.setattr(command, "load_corpus", lambda: corpus)
    options = [option for option in OPTIONS if option != "muonh"]
    assert command.main([*options, str(out)]) == 0
    assert trained == [1]
    after = read(out)["methods"]["adamw"]
    np.testing.assert_allclose(after["loss_of_seeds"], before["loss_of_seeds"], rtol=1e-5)
    assert after["grid"] == before["grid"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "0"], "--width: must be at least 1, got 0"),
        (["--width", "36"], "--width 36 is no multiple of twice --heads 4"),
        (["--context", "1"], "--context: must be at least 2, got 1"),
        (["--context", "100000"], "--context: must be below 8193"),
        (["--seeds", "x"], "--seeds: invalid int value: 'x'"),
        (["--dtype", "int8"], "int8"),
        (["--methods", "adagrad"], "adagrad"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(capsys, options, message):
    expect_one_error_line(capsys, lambda: command.main(options), message)
