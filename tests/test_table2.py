"""`benchmarks.table2`: nothing is lost, nothing is done twice, and an interrupted run gives the same."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import readme, table2
from benchmarks.reporting import claims, report, studies
from benchmarks.reporting.published import TABLE2
from benchmarks.runs import store as storing
from benchmarks.runs import workers
from benchmarks.runs.plan import Sweep
from benchmarks.training import models, recipes
from benchmarks.training.data import load
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.run import Run
from benchmarks.training.trainer import Trainer

KILLS = int(os.environ.get("KILLS", "2"))
TINY = """
import sys
from functools import partial
from benchmarks import table2
from benchmarks.training import models, recipes
models.MODELS["tiny"] = partial(models.ResNet, widths=(4,), blocks=0)
recipes.COLUMNS["digits/tiny"] = recipes.Column("digits", "tiny", images=50, epochs=4)
"""


def add_column(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", partial(models.ResNet, widths=(4,), blocks=0))
    column = recipes.Column("digits", "tiny", images=50, epochs=4)
    monkeypatch.setitem(recipes.COLUMNS, "digits/tiny", column)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_column(monkeypatch)


def arguments(out, *more, methods=("adamsrt", "sgd"), seeds=2):
    words = ["--columns", "digits/tiny", "--methods", *methods, "--seeds", seeds, "--out", out]
    return [
        str(word) for word in (*words, "--batch-size", 16, "--devices", 1, "--save-every", 0, *more)
    ]


def outcomes(out):
    """All results by name, but for times, which differ, and what tells where they were made."""
    found = {}
    for path in sorted(Path(out).glob("digits_tiny/*.json")):
        content = json.loads(path.read_text("utf-8"))
        del content["run"]["step_time"]
        found[path.name] = content["recipe"], content["run"]
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a sweep without any interruption."""
    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        add_column(patch)
        assert table2.main(arguments(out)) == 0
    return out


@pytest.fixture(scope="module")
def expected(uninterrupted):
    """What the sweep gives without any interruption."""
    assert len(outcomes(uninterrupted)) == 4
    return outcomes(uninterrupted)


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)


def test_what_is_there_is_not_run_again(tmp_path, capsys, monkeypatch, expected):
    assert table2.main(arguments(tmp_path)) == 0
    first = capsys.readouterr().out
    assert "Adam w/o (abc)" in first
    assert outcomes(tmp_path) == expected
    monkeypatch.setattr(Trainer, "run", None)
    assert table2.main(arguments(tmp_path)) == 0
    assert capsys.readouterr().out == first
    names = {path.name for path in tmp_path.iterdir()}
    figure = "digits_tiny_4epochs_batch16_50images_training_loss.png"
    assert names == {"digits_tiny", figure, "locks", "unfinished"}
    assert not list(tmp_path.glob("unfinished/*/*"))


def test_each_method_once(tmp_path, capsys, expected):
    assert table2.main(arguments(tmp_path, methods=("sgd", "adamsrt", "sgd"))) == 0
    assert outcomes(tmp_path) == expected
    assert capsys.readouterr().out.count("(2)") == 2


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, epoch, error=Interrupted):
    """Stops the first run that gets there, after its checkpoint."""
    save = storing.Checkpoints.save

    def stop(self, run, state, wall_seconds):
        save(self, run, state, wall_seconds)
        if len(run.train_loss) == epoch:
            raise error

    monkeypatch.setattr(storing.Checkpoints, "save", stop)


def test_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch, expected):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            table2.main(arguments(tmp_path))
    assert not outcomes(tmp_path)
    epochs, train = [], Trainer.train_epoch
    capsys.readouterr()
    count = lambda self, *rest: epochs.append(1) or train(self, *rest)  # noqa: E731
    monkeypatch.setattr(Trainer, "train_epoch", count)
    assert table2.main(arguments(tmp_path)) == 0
    assert outcomes(tmp_path) == expected
    assert len(epochs) == 4 * 4 - 2
    said = capsys.readouterr().err
    assert "0 runs are there, 4 to be done" in said
    assert said.count("_seed0: goes on after epoch 2") == 1
    assert said.count(" left\n") == 4


