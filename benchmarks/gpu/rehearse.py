"""Both calls on this CPU, in small, in the nearest that there is to the GPU's machine.

    python -m benchmarks.gpu.rehearse [--data-dir DIR] [--python PYTHON3.12]

The environment is a Python 3.12 with only the packages of that machine. It runs a copy of the last
commit without history, which is not installed. The rehearsal fails if the tests cannot be collected, if
a call fails, prints a warning, compiles a training program twice or brings back too much, if the second
call compiles a program that the first compiled for it, or if a run does not name its commit. DIR holds
cifar10.npz, whose halves travel; by default they hold random images.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu import luggage, settings, stages

ENVIRONMENT = stages.ROOT / ".venv-gpu"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FILES = 8  # as many may come back
SECONDS = 900  # for each call


class Failure(Exception):
    """The rehearsal found an error; the message is one line."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Failure(what)


def make_environment(python: str) -> Path:
    """The Python of the environment, which is made at the first time, in some minutes."""
    found = ENVIRONMENT / "bin" / "python"
    if not found.exists():
        try:
            subprocess.run([python, "-m", "venv", ENVIRONMENT], check=True)
        except OSError as error:
            raise Failure(
                f"{python}: {error.strerror}; name a Python 3.12 with --python"
            ) from error
    command = [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-r", REQUIREMENTS], check=True, stderr=subprocess.DEVNULL)
    return found


def copy_commit(to: Path) -> str:
    """Copies the files of the last commit; returns its name."""
    git = ["git", "-C", str(stages.ROOT)]
    expect(
        not subprocess.check_output([*git, "status", "--porcelain"]),
        "commit first: what is not committed would not be rehearsed",
    )
    archive = subprocess.Popen([*git, "archive", "HEAD"], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", to], stdin=archive.stdout, check=True)
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


def make_random_data(folder: Path) -> Path:
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 1700), ("test", 400)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = rng.integers(0, 10, n, np.uint8)
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **arrays)
    return folder


def run_call(name: str, python: Path, copy: Path, work: Path) -> Path:
    """Runs a call; returns the folder with the files that came back."""
    out, keep = work / f"out_{name}", work / "keep"
    out.mkdir()
    words = ["-m", "benchmarks.gpu", name, str(SECONDS), "--small", "--keep", str(keep)]
    variables = {"OUT": str(out), "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [python, *words],
        cwd=copy,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, end="")
    expect(done.returncode == 0, f"{name}: status {done.returncode}")
    print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
    files = [path for path in out.rglob("*") if path.is_file()]
    expect(len(files) <= FILES, f"{name}: {len(files)} files come back, and {FILES} may")
    for path in files:
        size = path.stat().st_size
        expect(size <= luggage.LARGEST, f"{name}: {path.name} has {size / luggage.MIB:.1f} MiB")
        expect(path.parent == out, f"{name}: {path} lies too deep")
    return out


def check_logs(keep: Path, methods: int) -> None:
    for path in sorted((keep / "logs").glob("*.log")):
        text = path.read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if re.search(r"\w*Warning\b", line)]
        # JAX logs compilations, as it was asked to, in the same way as warnings.
        lines = [line for line in lines if "Finished " not in line and "Compiling " not in line]
        expect(not lines, f"{path.name}: {lines[:1]}")
        if path.name.startswith(("compile_adam", "measure", "training")):
            found = re.findall(r"Finished XLA compilation of jit\((scan_epoch|train_step)\)", text)
            allowed = methods if path.name.startswith("training") else 1
            expect(len(found) <= allowed, f"{path.name}: {len(found)} compilations of training")
        if path.name.startswith(("measure", "training")):
            cached = re.findall(r"ompilation cache hit for 'jit_(scan_epoch|train_step)'", text)
            expect(cached == found, f"{path.name}: compiled what was compiled for it before")


def check_results(results: Path, setting: settings.Setting, commit: str) -> None:
    methods, seeds = len(setting.methods), setting.seeds
    cells = methods * len(setting.rates) * len(setting.decays)
    pattern = f"table2/{setting.column.replace('/', '_')}/*.json"
    runs = [json.loads(path.read_text("utf-8")) for path in results.glob(pattern)]
    expect(len(runs) == cells + methods * seeds, f"{len(runs)} runs")
    commits = collections.Counter(run["commit"] for run in runs)
    expect(commits == {commit: len(runs)}, f"commits {commits}")
    there = {path.name for path in results.iterdir()}
    for name in ("choice.json", "precision.json", "speed_few_small.json"):
        expect(name in there, f"{name} did not come back")


def rehearse(python: str, data_dir: Path | None) -> None:
    setting = settings.SMALL
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy, keep, results = work / "copy", work / "keep", work / "results"
        copy.mkdir()
        commit, interpreter = copy_commit(copy), make_environment(python)
        words = [
            "--data-dir",
            data_dir or make_random_data(work / "data"),
            "--folder",
            copy / ".gpu",
        ]
        command = [sys.executable, "-m", "benchmarks.gpu", "prepare", *words]
        subprocess.run(command, cwd=stages.ROOT, check=True)
        collected = subprocess.run(
            [interpreter, "-m", "pytest", "--quiet", "--collect-only"],
            cwd=copy,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        lines = collected.stdout.strip().splitlines()
        expect(collected.returncode == 0, f"tests cannot be collected: {lines[-1:]}")
        print(f"{lines[-1]}\n", flush=True)
        for name in ("first", "second"):
            out = run_call(name, interpreter, copy, work)
            check_logs(keep, len(setting.methods))
        command = [sys.executable, "-m", "benchmarks.gpu", "collect", out]  # the last one has all
        subprocess.run(
            [*command, "--results", results, "--carried", work / "carried"],
            cwd=stages.ROOT,
            check=True,
        )
        check_results(results / "cpu", setting, commit)
    print(f"rehearsed, commit {commit[:7]}: ready")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.rehearse", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, help="holds cifar10.npz; default: random images")
    parser.add_argument("--python", default="python3.12", help="that the environment is made with")
    args = parser.parse_args(argv)
    try:
        rehearse(args.python, args.data_dir)
    except (Failure, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
