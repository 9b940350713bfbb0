"""The two calls: what each does in which order, how long every part may take, and what it decides.

This process starts the others, ends them when their time is up, and packs what came of them. It never
touches the GPU itself, so that whatever happens there it can still bring back the rest.
"""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import luggage, parcels
from benchmarks.training import recipes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CARRIED = ROOT / ".gpu"
PACKING = 12  # seconds at the end
STARTING = 20  # seconds that a command may take before it begins to train
FASTER = 1.03  # by which something has to be to be chosen: repetitions differ by less
TOGETHER = 1.15  # by which two processes have to be faster than one
PAIR_EPOCHS = 15  # of which only those count that the other process trains through, too
CONVOLUTIONS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"
METHOD = "adamsrt"  # whose speed decides
TRY_AGAIN = 75  # status of benchmarks.table2: it ended in time, and goes on with the next call

# What each kind of stage may take, in seconds.
CHECK, FIRST_COMPILE, COMPILE, NUMBERS, STEP_TIMES, ALONE, UNPACK = 60, 100, 110, 60, 60, 45, 60


class CallError(Exception):
    """Why a call ends at once; the message is one line."""


class Setting(NamedTuple):
    """What is measured and trained; everything else follows from the repository."""

    column: str = "cifar10/resnet20"
    epochs: int = 10
    dtype: str = "bfloat16"
    methods: Sequence[str] = recipes.PAPER_METHODS
    rates: Sequence[float] = (3.0, 10.0, 30.0)
    decays: Sequence[float] = recipes.GRID_DECAYS
    seeds: int = 5
    more: Sequence[str] = ()  # options of benchmarks.table2
    models: Sequence[str] = ("gpt2", "resnet18", "small", "resnet50")
    contenders: Sequence[str] = (
        "optax.adamw",
        "so.adams",
        "so.adamst",
        "so.adamsrt",
        "so.adamg",
        "so.adamh",
        "so.stacked(so.adamsrt)",
        "so.track(optax.adam, every=10)",
    )
    rounds: int = 11
    flags: Sequence[str] = ("", CONVOLUTIONS)  # of XLA, of which the fastest is chosen
    other_dtypes: Sequence[str] = ("float32",)  # timed beside it
    patience: float = 1.0  # factor of all limits
    platform: str = "gpu"


# For a CPU, in minutes: the same stages and files.
SMALL = Setting(
    column="cifar10-16/resnet8",
    epochs=1,
    dtype="float32",
    methods=("adam", "adamsrt"),
    rates=(3.0, 10.0),
    decays=(5e-4,),
    seeds=2,
    more=("--images", "128", "--batch-size", "64"),
    models=("small",),
    contenders=("so.adamsrt", "so.stacked(so.adamsrt)"),
    rounds=1,
    flags=("", "--xla_cpu_enable_fast_min_max=false"),
    other_dtypes=(),
    patience=6.0,
    platform="cpu",
)


class Command(NamedTuple):
    name: str  # of its log
    module: str
    words: Sequence[Any]
    flags: str = ""  # of XLA


