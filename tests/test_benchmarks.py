"""The benchmarks: models, data, protocol, training loop, command line and the demo's records."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import spherical_optax as so
from benchmarks import discovery, throughput, train
from benchmarks.demo import grid as demo_grid
from benchmarks.reporting import report
from benchmarks.reporting.progress import LINES, show_progress
from benchmarks.reporting.significance import write_verdict
from benchmarks.training import build, data, models, recipes
from benchmarks.training.augment import normalize, random_crop_and_flip
from benchmarks.training.build import find_filter_spheres
from benchmarks.training.methods import OPTIMIZERS, make_optimizer
from benchmarks.training.normalization import BatchNorm
from benchmarks.training.run import Run
from benchmarks.training.trainer import Trainer

from .command_line import expect_one_error_line

SHARED = Path(__file__).parents[2] / "shared" / "data"


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"),
    [
        # With 1x1 convolutions on the shortcuts; 269,722 with He et al.'s padded ones.
        ("resnet20", 21, 272_474),
        ("resnet18", 20, 11_173_962),
        ("vgg16", 13, 14_724_042),
    ],
)
def test_published_model_sizes(name, convolutions, parameters):
    init = partial(models.MODELS[name](10).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    assert len(kernels) == convolutions


def test_the_filters_are_found():
    """Every convolution is followed by BatchNorm, and nothing else is on a sphere."""
    found = flatten_dict(find_filter_spheres(models.MODELS["resnet8"](10), (16, 16, 3)))
    filters = {path for path in found if path[-2].startswith("Conv_") and path[-1] == "kernel"}
    assert found == {path: so.Sphere() if path in filters else None for path in found}
    assert len(filters) == 1 + 3 * 2 + 2  # stem, blocks, shortcuts


def test_networks_that_others_wrote(tmp_path, capsys, monkeypatch):
    pytest.importorskip("haiku")
    mlp = discovery.NETWORKS["haiku MLP"]
    row = discovery.measure(mlp)
    assert row is not None
    assert (row["arrays"], row["on_spheres"], row["wrong"]) == (6, 0, [])
    wrong = discovery.measure(mlp._replace(spheres="linear_0/w", kind=so.Sphere()))
    assert wrong is not None
    assert len(wrong["wrong"]) == 1
    elsewhere = mlp._replace(package="no_such_package")
    assert discovery.measure(elsewhere) is None
    monkeypatch.setattr(discovery, "NETWORKS", {"an MLP": elsewhere})
    with pytest.raises(SystemExit):  # not nulls in place of the numbers that are there
        discovery.main(["--out", str(tmp_path / "discovery.json")])
    assert "would lose the networks of no_such_package: install them" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- data -------------------------------------------------------------------------------------


def cifar_arrays(n_train=40, n_test=8, seed=0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (n_train, 32, 32, 3), np.uint8),
        "y_train": rng.integers(0, 10, n_train, np.uint8),
        "x_test": rng.integers(0, 256, (n_test, 32, 32, 3), np.uint8),
        "y_test": rng.integers(0, 10, n_test, np.uint8),
    }


def test_npz_round_trip(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    found = data.load("cifar10", tmp_path)
    assert [len(split.labels) for split in found[1:]] == [38, 2, 8]  # 5 % held out
    np.testing.assert_array_equal(found.test.images, arrays["x_test"])
    np.testing.assert_array_equal(found.test.labels, arrays["y_test"])
    pairs = {image.tobytes(): label for image, label in zip(*found.train, strict=True)}
    pairs |= {image.tobytes(): label for image, label in zip(*found.validation, strict=True)}
    expected = zip(arrays["x_train"], arrays["y_train"], strict=True)
    assert pairs == {image.tobytes(): label for image, label in expected}


def test_limit_keeps_the_first_images(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    found = data.load("cifar10", tmp_path, limit=20)
    kept = {image.tobytes() for split in (found.train, found.validation) for image in split.images}
    assert kept == {image.tobytes() for image in arrays["x_train"][:20]}


def test_digits_split():
    found = data.load("digits")
    assert [len(split.labels) for split in found[1:]] == [200, 400, 1197]
    images = np.concatenate([split.images for split in found[1:]]) / 255
    np.testing.assert_allclose(images.mean(), found.source.mean[0], atol=1e-4)
    np.testing.assert_allclose(images.std(), found.source.std[0], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((40, 28, 28, 1), np.uint8)}, r"expected uint8 .* \(40, 28, 28, 1\)"),
        ({"x_test": np.zeros((8, 32, 32, 3), np.float32)}, r"expected uint8 .* found float32"),
        ({"y_train": np.zeros(39, np.uint8)}, r"train: 40 images but labels of shape \(39,\)"),
        ({"y_test": np.full(8, 10)}, r"test: labels must be integers from 0 to 9"),
        ({"y_test": np.zeros(8)}, r"test: labels must be integers"),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, int)}, "no images"),
        ({"y_train": None}, r"cifar10.npz: has no array y_train"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, change, message):
    arrays = cifar_arrays() | change
    np.savez(tmp_path / "cifar10.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 10, 5_000, 100_000])
def test_truncated_npz(tmp_path, kept_bytes):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **cifar_arrays())
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(data.DataError, match=r"cifar10.npz: truncated or not an npz file"):
        data.load("cifar10", tmp_path)


def test_a_single_array_is_no_npz(tmp_path):
    with (tmp_path / "cifar10.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(data.DataError, match=r"not an npz file"):
        data.load("cifar10", tmp_path)


def test_missing_and_unknown_data(tmp_path):
    with pytest.raises(data.DataError, match=r"holds neither cifar10.npz nor a TFDS folder"):
        data.load("cifar10", tmp_path)
    with pytest.raises(data.DataError, match=r"unknown data set 'mnist'; .* digits, cifar10"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "classes", "padding"), [("cifar100", 100, 4), ("svhn_cropped", 10, 0)]
)
def test_the_others_by_tfds(name, classes, padding):
    """What TFDS would download; its mock makes the examples."""
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=60):
        found = data.load(name)
    assert [len(split.labels) for split in found[1:]] == [57, 3, 60]
    assert all(split.images.shape[1:] == (32, 32, 3) for split in found[1:])
    assert found.train.labels.max() < found.source.num_classes == classes
    assert found.source.padding == padding
    # Train and validation are the training set, each image once: the mock's test set is the same.
    together = np.concatenate([found.train.images, found.validation.images])
    as_rows = [images.reshape(60, -1) for images in (together, found.test.images)]
    np.testing.assert_array_equal(*(np.unique(rows, axis=0) for rows in as_rows))
    pixels = normalize(jnp.full((1, 1, 1, 3), 255, jnp.uint8), found.source)[0, 0, 0]
    cifar = [
        (1 - m) / s for m, s in zip((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), strict=True)
    ]
    np.testing.assert_allclose(pixels, cifar if name == "cifar100" else [1, 1, 1], rtol=1e-6)


def test_corrupt_tfds_folder(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "tfds" / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"TFDS folder .*tfds: cannot read cifar10 \("):
        data.load("cifar10", tmp_path)


def test_real_cifar10(tmp_path):
    if not (SHARED / "unpack.py").exists():
        pytest.skip("the real CIFAR-10 is not beside this checkout")
    image = pytest.importorskip("PIL.Image")
    strip = sorted((SHARED / "cifar10").glob("[ab]/*.webp"))[0]
    images = np.asarray(image.open(strip).convert("RGB")).reshape(500, 32, 32, 3)
    labels = np.load(SHARED / "cifar10" / "labels.npz")["y_train"][:500]
    arrays: dict[str, Any] = {
        "x_train": images,
        "y_train": labels,
        "x_test": images,
        "y_test": labels,
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    found = data.load("cifar10", tmp_path)
    pixels = found.train.images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), found.source.mean, atol=0.02)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), found.source.std, atol=0.02)


def test_augmentation_crops_and_flips():
    images = jax.random.randint(jax.random.key(0), (64, 6, 5, 3), 1, 256).astype(jnp.uint8)
    crop = jax.jit(random_crop_and_flip, static_argnums=2)
    found = np.asarray(crop(jax.random.key(1), images, 4))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    offsets, flips = set(), 0
    for source, image in zip(padded, found, strict=True):
        crops = {
            source[i : i + 6, j : j + 5][:, ::step].tobytes(): (i, j, step)
            for i in range(9)
            for j in range(9)
            for step in (1, -1)
        }
        i, j, step = crops[image.tobytes()]
        offsets.add((i, j))
        flips += step == -1
    assert len(offsets) > 30
    assert 16 < flips < 48


# --- protocol ---------------------------------------------------------------------------------


def test_schedule_drops_three_times():
    schedule = recipes.make_schedule(1.0, 810)
    steps = (0, 269, 270, 449, 450, 629, 630, 809)
    rates = np.array([schedule(jnp.int32(step)) for step in steps])
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3], rtol=1e-6)


def test_every_method_has_published_or_borrowed_values():
    for name in OPTIMIZERS:
        for dataset, model in (("cifar10", "vgg16"), ("digits", "digits")):
            values = recipes.get_hyperparameters(dataset, model, name)
            assert values.learning_rate > 0
            assert values.weight_decay >= 0
    assert recipes.get_hyperparameters("cifar100", "resnet18", "adamst") == (1e-3, 0.999, 0.0)
    with pytest.raises(ValueError, match="signum: no hyper-parameters; add it to LEARNING_RATES"):
        recipes.get_hyperparameters("cifar10", "vgg16", "signum")


# --- training loop ----------------------------------------------------------------------------


TINY = partial(models.ResNet, widths=(4,), blocks=0)  # compiles fast


def tiny_trainer(optimizer="adamsrt", dtype="float32", kind=Trainer, **options):
    digits = data.load("digits")
    source = digits.source.__class__(**{**vars(digits.source), "padding": 4})
    few = digits._replace(source=source, train=data.Split(*(a[:50] for a in digits.train)))
    spheres = find_filter_spheres(TINY(10), source.shape)
    tx = make_optimizer(optimizer, recipes.make_schedule(1e-2, 12), spheres, 0.99, 1e-3)
    return kind(TINY(10, dtype=jnp.dtype(dtype)), few, tx, 16, **options)


def test_scan_and_single_steps_agree():
    scanned, stepped = (tiny_trainer(scan=scan).run(7, 2) for scan in (True, False))
    np.testing.assert_allclose(scanned.train_loss, stepped.train_loss, rtol=1e-4)
    np.testing.assert_allclose(scanned.validation_accuracy, stepped.validation_accuracy, atol=0.5)
    assert len(scanned.step_time) == len(stepped.step_time) == 2


@pytest.mark.parametrize("scan", [True, False])
def test_devices_share_a_batch(scan):
    """BatchNorm's statistics are the whole batch's: any number of devices gives the same."""
    one, four = (tiny_trainer(scan=scan, devices=jax.devices()[:n]) for n in (1, 4))
    expected, found = (trainer.run(7, 3, test="every") for trainer in (one, four))
    np.testing.assert_allclose(found.train_loss, expected.train_loss, rtol=1e-4)
    assert found.validation_accuracy == expected.validation_accuracy
    assert found.test_accuracy == expected.test_accuracy
    # Each computes on its quarter; what travels is summed, nothing is gathered.
    program = four._train.as_text()
    assert "f32[4,8,8,4]" in program
    assert "f32[16,8,8,4]" not in program
    assert "all-reduce(" in program
    assert "all-gather(" not in program


def test_batches_that_cannot_be_shared():
    with pytest.raises(data.DataError, match="16 images cannot be shared by 3 devices"):
        tiny_trainer(devices=jax.devices()[:3])


@pytest.mark.usefixtures("standard_promotion")  # for Flax's
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_is_that_of_flax(dtype):
    x = jax.random.normal(jax.random.key(0), (8, 5, 5, 6), dtype) * 3 + 1
    options = {"momentum": 0.9, "epsilon": 1e-5, "dtype": dtype}
    ours, flax = (
        {train: norm(use_running_average=not train, **options) for train in (True, False)}
        for norm in (BatchNorm, nn.BatchNorm)
    )
    variables = flax[False].init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours[False].init(jax.random.key(1), x)) == jax.tree.map(
        jnp.shape, variables
    )
    params = jax.tree.map(
        lambda p: p + jax.random.normal(jax.random.key(2), p.shape), variables["params"]
    )
    weights = jax.random.normal(jax.random.key(3), x.shape)

    def outcome(norm):
        def loss(params, x):
            y, new = norm[True].apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (weights * y.astype(jnp.float32)).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        average = norm[False].apply({"params": params, **new}, x)
        return grads, y, new, average

    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    chex.assert_trees_all_close(outcome(ours), outcome(flax), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", recipes.PAPER_METHODS)
def test_few_kernels_compute_the_same(optimizer, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    digits = data.load("digits", limit=50)
    values = recipes.Hyperparameters(0.01, 0.99, 1e-3)
    few, many = (
        build.make_trainer(digits, "tiny", optimizer, values, 2, 16, few_kernels=few)
        for few in (True, False)
    )
    assert len(jax.tree.leaves(few.get_shapes())) <= len(jax.tree.leaves(many.get_shapes()))
    assert few.model.norm is BatchNorm
    np.testing.assert_allclose(few.run(3, 2).train_loss, many.run(3, 2).train_loss, rtol=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_bfloat16_is_for_activations_only():
    trainer, reference = tiny_trainer("adamst", dtype="bfloat16"), tiny_trainer("adamst")
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.get_shapes())} <= {
        np.dtype(np.float32),
        np.dtype(np.int32),
    }
    assert trainer.get_shapes() == reference.get_shapes()
    state, plan = trainer.init(0), trainer.draw_plan(0, 0)
    step = jax.make_jaxpr(trainer.train_step)(state, *trainer.train, plan, np.int32(0))
    lines = [line for line in str(step).splitlines() if "conv_general_dilated" in line]
    assert lines
    assert all(":bf16[" in line for line in lines)
    assert "bf16" not in str([out.aval for out in step.jaxpr.outvars])
    few, many = trainer.run(0, 3).train_loss, reference.run(0, 3).train_loss
    assert few != many
    np.testing.assert_allclose(few, many, rtol=0.02)


def test_test_images_are_looked_at_when_told():
    trainer = tiny_trainer()
    every, best, never = (trainer.run(0, 4, test=when) for when in ("every", "best", "never"))
    assert every.train_loss == best.train_loss == never.train_loss
    assert None not in every.test_accuracy
    assert never.test_accuracy == [None] * 4
    assert every.selected_test_accuracy == best.selected_test_accuracy
    assert every.selected_test_accuracy == every.test_accuracy[every.best_epoch]
    highest = np.maximum.accumulate(best.validation_accuracy)
    new = np.diff(highest, prepend=-1.0) > 0
    assert [accuracy is not None for accuracy in best.test_accuracy] == new.tolist()


def test_several_seeds_in_one_program():
    many, one = tiny_trainer(kind=throughput.ManySeeds, seeds=2), tiny_trainer()
    _, losses, _ = many.train_epoch(many.init(3), 3, 0)
    for i, seed in enumerate((3, 4)):
        np.testing.assert_allclose(losses[:, i].mean(), one.run(seed, 1).train_loss[0], rtol=1e-5)


def test_throughput(tmp_path, capsys, monkeypatch):
    path = tmp_path / "throughput.json"
    words = "--dataset digits --model digits --dtypes float32 --seeds 1 --processes 1 --images 40"
    throughput.main([*words.split(), "--batch-size", "8", "--rounds", "2", "--out", str(path)])
    assert "images/s" in capsys.readouterr().out
    (row,) = json.loads(path.read_text("utf-8"))["ways"]
    seconds = sorted(row["seconds"])
    np.testing.assert_allclose(row["images_per_second"], 40 / np.mean(seconds), rtol=1e-6)
    # A multiplication and an addition for every weight of a convolution and every pixel it makes,
    # forward; twice that backward, but for the pixels. Little else, and less at the borders.
    work = {
        (8, 1, 16): 9,
        (8, 16, 16): 18,
        (4, 16, 32): 10,
        (4, 32, 32): 9,
        (2, 32, 64): 10,
        (2, 64, 64): 9,
    }
    operations = 6 * sum(side**2 * a * b * taps for (side, a, b), taps in work.items())
    assert 0.6 < row["operations_per_image"] / operations < 1.1
    assert 0 < row["fraction_of_peak"] < 1
    with pytest.raises(SystemExit):
        throughput.main(["--images", "100"])
    assert "error: --images 100: fewer than one batch of 128" in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "bytes_per_parameter"), [("adamw", 8), ("adamg_star", 0)])
def test_methods_train_and_report_their_memory(optimizer, bytes_per_parameter):
    trainer = tiny_trainer(optimizer)
    run = trainer.run(0, 1)
    assert np.isfinite(run.train_loss).all()
    assert abs(trainer.state_bytes_per_parameter - bytes_per_parameter) < 0.5
    assert trainer.run(0, 1).train_loss == run.train_loss  # the seed decides everything
    assert trainer.run(1, 1).train_loss != run.train_loss


# --- command line -----------------------------------------------------------------------------


def arguments(tmp_path, **changes):
    options = {
        "--dataset": "digits",
        "--model": "digits",
        "--optimizer": "sgd",
        "--epochs": "2",
        "--seeds": "2",
        "--out": str(tmp_path / "out"),
        "--batch-size": "50",
    }
    options |= {f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()}
    return [word for pair in options.items() for word in pair]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "cifar100"),
        ({"model": "alexnet"}, "resnet20"),
        ({"optimizer": "lion"}, "adamsrt"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"seeds": -1}, "--seeds: must be at least 1, got -1"),
        ({"limit": 0}, "--limit: must be at least 1, got 0"),
        ({"epochs": "many"}, "--epochs: invalid int value: 'many'"),
        ({"learning_rate": "nan"}, "--learning-rate: must be at least 0"),
        ({"limit": 20}, "20 training images are too few for one batch of 50"),
        ({"model": "vgg16"}, "at least 32x32"),
        ({"dataset": "cifar10", "data_dir": "nowhere"}, "nowhere holds neither cifar10.npz"),
        ({"out": __file__}, "--out"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(tmp_path, capsys, changes, message):
    expect_one_error_line(capsys, lambda: train.main(arguments(tmp_path, **changes)), message)


def test_diverged_seeds_are_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "digits", TINY)
    assert train.main(arguments(tmp_path, learning_rate=1e30)) == 0
    out = capsys.readouterr().out
    assert "seed 0: diverged in epoch 1" in out
    assert "sgd: 2 of 2 seeds diverged" in out
    record = json.loads((tmp_path / "out" / "digits_digits_sgd.json").read_text("utf-8"))
    assert [run["diverged"] for run in record["runs"]] == [True, True]
    assert record["runs"][1]["train_loss"][-1] is None
    assert record["recipe"]["learning_rate"] == 1e30
    assert not list((tmp_path / "out").glob("*.tmp"))


# --- reports ----------------------------------------------------------------------------------


def result(label, accuracies):
    runs = [
        Run(seed, [0.1], [90.0], [accuracy], [0.01], diverged=accuracy is None)
        for seed, accuracy in enumerate(accuracies)
    ]
    return report.Result(label, label, 0.1, 4.0, runs)


def test_verdict_follows_the_numbers():
    noisy = write_verdict([result("A", [90.0, 92.0, 94.0]), result("B", [92.5, 90.5, 94.5])])
    assert "B leads A by 0.50: too little to rank them" in " ".join(noisy.split())
    # The seeds move both alike: what is left between them is the methods' difference.
    shared = write_verdict([result("A", [90.0, 92.0, 94.1]), result("B", [90.5, 92.5, 94.5])])
    assert "B leads A by 0.47: more than that" in " ".join(shared.split())
    diverged = write_verdict([result("A", [90.0, None, 94.0]), result("B", [90.5, 92.5, 94.5])])
    assert "nothing to compare" in diverged


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    with show_progress(100) as advance:
        for part in range(100):
            advance(f"part {part}")
    assert len(capsys.readouterr().err.splitlines()) == LINES


def test_the_committed_grid_decides_the_demo():
    grid = json.loads(demo_grid.PATH.read_text("utf-8"))
    assert set(demo_grid.read_chosen_rates()) == set(recipes.PAPER_METHODS)
    for name, cells in grid["cells"].items():
        rates = [cell["learning_rate"] for cell in cells]
        assert tuple(rates) == demo_grid.RATES
        assert grid["chosen"][name] == demo_grid.choose_rate(cells)
        assert rates[0] < grid["chosen"][name] < rates[-1]
