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
PACKING = 12  # seconds, reserved at the end of a call
TRY_AGAIN = 75  # exit status of benchmarks.table2 when its time was up: the next call goes on


class CallError(Exception):
    """A call cannot go on; the message is one line."""


class Command(NamedTuple):
    name: str  # of the log file
    module: str
    words: Sequence[Any]
    flags: str = ""  # of XLA


class Call:
    """The processes of one call, which has `seconds` from now on."""

    def __init__(self, setting: Setting, seconds: float, keep: Path, out: Path):
        self.setting, self.keep, self.out = setting, keep, out
        self._start = time.monotonic()
        self._end = self._start + seconds
        self.failed: list[str] = []
        self.results = (
            keep / "results"
        )  # `first` and `second` choose the folder of the device in it
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("logs", "results", "cache", "data"):
            (keep / name).mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "COMMIT": read_commit(),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # because several processes share the card
            "JAX_COMPILATION_CACHE_DIR": str(keep / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(
                2**33
            ),  # without a limit JAX does not note times of use
        }

    def count_seconds_left(self) -> float:
        """The seconds until packing has to begin."""
        return self._end - PACKING - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:5.0f} s  {text}", flush=True)

    def run_stage(self, limit: float, *commands: Command) -> None:
        """Runs the commands side by side, to their end."""
        if self.begin(*commands):
            self.finish(limit, *commands)

    def begin(self, *commands: Command) -> bool:
        """Starts the commands. Returns False if there is no time for them."""
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
                    process_group=0,  # a group of its own, which ends together with its children
                )
        return True

    def finish(self, limit: float, *commands: Command) -> None:
        """Waits for the commands, and kills those that take longer than `limit`."""
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
        """Kills all processes that still run."""
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
        """The output of a command; empty if the command never ran."""
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
    """The commit that `prepare` noted; "+" marks sources that have changed since.

    The files on the GPU's machine are a copy without history.
    """
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
