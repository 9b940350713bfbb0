"""The stages of a call: commands that run as processes side by side, each with a limit of time.

The process of the call never touches the GPU itself. Therefore, whatever happens there, it can still
bring back the results of the other stages.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import luggage
from benchmarks.gpu.settings import Setting

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / ".gpu"
PACKING = 12  # seconds at the end
TRY_AGAIN = 75  # status of benchmarks.table2: it ended in time, and goes on with the next call


class CallError(Exception):
    """Why a call ends at once; the message is one line."""


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