class Call:
    """One call, which has `seconds` from now on."""

    def __init__(self, setting: Setting, seconds: float, keep: Path, out: Path):
        self.setting, self.keep, self.out = setting, keep, out
        self._start = time.monotonic()
        self._end = self._start + seconds
        self.failed: list[str] = []
        self.results = keep / "results"  # then that of the device
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("logs", "results", "cache", "data"):
            (keep / name).mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "COMMIT": read_commit(),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the card
            "JAX_COMPILATION_CACHE_DIR": str(keep / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**33),  # or JAX does not note what was used
        }

    def count_seconds_left(self) -> float:
        """Seconds, without those for packing."""
        return self._end - PACKING - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", flush=True)

    def run_stage(self, limit: float, *commands: Command) -> None:
        """All of them side by side, to their end."""
        if self.begin(*commands):
            self.finish(limit, *commands)

    def begin(self, *commands: Command) -> bool:
        """Whether there is time for them."""
        if self.count_seconds_left() <= 0:
            self.failed += [f"{command.name}: no time" for command in commands]
            return False
        self.say(f"begin {', '.join(command.name for command in commands)}")
        for command in commands:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {command.flags}".strip()
            with (self.keep / "logs" / f"{command.name}.log").open("wb") as log:
                self._running[command.name] = subprocess.Popen(
                    [sys.executable, "-m", command.module, *map(str, command.words)],
                    cwd=ROOT,
                    env=self.environment | ({"XLA_FLAGS": flags} if flags else {}),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # of its own, to be ended with all that it has started
                )
        return True

    def finish(self, limit: float, *commands: Command) -> None:
        """Waits for them; what the time is too short for is ended, and the rest goes on."""
        end = time.monotonic() + min(limit * self.setting.patience, self.count_seconds_left())
        for name in (command.name for command in commands if command.name in self._running):
            try:
                status = self._running[name].wait(max(end - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                status = None
                self._kill(name)
            del self._running[name]
            self._report(name, status)

    def end(self) -> None:
        """Of everything that still runs."""
        for name in list(self._running):
            self._kill(name)
            del self._running[name]

    def _kill(self, name: str) -> None:
        process = self._running[name]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            luggage.drop_unfinished(self.keep / "cache", seconds=3.0)

    def read_log(self, name: str) -> str:
        """What a command printed, empty if there was none."""
        path = self.keep / "logs" / f"{name}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def _report(self, name: str, status: int | None) -> None:
        last = next(
            (x for x in reversed(self.read_log(name).splitlines()) if x.strip()), ""
        ).strip()
        what = "its time was up" if status is None else f"status {status}"
        if status not in (0, TRY_AGAIN):
            self.failed.append(f"{name}: {what}, {last}")
        self.say(f"    {name}: {what}; {last[:150]}")


def first(call: Call) -> None:
    """Numbers, then times; compiles what the second call trains."""
    setting, keep = call.setting, call.keep
    device = check(call)
    _take_half(call, "a")
    call.say(luggage.take_cache(CARRIED / "cache.tar", keep / "cache", device))
    (keep / "cache" / luggage.MADE_BY).write_text(json.dumps(device), "utf-8")
    results = _prepare_results(call, device)
    chosen = _read_choice(results)
    # The flags belong to a compiled program: training may take any of these.
    flags = setting.flags if chosen is None else [chosen["flags"]]
    programs = [_make_compile(call, method, one) for one in flags for method in setting.methods]
    if chosen is None:
        programs += [_make_compile(call, METHOD, flags[0], dtype) for dtype in setting.other_dtypes]
    numbers = Command("precision", "benchmarks.precision", ["--out", results / "precision.json"])
    go = keep / "go"
    go.unlink(missing_ok=True)
    steps = [_make_speed(call, model, go, results) for model in setting.models]
    # One method alone, because XLA chooses between convolutions by timing them, and the others take over
    # its choice from the cache. The numbers need little of the GPU.
    call.begin(numbers)
    call.run_stage(FIRST_COMPILE, programs[0])
    call.begin(*steps)
    call.run_stage(COMPILE, *programs[1:])
    call.finish(NUMBERS, numbers)
    go.touch()  # nothing else runs any more: the steps are timed, one process after the other
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
    if chosen is None:  # one table has one way to train
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
    """The device; raises CallError if there is no GPU, or something is not installed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check"],
        cwd=ROOT,
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
    """The flags of XLA, and how many processes at once: by images per second, once for all tables.

    The choice is committed with the results, and later calls keep to it. What does not run is not
    chosen; nothing is if the time was too short, or if plain training could not be measured.
    """
    plain, *others = call.setting.flags
    speeds = {flags: _time_alone(call, _make_measure(call, flags)) for flags in (plain, *others)}
    fastest = max(speeds, key=lambda flags: speeds[flags])
    fastest = fastest if speeds[fastest] > FASTER * speeds[plain] else plain
    pair = [_make_measure(call, fastest, place=place, epochs=PAIR_EPOCHS) for place in "01"]
    for command in pair:
        _locate_warm_file(call, command.name).unlink(missing_ok=True)
    call.run_stage(ALONE, *pair)
    both = count_together([_read_times(call, command) for command in pair])
    beside = {
        dtype: _time_alone(call, _make_measure(call, dtype=dtype))
        for dtype in call.setting.other_dtypes
    }
    call.say(f"images/s: {speeds}, {beside}, two at once {both:.0f}")
    if call.count_seconds_left() <= 0 or not speeds[plain]:
        call.say("nothing chosen: not everything could be measured")
        return
    content = {
        "device": device,
        "commit": read_commit(),
        "setting": f"{call.setting.column}, {METHOD}, {call.setting.dtype}",
        "images_per_second": {"flags": speeds, "dtypes": beside, "two processes": both},
        "flags": fastest,
        "processes": 2 if both > TOGETHER * speeds[fastest] else 1,
    }
    _write_json(results / "choice.json", content)
    call.say(f"chosen: flags {fastest!r}, {content['processes']} at once")


def count_together(found: Sequence[Mapping[str, Any] | None]) -> float:
    """Images per second of processes side by side: of the epochs that all others train through, too."""
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
    """Images per second of training alone; 0 where it could not be measured."""
    _locate_warm_file(call, command.name).unlink(missing_ok=True)  # of an earlier attempt
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
    """The folder of this kind of device, with what earlier calls have found and this one has not."""

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
    """All that a run of the method needs, into the cache."""
    name = _join_name("compile", method, dtype, "flags" if flags else "")
    words = ["--methods", method, "--warm", _locate_warm_file(call, name), "--warm-epochs", 0]
    return _make_table2(call, name, words, flags, dtype)


def _make_measure(
    call: Call, flags: str = "", dtype: str = "", place: str = "", epochs: int | None = None
) -> Command:
    """Images per second."""
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
    # A run lasts seconds, and is sooner repeated than saved.
    options += ["--save-every", 1e9]
    return Command(name, "benchmarks.table2", [*options, *words], flags)


def _make_speed(call: Call, model: str, go: Path, out: Path) -> Command:
    """Compiles at once, and measures when told."""
    setting = call.setting
    words = ["--model", model, "--only", *setting.contenders, "--torch"]
    words += ["--rounds", setting.rounds, "--wait-for", go, "--out", out]
    return Command(f"speed_{model}", "benchmarks.speed", words)


def _take_half(call: Call, half: str) -> None:
    """To where it stays as long as the machine does."""
    if half in parcels.list_missing(CARRIED):
        call.failed.append(f"half {half} of the data was not carried")
        call.say(f"{CARRIED / half} is not here: nothing can be trained; prepare it and carry it")
        return
    shutil.copytree(CARRIED / half, call.keep / "data" / half, dirs_exist_ok=True)


def read_commit() -> str:
    """As prepared, because a copy of the files has no history; "+" if they have changed since."""
    try:
        name, digest = (CARRIED / "commit").read_text("utf-8").split()
    except (OSError, ValueError) as error:
        raise CallError(f"{CARRIED / 'commit'} is missing: run `prepare`, and carry it") from error
    return name if digest == hash_sources() else f"{name}+"


def hash_sources() -> str:
    digest = hashlib.sha256()
    for folder in ("spherical_optax", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
