"""The two calls: what each does in which order, how long every part may take, and what it decides.

This process starts the others, ends them when their time is up, and packs what came of them. It never
touches the GPU itself, so that whatever happens there it can still bring back the rest.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import protocol
from benchmarks.gpu import luggage, parcels

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CARRIED = ROOT / ".gpu"
PACKING = 12  # seconds at the end
FASTER = 1.03  # by which something has to be to be chosen: repetitions differ by less
TOGETHER = 1.15  # by which two processes have to be faster than one
CONVOLUTIONS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"

# What each kind of stage may take, in seconds: about twice what is expected.
CHECK, FIRST_COMPILE, COMPILE, STEP_TIMES, ALONE, UNPACK = 60, 100, 110, 45, 45, 60


class CallError(Exception):
    """Why a call ends at once; the message is one line."""


class Setting(NamedTuple):
    """What is measured and trained; everything else follows from the repository."""

    column: str = "cifar10/resnet20"
    epochs: int = 10
    dtype: str = "bfloat16"
    methods: Sequence[str] = protocol.METHODS
    rates: Sequence[float] = (3.0, 10.0, 30.0)
    decays: Sequence[float] = protocol.GRID_DECAYS
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
        self._end = time.monotonic() + seconds
        self._start = time.monotonic()
        self.failed: list[str] = []
        for name in ("logs", "results", "cache", "data"):
            (keep / name).mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "COMMIT": _commit(),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the card
            "JAX_COMPILATION_CACHE_DIR": str(keep / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def left(self) -> float:
        """Seconds, without those for packing."""
        return self._end - PACKING - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", flush=True)

    def stage(self, limit: float, *commands: Command) -> None:
        """All of them side by side; what the time is too short for is ended, and the rest goes on."""
        limit = min(limit * self.setting.patience, self.left())
        self.say(f"{', '.join(command.name for command in commands)} (at most {limit:.0f} s)")
        if limit <= 0:
            self.failed += [f"{command.name}: no time" for command in commands]
            return
        end = time.monotonic() + limit
        running = {command.name: self._begin(command) for command in commands}
        try:
            for name, process in running.items():
                try:
                    status = process.wait(max(end - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    status = None
                self._report(name, status)
        finally:
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _begin(self, command: Command) -> subprocess.Popen[bytes]:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {command.flags}".strip()
        with (self.keep / "logs" / f"{command.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", command.module, *map(str, command.words)],
                cwd=ROOT,
                env=self.environment | ({"XLA_FLAGS": flags} if flags else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _report(self, name: str, status: int | None) -> None:
        lines = (self.keep / "logs" / f"{name}.log").read_text("utf-8", "replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        what = "its time was up" if status is None else f"status {status}"
        if status not in (0, TRY_AGAIN):
            self.failed.append(f"{name}: {what}, {last}")
        self.say(f"    {name}: {what}; {last.strip()[:150]}")


TRY_AGAIN = 75  # of benchmarks.table2: it ended in time, and goes on with the next call


def first(call: Call) -> None:
    """Numbers, then times; compiles what the second call trains."""
    setting, keep = call.setting, call.keep
    device = check(call)
    _take_half(call, "a")
    call.say(luggage.take_cache(CARRIED / "cache.tar", keep / "cache", device))
    (keep / "cache" / luggage.MADE_BY).write_text(json.dumps(device), "utf-8")
    _copy(RESULTS, keep / "results")
    slug = device["slug"]
    precision = keep / "results" / f"precision_{slug}.json"
    chosen = _choice(keep / "results")
    # The flags belong to a compiled program: training may take any of these.
    flags = setting.flags if chosen is None else [chosen["flags"]]
    programs = [_compile(call, method, one) for one in flags for method in setting.methods]
    programs += [_speed(call, model, compile_only=True) for model in setting.models]
    if chosen is None:
        programs += [_compile(call, METHOD, flags[0], dtype) for dtype in setting.other_dtypes]
    # One method alone, because XLA chooses between convolutions by timing them, and the others take over
    # its choice from the cache. The numbers need little of the GPU.
    numbers = Command("precision", "benchmarks.precision", ["--out", precision])
    call.stage(FIRST_COMPILE, numbers, programs[0])
    call.stage(COMPILE, *programs[1:])
    for model in setting.models:
        call.stage(STEP_TIMES, _speed(call, model))
    if chosen is None:
        choose(call, device)


def second(call: Call) -> None:
    """Trains: the grid, then the seeds in turn over the methods, until the time is up."""
    keep = call.keep
    check(call)
    _take_half(call, "b")
    if lost := parcels.missing(keep / "data"):
        raise CallError(
            f"half {' and '.join(lost)} of the data is not here: run `first` before, on the same machine"
        )
    _copy(RESULTS, keep / "results")
    call.stage(UNPACK, Command("unpack", "benchmarks.gpu", ["unpack", "--keep", keep]))
    chosen = _choice(keep / "results") or {"flags": "", "processes": 1}
    seconds = int(call.left())
    call.stage(
        seconds,
        *(
            _table2(call, f"training_{i}", ["--stop-after", seconds - 5], chosen["flags"])
            for i in range(chosen["processes"])
        ),
    )
    log = (keep / "logs" / "training_0.log").read_text("utf-8", "replace")
    print(
        log[log.rfind("Learning rates and weight decays") :] if "Learning rates and" in log else ""
    )


METHOD = "adamsrt"  # whose speed decides


def check(call: Call) -> dict[str, Any]:
    """What is here; ends the call where it is not what the call is for."""
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
        f"{found['device']}, JAX {found['jax']}, {os.cpu_count()} cores, commit {_commit()[:7]}"
    )
    return found


def choose(call: Call, device: Mapping[str, Any]) -> None:
    """The flags of XLA, and how many processes at once: by images per second, once and for all tables.

    The choice is committed with the results, and later calls keep to it. There is none if the time was
    too short for all that decides: then the next call chooses.
    """
    speeds: dict[str, float] = {}
    for flags in call.setting.flags:
        call.stage(ALONE, command := _measure(call, flags))
        speeds[flags] = _images_per_second(call, command)
    beside = {}
    for dtype in call.setting.other_dtypes:
        call.stage(ALONE, command := _measure(call, dtype=dtype))
        beside[dtype] = _images_per_second(call, command)
    plain = call.setting.flags[0]
    fastest = max(speeds, key=lambda flags: speeds[flags])
    fastest = fastest if speeds[fastest] > FASTER * speeds[plain] else plain
    pair = [_measure(call, fastest, place=place) for place in "01"]
    call.stage(ALONE, *pair)
    both = [_images_per_second(call, command) for command in pair]
    if call.left() <= 0:
        call.say("nothing chosen: the time was too short")
        return
    processes = 2 if min(both) > 0 and sum(both) > TOGETHER * speeds[fastest] else 1
    content = {
        "device": device,
        "commit": _commit(),
        "setting": f"{call.setting.column}, {METHOD}, {call.setting.dtype}",
        "images_per_second": {"flags": speeds, "dtypes": beside, "two processes": both},
        "flags": fastest,
        "processes": processes,
    }
    text = json.dumps(content, indent=1)
    (call.keep / "results" / "choice.json").write_text(f"{text}\n", "utf-8")
    call.say(f"images/s: {speeds}, {beside}, two at once {both}")
    call.say(f"chosen: flags {fastest!r}, {processes} at once")


def _images_per_second(call: Call, command: Command) -> float:
    """0 where it was not measured."""
    try:
        content = json.loads(_warm_file(call, command.name).read_text("utf-8"))
    except (OSError, ValueError):
        return 0.0
    return content["images_per_second"][call.setting.column][METHOD]


def _choice(results: Path) -> dict[str, Any] | None:
    try:
        return json.loads((results / "choice.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _compile(call: Call, method: str, flags: str = "", dtype: str = "") -> Command:
    """All that a run of the method needs, into the cache."""
    name = _name("compile", method, dtype, "flags" if flags else "")
    words = ["--methods", method, "--warm", _warm_file(call, name), "--warm-epochs", 0]
    return _table2(call, name, words, flags, dtype)


def _measure(call: Call, flags: str = "", dtype: str = "", place: str = "") -> Command:
    """Images per second."""
    name = _name("measure", METHOD, dtype, "flags" if flags else "", place)
    words = ["--methods", METHOD, "--warm", _warm_file(call, name)]
    return _table2(call, name, words, flags, dtype)


def _name(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _warm_file(call: Call, name: str) -> Path:
    return call.keep / f"{name}.json"


def _table2(
    call: Call, name: str, words: Sequence[Any], flags: str = "", dtype: str = ""
) -> Command:
    setting = call.setting
    options = ["--columns", setting.column, "--epochs", setting.epochs]
    options += ["--dtype", dtype or setting.dtype, "--methods", *setting.methods]
    options += ["--grid", "--rates", *setting.rates, "--decays", *setting.decays]
    options += ["--seeds", setting.seeds, "--devices", 1, *setting.more]
    options += ["--data-dir", call.keep / "npz", "--out", call.keep / "results" / "table2"]
    # A run lasts seconds, and is sooner repeated than saved.
    options += ["--save-every", 1e9]
    return Command(name, "benchmarks.table2", [*options, *words], flags)


def _speed(call: Call, model: str, compile_only: bool = False) -> Command:
    """Compiling alone is measuring one round beside others: what it finds is thrown away."""
    setting = call.setting
    words = ["--model", model, "--only", *setting.contenders]
    if compile_only:
        return Command(f"compile_{model}", "benchmarks.speed", [*words, "--rounds", 1])
    words += ["--rounds", setting.rounds, "--torch", "--out", call.keep / "results"]
    return Command(f"speed_{model}", "benchmarks.speed", words)


def _take_half(call: Call, half: str) -> None:
    """To where it stays as long as the machine does."""
    if half in parcels.missing(CARRIED):
        call.failed.append(f"half {half} of the data was not carried")
        call.say(f"{CARRIED / half} is not here: nothing can be trained; prepare it and carry it")
        return
    shutil.copytree(CARRIED / half, call.keep / "data" / half, dirs_exist_ok=True)


def _copy(folder: Path, to: Path) -> None:
    if folder.exists():
        shutil.copytree(folder, to, dirs_exist_ok=True)


def _commit() -> str:
    """As prepared: a copy of the files has no history."""
    try:
        return (CARRIED / "commit").read_text("utf-8").strip()
    except OSError as error:
        raise CallError(f"{CARRIED / 'commit'} is missing: run `prepare`, and carry it") from error