def test_ctrl_c(tmp_path, capsys, monkeypatch, expected):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, KeyboardInterrupt)
        with pytest.raises(SystemExit) as stop:
            table2.main(arguments(tmp_path))
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("the same command goes on from the last checkpoints\n")
    assert table2.main(arguments(tmp_path)) == 0
    assert outcomes(tmp_path) == expected


@pytest.mark.parametrize("left", [1, 0])
def test_corrupt_checkpoints(tmp_path, capsys, monkeypatch, expected, left):
    """The last one is passed over for the one before it, or for the start."""
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Interrupted):
            table2.main(arguments(tmp_path))
    checkpoints = sorted(tmp_path.glob("unfinished/digits_tiny/*/[0-9]*"))
    assert [path.name for path in checkpoints] == ["2", "3"]
    for path in checkpoints[left:]:
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(b"no checkpoint")
    assert table2.main(arguments(tmp_path)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is corrupt (" in line]
    assert len(said) == 2 - left
    assert "checkpoint of epoch 3 is corrupt (" in said[0]
    assert outcomes(tmp_path) == expected


def edited(place, value):
    """A result that was changed by hand."""

    def edit(text):
        content = json.loads(text)
        part, key = place
        content[part][key] = value
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:99],
        lambda text: '{"run": {}}',
        lambda text: "[]",
        edited(("recipe", "learning_rate"), 7.0),
        edited(("run", "train_loss"), [1.0, 1.0]),
        edited(("run", "test_accuracy"), ["high"] * 4),
    ],
)
@pytest.mark.usefixtures("finished")
def test_a_corrupt_result_is_put_aside(tmp_path, capsys, expected, damage):
    damaged = sorted(tmp_path.glob("digits_tiny/*.json"))[0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("digits_tiny/*.json")}
    content = damage(damaged.read_text("utf-8"))
    damaged.write_text(content, "utf-8")
    capsys.readouterr()
    assert table2.main(arguments(tmp_path)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no result of a run" in line]
    assert len(said) == 1
    assert damaged.name in said[0]
    assert damaged.with_suffix(".corrupt").read_text("utf-8") == content
    assert outcomes(tmp_path) == expected
    for path, time_before in before.items():
        assert path == damaged or path.stat().st_mtime_ns == time_before


@pytest.mark.parametrize("what", ["result", "checkpoint"])
def test_a_full_disk(tmp_path, capsys, monkeypatch, expected, what):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if what == "result":
            patch.setattr(report, "write_json", full)
        else:
            patch.setattr(storing.ocp.CheckpointManager, "save", full)
        with pytest.raises(SystemExit) as stop:
            table2.main(arguments(tmp_path))
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert error[0].endswith(": No space left on device")
    assert table2.main(arguments(tmp_path)) == 0
    assert outcomes(tmp_path) == expected


@pytest.mark.usefixtures("finished")
def test_a_result_that_may_not_be_read_stays(tmp_path, capsys, monkeypatch, expected):
    name = sorted(expected)[0]
    read = Path.read_text

    def forbidden(self, *rest, **more):
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", forbidden)
        with pytest.raises(SystemExit):
            table2.main(arguments(tmp_path))
    assert f"{name}: Permission denied" in capsys.readouterr().err
    assert outcomes(tmp_path) == expected


def test_data_are_looked_at_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "run", None)
    columns = ["--columns", "digits/tiny", "svhn_cropped/resnet18", "--data-dir", str(tmp_path)]
    for more, message in (
        (columns, "holds neither svhn_cropped.npz nor"),
        (["--images", 201], "digits: 200 training images, not 201"),
        (["--seeds", 101], "--seeds 101: at most 100, the seed of the grid"),
        (["--batch-size", 56], "digits: 50 training images are too few for one batch of 56"),
    ):
        with pytest.raises(SystemExit) as stop:
            table2.main(arguments(tmp_path / "out", *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_other_data_of_the_same_name(tmp_path, capsys, monkeypatch, expected):
    """Neither a result nor a checkpoint of other images is taken for one of these."""

    def refused(out):
        with pytest.raises(SystemExit) as stop:
            table2.main(arguments(out))
        return stop.value.code == 2 and "made with other data" in capsys.readouterr().err

    def forget():
        table2.load_training_data.cache_clear()
        table2._make_trainer.cache_clear()

    def backwards(name, data_dir):
        data = load(name, data_dir)
        return data._replace(train=data.train._replace(images=data.train.images[::-1]))

    results, checkpoints = tmp_path / "results", tmp_path / "checkpoints"
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(table2, "load", backwards)
        assert table2.main(arguments(results)) == 0
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            table2.main(arguments(checkpoints))
    forget()
    kept = outcomes(results)
    assert kept.keys() == expected.keys()
    assert kept != expected
    assert refused(results)
    assert outcomes(results) == kept
    assert refused(checkpoints)
    assert not outcomes(checkpoints)


def test_unreadable_data(tmp_path, capsys, monkeypatch):
    column = recipes.Column("cifar10-16", "tiny", epochs=1)
    monkeypatch.setitem(recipes.COLUMNS, "digits/tiny", column)
    (tmp_path / "cifar10.npz").write_bytes(b"PK")
    with pytest.raises(SystemExit):
        table2.main(arguments(tmp_path / "out", "--data-dir", tmp_path))
    assert "cifar10.npz: truncated or not an npz file" in capsys.readouterr().err


def test_what_another_process_has_is_left_to_it(tmp_path, capsys):
    store = storing.Store(tmp_path, print)
    args = table2.make_parser().parse_args(arguments(tmp_path))
    job = Sweep(table2.make_setting(args), store).list_jobs("digits/tiny")[0]
    path = tmp_path / "locks" / f"{job.name}.lock"
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path):
        assert table2.main(arguments(tmp_path)) == 0
    assert len(outcomes(tmp_path)) == 3
    assert "1 runs are not finished" in capsys.readouterr().out
    assert store.read_result(job) is None


def test_the_grid_waits_for_its_last_cell(tmp_path, monkeypatch):
    """What another process gives up is taken over; before that, nothing of the table is trained."""
    store = storing.Store(tmp_path, print)
    args = table2.make_parser().parse_args(arguments(tmp_path, methods=["sgd"], seeds=1))
    cell = Sweep(table2.make_setting(args), store).list_grid_jobs("digits/tiny")[2]
    path = tmp_path / "locks" / f"{cell.name}.lock"
    path.parent.mkdir(parents=True)
    lock = filelock.FileLock(path)
    lock.acquire()
    waited = []

    def give_up(seconds):
        waited.append({recipe["seed"] for recipe, _ in outcomes(tmp_path).values()})
        lock.release()

    monkeypatch.setattr(workers.time, "sleep", give_up)
    assert table2.main(arguments(tmp_path, "--grid", methods=["sgd"], seeds=1)) == 0
    assert waited == [{recipes.GRID_SEED}]
    assert store.read_result(cell) is not None
    assert len(outcomes(tmp_path)) == 10 + 1


def test_diverged_runs_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(recipes.LEARNING_RATES, "sgd", 1e30)
    assert table2.main(arguments(tmp_path)) == 0
    assert "-, 2 diverged" in capsys.readouterr().out
    runs = [run for recipe, run in outcomes(tmp_path).values() if recipe["method"] == "sgd"]
    assert [run["diverged"] for run in runs] == [True, True]


def test_the_grid_chooses(tmp_path, capsys):
    """Only when it is asked for: what is in the folder does not decide what a command trains."""
    assert table2.main(arguments(tmp_path, "--grid", methods=["sgd"], seeds=1)) == 0
    found = [(recipe, run) for recipe, run in outcomes(tmp_path).values()]
    cells = [pair for pair in found if pair[0]["seed"] == recipes.GRID_SEED]
    (final,) = [recipe for recipe, _ in found if recipe["seed"] == 0]
    assert len(cells) == len(recipes.list_grid("sgd")) == 10
    best = max(
        cells, key=lambda pair: (max(pair[1]["validation_accuracy"]), -pair[1]["train_loss"][-1])
    )
    for name in ("learning_rate", "weight_decay", "b2"):
        assert final[name] == best[0][name]
    assert all(set(run["test_accuracy"]) == {None} for _, run in cells)  # never looked at
    assert "weight decays by the grid" in capsys.readouterr().out
    assert table2.main(arguments(tmp_path, methods=["sgd"], seeds=1)) == 0
    published = recipes.get_hyperparameters("digits", "tiny", "sgd")
    assert len(outcomes(tmp_path)) == 10 + 1 + (published.weight_decay != final["weight_decay"])
    assert "as in benchmarks/training/recipes.py" in capsys.readouterr().out


def test_one_program_for_all_rates_decays_and_seeds(tmp_path, caplog):
    def compiled(*more):
        """How often what was compiled meanwhile."""
        caplog.clear()
        with jax.log_compiles():
            assert table2.main(arguments(*more)) == 0
        texts = [record.getMessage() for record in caplog.records]
        found = [re.search(r"Finished XLA compilation of jit\((\w+)\)", text) for text in texts]
        return Counter(match[1] for match in found if match)

    table2._make_trainer.cache_clear()
    first = compiled(tmp_path / "first", "--grid", "--rates", 3, "--decays", 1e-4)
    assert first["train_step"] == 2  # methods
    other = ("--grid", "--rates", 1, 10, "--decays", 1e-3, 1e-2)
    assert compiled(tmp_path / "other", *other) == Counter()
    recipes = [recipe for recipe, _ in outcomes(tmp_path / "other").values()]
    assert len({(r["method"], r["learning_rate"], r["weight_decay"]) for r in recipes}) == 2 * 4
    losses = [run["train_loss"] for _, run in outcomes(tmp_path / "other").values()]
    assert len(set(map(tuple, losses))) == len(losses) == 2 * (4 + 2)  # every value did something


class Clock:
    """In place of the module `time`: a run lasts a minute."""

    def __init__(self, monkeypatch):
        self._now, execute = 0.0, workers.execute

        def in_a_minute(*rest):
            self._now += 60.0
            return execute(*rest)

        monkeypatch.setattr(workers, "execute", in_a_minute)
        monkeypatch.setattr(workers, "time", self)

    def monotonic(self):
        return self._now

    def __getattr__(self, name):
        return getattr(time, name)


def test_no_run_begins_that_would_not_end_in_time(tmp_path, capsys, monkeypatch, expected):
    """An interrupted table has the first seed of all methods; four calls give the table of one."""
    Clock(monkeypatch)
    words = arguments(tmp_path, "--stop-after", 100, seeds=2)
    for done in (1, 2, 3, 4):
        assert table2.main(words) == (0 if done == 4 else table2.TRY_AGAIN)
        assert len(outcomes(tmp_path)) == done
        said = capsys.readouterr()
        assert ("time is up: the same command goes on" in said.err) == (done < 4)
        assert (f"{4 - done} runs are not finished: the time was up" in said.out) == (done < 4)
        if done == 2:
            assert {run["seed"] for _, run in outcomes(tmp_path).values()} == {0}
    assert outcomes(tmp_path) == expected


def test_a_grid_that_the_time_is_too_short_for(tmp_path, capsys, monkeypatch):
    Clock(monkeypatch)
    grid = ("--grid", "--rates", 1, 3, "--decays", 1e-4)
    words = arguments(tmp_path, *grid, "--stop-after", 100, methods=["sgd"], seeds=1)
    for seeds in ([100], [100, 100], [0, 100, 100]):
        status = table2.main(words)
        assert sorted(run["seed"] for _, run in outcomes(tmp_path).values()) == seeds
        assert status == (0 if 0 in seeds else table2.TRY_AGAIN)
        assert ("Test accuracy" in capsys.readouterr().out) == (len(seeds) > 1)  # the grid is done


def test_warm(tmp_path, capsys, monkeypatch):
    """Compiles what a run needs, and measures; the runs after it compile nothing of their own."""
    path = tmp_path / "warm.json"
    assert table2.main(arguments(tmp_path / "out", "--warm", path)) == 0
    assert "digits/tiny, adamsrt: " in capsys.readouterr().out
    found = json.loads(path.read_text("utf-8"))["columns"]
    assert found.keys() == {"digits/tiny"}
    assert found["digits/tiny"].keys() == {"adamsrt", "sgd"}
    for row in found["digits/tiny"].values():
        assert row["images"] == 3 * 16
        assert len(row["epochs"]) == table2.WARM_EPOCHS
        median = sorted(end - start for start, end in row["epochs"])[1]
        np.testing.assert_allclose(row["images_per_second"] * median, 3 * 16)
    assert not outcomes(tmp_path / "out")


@pytest.mark.usefixtures("finished")
def test_results_of_another_platform_are_refused(tmp_path, capsys, monkeypatch, expected):
    monkeypatch.setattr(table2.jax, "default_backend", lambda: "gpu")
    with pytest.raises(SystemExit):
        table2.main(arguments(tmp_path))
    said = capsys.readouterr().err
    assert "made on a cpu, and this is a gpu; give another --out" in said
    assert outcomes(tmp_path) == expected


def test_a_copy_without_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    words = ["--seeds", 1, "--epochs", 1]
    assert table2.main(arguments(tmp_path, *words, methods=["sgd"])) == 0
    (path,) = tmp_path.glob("digits_tiny/*.json")
    assert json.loads(path.read_text("utf-8"))["commit"] == "0123abc"


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_processes_at_one_run(tmp_path, expected, free_port):
    """float32: the two sum in another order, which four epochs make 1e-4 of at most."""
    code = f"{TINY}\ntable2.main(sys.argv[1:])"
    words = arguments(tmp_path)
    place = words.index("--devices")
    del words[place : place + 2]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words, "--distributed", f"localhost:{free_port}", "2", i],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in "01"
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ["SGD-M" in text for text in printed] == [True, False]
    found = outcomes(tmp_path)
    assert found.keys() == expected.keys()
    for name, (recipe, run) in found.items():
        assert recipe == expected[name][0]
        for key in ("train_loss", "validation_accuracy", "test_accuracy"):
            np.testing.assert_allclose(run[key], expected[name][1][key], rtol=1e-4)
        environment = json.loads((tmp_path / "digits_tiny" / name).read_text("utf-8"))[
            "environment"
        ]
        assert environment["devices"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--devices", 9), "--devices 9: there are 8"),
        (("--devices", 3), "--batch-size 16: no multiple of 3 devices"),
        (("--distributed", "localhost:1"), "--distributed: no values, or COORDINATOR:PORT"),
        (("--distributed", "localhost:1", "two", 0), "--distributed: invalid literal for int"),
    ],
)
def test_devices_that_cannot_be(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        table2.main(arguments(tmp_path, *more))
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_page_of_the_results(tmp_path):
    """Every setting is a section of its own, with what was chosen, what came out and what it cost."""
    methods = ["adam", "adamst", "sgd"]
    assert table2.main(arguments(tmp_path, "--grid", methods=methods)) == 0
    assert table2.main(arguments(tmp_path, "--epochs", 1, methods=["sgd"], seeds=1)) == 0
    one, four = studies.list_studies(tmp_path)
    assert one.title == "digits/tiny: 50 training images, 1 epochs, batches of 16, float32"
    assert len(one.jobs) == 1
    assert not one.grid
    assert (len(four.jobs), len(four.grid)) == (3 * 2, 3 * 10)
    assert (
        " --seeds 2 --epochs 4 --images 50 --batch-size 16 --dtype float32 --grid" in four.command
    )
    best = {job.method: (job.learning_rate, job.weight_decay) for job in four.jobs}
    rows = studies.make_accuracy_table(four).splitlines()[2:]
    assert len(rows) == 3
    for row, method in zip(rows, methods, strict=True):
        rate, decay = best[method]
        accuracies = [
            run.selected_test_accuracy for run in four.results[methods.index(method)].runs
        ]
        label = OPTIMIZERS[method].label
        assert row.startswith(f"| {label} | {rate:g} | {decay:g} | {np.mean(accuracies):.2f} ± ")
        assert " (2) | " in row
    grid = studies.make_grid_table(four).splitlines()
    assert [line.count("**") for line in grid] == [0, 0, 2, 2, 2]
    assert "36 runs" in studies.describe_cost(four)
    assert (
        studies.make_claims_table(four).count("\n") == 1 + 3
    )  # AdamST and Adam: accuracy, speed twice
    with pytest.raises(SystemExit, match="0 places for the section table2"):
        readme.render(next(iter(readme.PAGES)), "no markers")


def test_claims():
    """The paper's words against runs whose differences are known."""
    scatter = np.array([0.3, -0.2, 0.1, -0.1])

    def runs(accuracy, *losses):
        return {
            i: Run(i, [loss * np.exp(s) for loss in losses], [50.0], [accuracy + s])
            for i, s in enumerate(scatter)
        }

    def findings():
        return {(f.claim.quantity, f.claim.words): f for f in claims.judge_claims(table)}

    table = {"adam": runs(50.0, 0.1), "adams": runs(51.0, 0.1), "adamw": runs(50.5, 0.2)}
    table["adams"][2].test_accuracy[0] += 0.2
    table["adamsrt"] = {i: Run(i, [0.1], [50.0], [50.0 + 0.4 * (-1) ** i]) for i in range(4)}
    found = findings()
    assert len(found) == 3  # those of the methods that are there
    better = found[claims.ACCURACY, "(a) neutralised: better accuracy"]
    assert (better.verdict, better.seeds) == ("agrees", 4)
    interval = stats.ttest_1samp([1.0, 1.0, 1.2, 1.0], 0).confidence_interval(0.95)
    ours = better.difference - better.halfwidth, better.difference + better.halfwidth
    np.testing.assert_allclose(ours, interval, rtol=1e-9)
    assert better.describe() == f"+1.05 ± {better.halfwidth:.2f} points"
    worse = found[claims.ACCURACY, "AdamW†: worse generalisation than Adam"]
    assert worse.verdict == "the opposite"
    np.testing.assert_allclose(worse.difference, -0.5, rtol=1e-9)
    level = found[claims.ACCURACY, "(abc): Table 2 has it above Adam"]
    assert level.verdict == "not told apart from chance"

    # A claim about all others is worth what it is against the one that speaks against it most.
    table = {name: runs(50.0 - (name == "adamw"), 0.1, 0.1, 0.1) for name in claims.PAPER}
    table["adams"] = runs(48.5, 0.1, 0.1, 0.1)
    # AdamW at twice the loss of the others at the full rate, and a tenth of it afterwards.
    table["adamw"] = runs(49.0, 0.2, 0.01, 0.01)
    found = findings()
    worst = found[claims.ACCURACY, "AdamW†: overall worst generalisation"]
    assert (worst.name_methods(), worst.verdict) == ("Adam w/o (a) - AdamW†", "the opposite")
    early, late = (
        found[quantity, "AdamW† is the fastest"] for quantity in (claims.FULL_RATE, claims.WHOLE)
    )
    assert (early.describe(), early.verdict) == ("x 2.00 (2.00 to 2.00)", "the opposite")
    assert (late.describe(), late.verdict) == ("x 0.27 (0.27 to 0.27)", "agrees")
    table["adams"][0].diverged = True
    assert findings()[claims.ACCURACY, "(a) neutralised: better accuracy"].seeds == 3


def test_published_table():
    assert len(TABLE2) == 7 * 6
    assert TABLE2["cifar10/resnet20", "adamst"] == (91.92, 0.18)
    assert TABLE2["svhn_cropped/vgg16", "adamsrt"] == (95.82, 0.05)
    assert {column for column, _ in TABLE2} < set(recipes.COLUMNS)


def test_killed_at_random(tmp_path, expected):
    """`kill -9` at random moments, then once to the end: as if nothing had happened."""
    code = f"{TINY}\ntable2.main({arguments(tmp_path)!r})"
    random_ = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        time.sleep(random_.uniform(2, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert outcomes(tmp_path) == expected
    assert not list(tmp_path.glob("**/*.corrupt"))
