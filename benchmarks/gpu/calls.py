"""The two calls: what each does in which order, how long every part may take, and what it decides."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import luggage, parcels, settings, stages
from benchmarks.gpu.stages import Call, CallError, Command, read_commit

RESULTS = stages.ROOT / "benchmarks" / "results" / "gpu"
STARTING = 20  # seconds until a command begins to train, at most
FASTER = 1.03  # flags are chosen if they are faster by this factor; repetitions differ by less
TOGETHER = 1.15  # two processes are chosen if they are faster than one by this factor
PAIR_EPOCHS = 15  # an epoch counts only if the other process trains during all of it
METHOD = "adamsrt"  # its speed decides the choice

# The limits of the stages, in seconds.
CHECK, FIRST_COMPILE, COMPILE, NUMBERS, STEP_TIMES, ALONE, UNPACK = 60, 100, 110, 60, 80, 45, 60


def first(call: Call) -> None:
    """Numbers, then times; compiles what the second call trains."""
    setting, keep = call.setting, call.keep
    device = check(call)
    _take_half(call, "a")
    call.say(luggage.take_cache(stages.CARRIED / "cache.tar", keep / "cache", device))
    (keep / "cache" / luggage.MADE_BY).write_text(json.dumps(device), "utf-8")
    results = _prepare_results(call, device)
    chosen = _read_choice(results)
    # A program is compiled for its flags, and training may use any of the flags.
    flags = setting.flags if chosen is None else [chosen["flags"]]
    programs = [_make_compile(call, method, one) for one in flags for method in setting.methods]
    if chosen is None:
        programs += [_make_compile(call, METHOD, flags[0], dtype) for dtype in setting.other_dtypes]
    numbers = Command("precision", "benchmarks.precision", ["--out", results / "precision.json"])
    go = keep / "go"
    go.unlink(missing_ok=True)
    steps = [_make_speed(call, model, go, results) for model in setting.models]
    # One method compiles alone, because XLA chooses between convolutions by timing them. The other
    # methods take its choice from the cache. The numbers need little of the GPU.
    call.begin(numbers)
    call.run_stage(FIRST_COMPILE, programs[0])
    call.begin(*steps)
    call.run_stage(COMPILE, *programs[1:])
    call.finish(NUMBERS, numbers)
    go.touch()  # now nothing else runs, and the processes time their steps one after the other
    call.finish(STEP_TIMES, *steps)
    if chosen is None:
        choose(call, device, results)


def second(call: Call) -> None:
    """Trains: the grid, then the seeds in turn over the methods, until the time is up."""
    keep = call.keep
    device = check(call)
    _take_half(call, "b")
    if lost := parcels.list_missing(keep / "data"):
        raise CallError(
            f"half {' and '.join(lost)} of the data is not here: run `first` before, on the same machine"
        )
    results = _prepare_results(call, device)
    call.run_stage(UNPACK, Command("unpack", "benchmarks.gpu", ["unpack", "--keep", keep]))
    chosen = _read_choice(results)
    if chosen is None:  # later calls must train in the same way, because one table has one way
        chosen = {"flags": call.setting.flags[0], "processes": 1, "why": "nothing was measured"}
        _write_json(results / "choice.json", chosen)
    seconds = int(call.count_seconds_left())
    if seconds < STARTING:
        raise CallError("no time is left to train")
    commands = [
        _make_table2(call, f"training_{i}", ["--stop-after", seconds - STARTING], chosen["flags"])
        for i in range(chosen["processes"])
    ]
    call.run_stage(seconds, *commands)
    _, found, table = call.read_log("training_0").rpartition("Learning rates and weight decays")
    print(found + table, flush=True)


def check(call: Call) -> dict[str, Any]:
    """Describes the device; raises CallError without a GPU, or if a package is not installed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check"],
        cwd=stages.ROOT,
        env=call.environment,
        capture_output=True,
        text=True,
        timeout=CHECK * call.setting.patience,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CallError(f"this machine cannot do it: {lines[-1] if lines else done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["platform"] != call.setting.platform:
        raise CallError(f"no GPU: JAX finds {found['device']}, a {found['platform']}")
    call.say(
        f"{found['device']}, JAX {found['jax']}, {os.cpu_count()} cores, commit {read_commit()[:7]}"
    )
    return found


def choose(call: Call, device: Mapping[str, Any], results: Path) -> None:
    """Chooses XLA's flags and the number of processes by images per second, once for all tables.

    The choice is committed with the results, and later calls keep to it. Flags with which training fails
    are not chosen. There is no choice if the time was too short or plain training could not be measured.
    """
    plain, *others = call.setting.flags
    speeds = {flags: _time_alone(call, _make_measure(call, flags)) for flags in (plain, *others)}
    fastest = _pick_flags(speeds)
    pair = [_make_measure(call, fastest, place=place, epochs=PAIR_EPOCHS) for place in "01"]
    for command in pair:
        _locate_warm_file(call, command.name).unlink(missing_ok=True)
    call.run_stage(ALONE, *pair)
    both = count_together([_read_times(call, command) for command in pair])
    call.say(f"images/s: {speeds}, two at once {both:.0f}")
    if call.count_seconds_left() <= 0 or not speeds[plain]:
        call.say("nothing chosen: not everything could be measured")
        return
    content = decide(call.setting, device, read_commit(), speeds, both)
    _write_json(results / "choice.json", content)
    call.say(f"chosen: flags {content['flags']!r}, {content['processes']} at once")
    for dtype in call.setting.other_dtypes:  # decides nothing, and comes last
        speed = _time_alone(call, _make_measure(call, dtype=dtype))
        call.say(f"images/s in {dtype}: {speed:.0f}")
        content["images_per_second"]["dtypes"][dtype] = speed
        _write_json(results / "choice.json", content)


def decide(
    setting: settings.Setting,
    device: Mapping[str, Any],
    commit: str,
    speeds: Mapping[str, float],
    both: float,
) -> dict[str, Any]:
    """The choice, with the measurements: images per second by flags, and of two processes together."""
    fastest = _pick_flags(speeds)
    return {
        "device": device,
        "commit": commit,
        "setting": f"{setting.column}, {METHOD}, {setting.dtype}",
        "images_per_second": {"flags": speeds, "dtypes": {}, "two processes": both},
        "flags": fastest,
        "processes": 2 if both > TOGETHER * speeds[fastest] else 1,
    }


def _pick_flags(speeds: Mapping[str, float]) -> str:
    plain, fastest = next(iter(speeds)), max(speeds, key=lambda flags: speeds[flags])
    return fastest if speeds[fastest] > FASTER * speeds[plain] else plain


def count_together(found: Sequence[Mapping[str, Any] | None]) -> float:
    """Images per second of processes side by side, in epochs during which all processes train."""
    if not all(row and row["epochs"] for row in found):
        return 0.0
    rows = [row for row in found if row]
    begin = max(row["epochs"][0][0] for row in rows)
    end = min(row["epochs"][-1][1] for row in rows)
    total = 0.0
    for row in rows:
        inside = [stop - start for start, stop in row["epochs"] if begin <= start and stop <= end]
        if not inside:
            return 0.0
        total += row["images"] / statistics.median(inside)
    return total


def _time_alone(call: Call, command: Command) -> float:
    """Images per second of training alone; 0 if they could not be measured."""
    _locate_warm_file(call, command.name).unlink(
        missing_ok=True
    )  # may be left from an earlier attempt
    call.run_stage(ALONE, command)
    found = _read_times(call, command)
    return found["images_per_second"] if found else 0.0


def _read_times(call: Call, command: Command) -> dict[str, Any] | None:
    try:
        content = json.loads(_locate_warm_file(call, command.name).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content["columns"][call.setting.column][METHOD]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _prepare_results(call: Call, device: Mapping[str, Any]) -> Path:
    """The folder of this kind of device, to which results of earlier calls are added."""

    def copy(source: str, target: str) -> str:
        return target if Path(target).exists() else shutil.copy2(source, target)

    if RESULTS.exists():
        shutil.copytree(RESULTS, call.keep / "results", copy_function=copy, dirs_exist_ok=True)
    found = call.results = call.keep / "results" / device["slug"]
    found.mkdir(parents=True, exist_ok=True)
    return found


def _read_choice(results: Path) -> dict[str, Any] | None:
    try:
        return json.loads((results / "choice.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _make_compile(call: Call, method: str, flags: str = "", dtype: str = "") -> Command:
    """A command that compiles all programs of the method into the cache."""
    name = _join_name("compile", method, dtype, "flags" if flags else "")
    words = ["--methods", method, "--warm", _locate_warm_file(call, name), "--warm-epochs", 0]
    return _make_table2(call, name, words, flags, dtype)


def _make_measure(
    call: Call, flags: str = "", dtype: str = "", place: str = "", epochs: int | None = None
) -> Command:
    """A command that measures images per second."""
    name = _join_name("measure", METHOD, dtype, "flags" if flags else "", place)
    words = ["--methods", METHOD, "--warm", _locate_warm_file(call, name)]
    words += [] if epochs is None else ["--warm-epochs", epochs]
    return _make_table2(call, name, words, flags, dtype)


def _join_name(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _locate_warm_file(call: Call, name: str) -> Path:
    return call.keep / f"{name}.json"


def _make_table2(
    call: Call, name: str, words: Sequence[Any], flags: str = "", dtype: str = ""
) -> Command:
    setting = call.setting
    options = ["--columns", setting.column, "--epochs", setting.epochs]
    options += ["--dtype", dtype or setting.dtype, "--methods", *setting.methods]
    options += ["--grid", "--rates", *setting.rates, "--decays", *setting.decays]
    options += ["--seeds", setting.seeds, "--devices", 1, *setting.more]
    options += ["--data-dir", call.keep / "npz", "--out", call.results / "table2"]
    # A run lasts seconds: to repeat it takes less time than checkpoints.
    options += ["--save-every", 1e9]
    return Command(name, "benchmarks.table2", [*options, *words], flags)


def _make_speed(call: Call, model: str, go: Path, out: Path) -> Command:
    """A command that compiles at once, and measures when the file `go` exists."""
    setting = call.setting
    words = ["--model", model, "--only", *setting.contenders, "--torch"]
    words += ["--rounds", setting.rounds, "--wait-for", go, "--out", out]
    return Command(f"speed_{model}", "benchmarks.speed", words)


def _take_half(call: Call, half: str) -> None:
    """Copies a half of the data into the folder that stays between the calls."""
    if half in parcels.list_missing(stages.CARRIED):
        call.failed.append(f"half {half} of the data was not carried")
        call.say(
            f"{stages.CARRIED / half} is not here: nothing can be trained; prepare it and carry it"
        )
        return
    shutil.copytree(stages.CARRIED / half, call.keep / "data" / half, dirs_exist_ok=True)
