"""The two calls to a lent GPU, without one: what travels, what comes back, and what goes wrong."""

import errno
import json
import os
import sys
import tarfile
import time

import numpy as np
import pytest

from benchmarks import speed, table2
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import calls, check, luggage, parcels, rehearse, settings, stages

DEVICE = {"device": "cpu", "platform": "cpu", "jax": "0.0", "slug": "cpu"}


@pytest.fixture
def npz(tmp_path):
    """More than a strip, and parts that no strip divides."""
    return rehearse.make_random_data(tmp_path / "data") / "cifar10.npz"


def test_halves_are_put_together(tmp_path, npz):
    parcels.pack(npz, tmp_path / "parcel")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parcel").rglob("*")}
    parcels.pack(npz, tmp_path / "parcel")  # what is there is not packed again
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "parcel").rglob("*")}
    with np.load(npz) as expected, np.load(parcels.unpack(tmp_path / "parcel", tmp_path)) as found:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("half", "damage", "message"),
    [
        ("b", lambda p: [f.unlink() for f in p.iterdir()], "b: this half of the data is missing"),
        ("a", lambda p: (p / "000.webp").write_bytes(b"RIFF"), "a: cannot be read"),
        ("b", lambda p: (p / "000.webp").replace(p / "002.webp"), "b: is damaged"),
        ("a", lambda p: (p / "001.webp").unlink(), "a: is damaged"),
    ],
)
def test_a_half_that_is_not_whole(tmp_path, npz, half, damage, message):
    parcels.pack(npz, tmp_path / "parcel")
    damage(tmp_path / "parcel" / half)
    with pytest.raises(parcels.ParcelError, match=message) as error:
        parcels.unpack(tmp_path / "parcel", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def keep(tmp_path):
    folder = tmp_path / "keep"
    for name in ("logs", "results/table2/column", "results/table2/locks", "cache"):
        (folder / name).mkdir(parents=True)
    (folder / "results/table2/column/run.json").write_text("{}")
    (folder / "results/table2/locks/run.lock").write_text("")
    (folder / "logs/training.log").write_text("trained\n")
    (folder / "cache" / luggage.MADE_BY).write_text(json.dumps(DEVICE))
    (folder / "cache/jit_epoch-1-cache").write_bytes(bytes(1000))
    (folder / "cache/jit_epoch-1-atime").write_bytes(b"now")
    (folder / "cache/jit_other-1-cache").write_bytes(bytes(10))
    return folder


def test_what_comes_back_is_taken_in(tmp_path, keep, capsys):
    """Results where pages are made from them, and compiled programs for the next call."""
    luggage.bring_back(keep, tmp_path / "out", print)
    names = ["cache.tar", "log.txt", "results.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    results, carried, cache = (tmp_path / name for name in ("results", "carried", "cache"))
    words = ["--results", str(results), "--carried", str(carried)]
    assert gpu.main(["collect", str(tmp_path / "out"), *words]) == 0
    assert [path.name for path in results.rglob("*.*")] == ["run.json"]  # no locks
    said = luggage.take_cache(carried / "cache.tar", cache, DEVICE)
    assert said == "3 files of compiled programs were carried"
    assert (cache / "jit_epoch-1-cache").stat().st_size == 1000
    said = luggage.take_cache(carried / "cache.tar", tmp_path / "no", DEVICE | {"jax": "9.9"})
    assert "compiled by" in said
    assert "'jax': '9.9'" in said
    assert not (tmp_path / "no").exists()
    (carried / "cache.tar").write_bytes(b"no tar")
    said = luggage.take_cache(carried / "cache.tar", tmp_path / "no", DEVICE)
    assert "no cache of compiled programs" in said
    assert luggage.take_cache(carried / "nowhere", cache, DEVICE).startswith("no compiled")
    assert gpu.main(["collect", str(tmp_path / "nowhere"), *words]) == 2
    assert "nothing came back" in capsys.readouterr().err


def test_only_so_much_of_the_cache_travels(tmp_path, keep, monkeypatch):
    """What was used last."""
    monkeypatch.setattr(luggage, "CACHE", 2048 + 2 * 1024)
    for name, age in (
        ("jit_epoch-1-atime", 0),
        ("jit_epoch-1-cache", 90),
        ("jit_other-1-cache", 60),
    ):
        (keep / "cache" / name).touch()
        os.utime(keep / "cache" / name, times=(time.time() - age,) * 2)
    (keep / "cache/jit_other-1-cache").write_bytes(bytes(3000))
    os.utime(keep / "cache/jit_other-1-cache", times=(time.time() - 60,) * 2)
    luggage.bring_back(keep, tmp_path / "out", lambda _: None)
    with tarfile.open(tmp_path / "out/cache.tar") as tar:
        assert set(tar.getnames()) == {luggage.MADE_BY, "jit_epoch-1-cache"}


def test_a_full_folder(tmp_path, keep, monkeypatch):
    """What fits comes back; the rest is named, and stays."""
    pack = luggage._pack

    def full(path, *rest):
        if path.name.startswith("cache"):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pack(path, *rest)

    monkeypatch.setattr(luggage, "_pack", full)
    with pytest.raises(luggage.FullError, match=r"cannot take cache.tar \(No space left") as error:
        luggage.bring_back(keep, tmp_path / "out", print)
    assert str(keep) in str(error.value)
    names = ["log.txt", "results.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    monkeypatch.setattr(luggage, "LARGEST", 1)
    with pytest.raises(luggage.FullError, match=r"results\.tar\.gz"):
        luggage.bring_back(keep, tmp_path / "small", print)
    assert not list((tmp_path / "small").iterdir())
    assert (keep / "results/table2/column/run.json").exists()


@pytest.fixture
def call(tmp_path, monkeypatch):
    """On a machine where everything is found."""
    carried = tmp_path / ".gpu"
    carried.mkdir()
    (carried / "commit").write_text(f"0123abc {stages.hash_sources()}\n")
    monkeypatch.setattr(stages, "CARRIED", carried)
    monkeypatch.setattr(calls, "RESULTS", tmp_path / "before")
    monkeypatch.setattr(calls, "check", lambda call: DEVICE)
    return stages.Call(settings.SMALL, 1000, tmp_path / "keep", tmp_path / "out")


def record(call, monkeypatch):
    """The commands that the call would have run."""
    found = []
    monkeypatch.setattr(call, "begin", lambda *commands: found.extend(commands))
    return found


def sleeping(name, seconds):
    code = f"import os, time; print(os.environ['COMMIT'], flush=True); time.sleep({seconds})"
    return stages.Command(name, "timeit", ["-n", 1, "-r", 1, code])


def test_what_takes_too_long_is_ended(call, capsys):
    start = time.monotonic()
    call.setting = call.setting._replace(patience=1.0)
    call.run_stage(8.0, sleeping("long", 100), sleeping("short", 0))
    assert time.monotonic() - start < 30
    assert len(call.failed) == 1
    assert call.failed[0].startswith("long: its time was up")
    assert "short: status 0" in capsys.readouterr().out
    assert call.read_log("short").startswith("0123abc\n")
    call._end = 0.0
    call.run_stage(8.0, sleeping("late", 0))
    assert call.failed[-1] == "late: no time"


def test_nothing_goes_on_after_a_call(call):
    call.begin(sleeping("long", 100))
    process = call._running["long"]
    call.end()
    assert process.poll() is not None
    assert not call._running


def test_a_process_that_is_killed_leaves_no_half_entry(tmp_path):
    """JAX would take it for whole at every later time, and never write it again."""
    (tmp_path / "sub").mkdir()
    for name, age in (("old-cache", 60), ("sub/new-cache", 0), ("other", 0)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    luggage.drop_unfinished(tmp_path, seconds=10.0)
    assert {path.name for path in tmp_path.rglob("*")} == {"old-cache", "sub", "other"}


def test_sources_that_have_changed_are_marked(call, tmp_path, monkeypatch):
    assert stages.read_commit() == "0123abc"
    monkeypatch.setattr(stages, "hash_sources", lambda: "another")
    assert stages.read_commit() == "0123abc+"


def timed(images_per_second, begin=0.0, epochs=3):
    """What a process writes whose epochs of 100 images follow each other."""
    seconds = 100 / images_per_second
    times = [(begin + i * seconds, begin + (i + 1) * seconds) for i in range(epochs)]
    return {"images": 100, "images_per_second": images_per_second, "epochs": times}


def test_the_fastest_is_chosen(call, monkeypatch):
    """Images per second decide about flags and processes."""
    column, stages = call.setting.column, []
    speeds = {"adamsrt": 100.0, "adamsrt_flags": 120.0}
    speeds |= {"adamsrt_flags_0": 70.0, "adamsrt_flags_1": 71.0}

    def stage(limit, *commands):
        stages.append([command.name for command in commands])
        for command in commands:
            if speed := speeds[command.name.removeprefix("measure_")]:
                content = {"columns": {column: {"adamsrt": timed(speed)}}}
                (call.keep / f"{command.name}.json").write_text(json.dumps(content))

    def choice():
        path = call.results / "choice.json"
        path.unlink(missing_ok=True)
        calls.choose(call, DEVICE, call.results)
        content = json.loads(path.read_text()) if path.exists() else None
        return content and (content["flags"], content["processes"])

    monkeypatch.setattr(call, "run_stage", stage)
    assert choice() == (call.setting.flags[1], 2)
    assert stages[-1] == ["measure_adamsrt_flags_0", "measure_adamsrt_flags_1"]
    call.setting = call.setting._replace(other_dtypes=("bfloat16",))
    speeds["adamsrt_bfloat16"] = 90.0
    assert choice() == (call.setting.flags[1], 2)
    content = json.loads((call.results / "choice.json").read_text())
    assert content["images_per_second"]["dtypes"] == {"bfloat16": pytest.approx(90.0)}
    speeds |= {"adamsrt_flags": 102.0, "adamsrt_0": 50.0, "adamsrt_1": 60.0}
    assert choice() == ("", 1)
    speeds |= {"adamsrt_flags": 0.0, "adamsrt_0": 0.0}  # neither runs
    assert choice() == ("", 1)
    speeds["adamsrt"] = 0.0  # what an earlier attempt wrote does not count
    assert choice() is None
    speeds["adamsrt"] = 100.0
    call._end = 0.0
    assert choice() is None


def test_processes_together():
    """Only epochs count through which the other process trains, too."""
    both = [timed(50.0, begin, epochs=15) for begin in (0.0, 3.0)]
    assert calls.count_together(both) == pytest.approx(100.0)
    # Nothing gained: 50 images/s while both train, and 100 alone, before and after.
    first = timed(100.0, 0.0, 2)["epochs"] + timed(50.0, 2.0, 4)["epochs"]
    second = timed(50.0, 2.0, 4)["epochs"] + timed(100.0, 10.0, 2)["epochs"]
    rows = [{"images": 100, "epochs": epochs} for epochs in (first, second)]
    assert calls.count_together(rows) == pytest.approx(100.0)
    assert calls.count_together([timed(50.0, 0.0), timed(50.0, 100.0)]) == 0.0
    assert calls.count_together([timed(50.0), None]) == 0.0


def test_calls_go_on_where_the_last_ended(call, npz, monkeypatch, capsys):
    """Training begins from committed results, and a committed choice is kept."""
    parcels.pack(npz, stages.CARRIED)
    before, choice = calls.RESULTS / "cpu", {"flags": "--some_flag", "processes": 2}
    (before / "table2").mkdir(parents=True)
    (before / "choice.json").write_text(json.dumps(choice))
    (before / "table2/run.json").write_text("{}")
    (before / "precision.json").write_text("old")
    found = record(call, monkeypatch)
    calls.first(call)
    trained = [command for command in found if command.module == "benchmarks.table2"]
    assert {command.name.partition("_")[0] for command in trained} == {"compile"}
    assert {command.flags for command in trained} == {"--some_flag"}
    assert [c.name for c in found if "precision" in c.name] == ["precision"]
    (call.results / "precision.json").write_text("new")
    found.clear()
    (call.keep / "logs/training_0.log").write_text("Learning rates and weight decays: done\n")
    calls.second(call)
    assert [command.name for command in found] == ["unpack", "training_0", "training_1"]
    assert {command.flags for command in found[1:]} == {"--some_flag"}
    assert (call.keep / "results/cpu/table2/run.json").exists()
    assert (call.results / "precision.json").read_text() == "new"
    assert "weight decays: done" in capsys.readouterr().out


def test_training_without_a_choice(call, npz, monkeypatch):
    """Is plain, and stays so: one table has one way to train. Without time, nothing begins."""
    parcels.pack(npz, stages.CARRIED)
    found = record(call, monkeypatch)
    calls._take_half(call, "a")
    calls.second(call)
    assert [command.name for command in found] == ["unpack", "training_0"]
    choice = json.loads((call.results / "choice.json").read_text())
    assert (choice["flags"], choice["processes"]) == ("", 1)
    call._end = time.monotonic() + stages.PACKING + calls.STARTING - 5
    with pytest.raises(stages.CallError, match="no time is left to train"):
        calls.second(call)


def test_commands_have_options_that_there_are(call, monkeypatch):
    found = record(call, monkeypatch)
    for setting in (settings.Setting(), settings.SMALL):
        call.setting = setting
        (call.keep / "results/cpu/choice.json").unlink(missing_ok=True)
        calls.first(call)
        assert set(setting.contenders) <= set(speed.make_optimizers(None, 0.0))
    parser = table2.make_parser()
    trained = [command.words for command in found if command.module == "benchmarks.table2"]
    assert trained
    for words in trained:
        parser.parse_args([str(word) for word in words])
    modules = {"benchmarks.table2", "benchmarks.precision", "benchmarks.speed"}
    assert {command.module for command in found} == modules
    assert len({command.name for command in found}) > 15


def test_a_missing_half(call, npz, monkeypatch):
    """The first call measures all the same; the second says what is missing."""
    parcels.pack(npz, stages.CARRIED)
    (stages.CARRIED / "a" / parcels.ABOUT).unlink()
    found = record(call, monkeypatch)
    calls.first(call)
    assert call.failed == ["half a of the data was not carried"]
    assert found
    with pytest.raises(
        stages.CallError, match="half a of the data is not here: run `first` before"
    ):
        calls.second(call)


@pytest.mark.parametrize("small", [[], ["--small"]])
def test_no_gpu(tmp_path, monkeypatch, capsys, small):
    """One line; what earlier calls left comes back."""
    (tmp_path / ".gpu").mkdir()
    (tmp_path / ".gpu/commit").write_text("0123abc digest")
    monkeypatch.setattr(stages, "CARRIED", tmp_path / ".gpu")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform" if small else "cpu")
    monkeypatch.setattr(calls, "_take_half", pytest.fail)
    assert gpu.main(["second", "100", *small, "--keep", str(tmp_path / "keep")]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert ("this machine cannot do it: no device" if small else "no GPU: JAX finds cpu") in line
    assert (tmp_path / "out/results.tar.gz").exists()


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match="not installed: rich"):
        check.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "--data-dir", "nowhere"], "nowhere/cifar10.npz is not there"),
        (["prepare", "--data-dir", "junk"], "junk/cifar10.npz: is no data set"),
        (["collect", "junk"], "junk/results.tar.gz: is no archive"),
        (["first", "nan"], "argument seconds: must be at least 60.0, got nan"),
        (["first", "100"], "OUT does not name the folder"),
        (["second", "100", "--keep", "here"], "commit is missing: run `prepare`, and carry it"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "CARRIED", tmp_path / ".gpu")
    monkeypatch.delenv("OUT", raising=False)
    if "second" in words:
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/cifar10.npz").write_bytes(b"PK")
    (tmp_path / "junk/results.tar.gz").write_bytes(b"junk")
    monkeypatch.setattr(gpu, "_git", lambda *_: "")
    with pytest.raises(SystemExit, match="2"):
        sys.exit(gpu.main(words))
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_prepare(tmp_path, npz, monkeypatch, capsys):
    git = {"status": "", "rev-parse": "0123abc", "ls-files": "README.md"}
    monkeypatch.setattr(gpu, "_git", lambda word, *_: git[word])
    words = ["prepare", "--data-dir", str(npz.parent), "--folder", str(tmp_path / ".gpu")]
    assert gpu.main(words) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("MiB travel; carry .gpu/commit .gpu/a")
    assert second.endswith("MiB travel; carry .gpu/commit .gpu/b")
    name, digest = (tmp_path / ".gpu/commit").read_text().split()
    assert (name, digest) == ("0123abc", stages.hash_sources())
    (tmp_path / ".gpu/b/000.webp").unlink()  # is noticed, and made again
    assert gpu.main(words) == 0
    assert (tmp_path / ".gpu/b/000.webp").exists()
    capsys.readouterr()
    monkeypatch.setattr(gpu, "LIMIT", 1000)
    assert gpu.main(words) == 2
    assert "first: more than" in capsys.readouterr().err
    git["status"] = " M README.md"
    assert gpu.main(words) == 2
    assert "commit first" in capsys.readouterr().err


def test_a_rehearsal_fails_when_it_should(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    compiled = "Finished XLA compilation of jit(train_step) in 1 sec\n"
    cached = "Persistent compilation cache hit for 'jit_train_step' with key 1\n"
    (logs / "training_0.log").write_text(compiled + cached + compiled)
    with pytest.raises(rehearse.Failure, match="compiled what was compiled for it before"):
        rehearse.check_logs(tmp_path, 2)
    (logs / "training_0.log").write_text(2 * (cached + compiled))
    rehearse.check_logs(tmp_path, 2)
    with pytest.raises(rehearse.Failure, match="2 compilations of training"):
        rehearse.check_logs(tmp_path, 1)
    (logs / "compile_adam.log").write_text("x.py:1: DeprecationWarning: old\n")
    with pytest.raises(rehearse.Failure, match=r"compile_adam.log: .*DeprecationWarning"):
        rehearse.check_logs(tmp_path, 2)
    run = tmp_path / "table2" / "cifar10-16_resnet8"
    run.mkdir(parents=True)
    with pytest.raises(rehearse.Failure, match="0 runs"):
        rehearse.check_results(tmp_path, settings.SMALL, "0123abc")
    for i in range(8):
        (run / f"{i}.json").write_text(json.dumps({"commit": None if i else "0123abc"}))
    with pytest.raises(rehearse.Failure, match="commits"):
        rehearse.check_results(tmp_path, settings.SMALL, "0123abc")


@pytest.mark.parametrize(
    ("words", "models"),
    [([], settings.Setting().models), (["--models"], []), (["--models", "gpt2"], ["gpt2"])],
)
def test_models_whose_step_times_are_measured(tmp_path, monkeypatch, words, models):
    """A quarter of an hour that has to go on with the training names none."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(stages, "read_commit", lambda: "0")
    seen = []
    monkeypatch.setattr(calls, "first", lambda call: seen.append(call.setting.models))
    assert gpu.main(["first", "60", "--keep", str(tmp_path / "keep"), *words]) == 0
    assert seen == [models]
