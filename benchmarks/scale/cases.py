"""The measurements, each in a process of its own.

The number of fake devices has to be known before JAX starts, and a peak of memory is that of a process.

    python -m benchmarks.scale.cases '{"part": "arrays", "optimizer": "so.adamsrt", "arrays": 10}'

measures one case and prints one line of JSON.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale import finding, growth, sharded
from benchmarks.scale.networks import NETWORKS
from benchmarks.scale.optimizers import OPTIMIZERS, USUAL

Case = dict[str, Any]
ROOT = Path(__file__).parents[2]
# By default, glibc keeps what is freed of arrays below 32 MiB: then a peak is not that of the arrays.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
COUNT = "--xla_force_host_platform_device_count"

DEVICES = [64, 256, 1024]
ARRAYS = [10, 100, 1000, 4000]
# Width, layers and vocabulary, from few arrays to many and from 4 million parameters to 350 million.
SIZES = [(256, 2, 8192), (256, 24, 8192), (256, 96, 8192), (512, 24, 16384), (1024, 24, 40960)]
TRACK = "so.track(optax.adamw)"
# More arrays are traced only: compiling them would take most of the time.
MOST_COMPILED = {TRACK: 100}
MOST_COMPILED_ELSE = 1000
MOST_TRACED = {TRACK: 1000}  # which takes 40 seconds
# Of hundreds of separate matrices, XLA compiles the products of Muon for minutes.
OF_A_NETWORK = {
    "7B, scanned": list(OPTIMIZERS),
    "mixture, scanned": list(OPTIMIZERS),
    "7B": USUAL,
    "mixture": USUAL[:2],  # AdamH compiles for more than two minutes, and `track` for longer
}
# Compiling separate arrays takes up to a minute; the scanned networks are compiled for every mesh.
ONLY_ON_FEWEST = {("7B", TRACK), *(("mixture", name) for name in USUAL)}


def list_sharded(devices: Sequence[int]) -> Iterator[Case]:
    for network, optimizers in OF_A_NETWORK.items():
        for count in devices:
            for name in optimizers:
                if count == min(devices) or (network, name) not in ONLY_ON_FEWEST:
                    case = {"part": "sharded", "network": network, "devices": count}
                    yield case | {"optimizer": name}


def list_arrays(counts: Sequence[int]) -> Iterator[Case]:
    for count in counts:
        for name in USUAL:
            if count > MOST_TRACED.get(name, count):
                continue
            compiles = count <= MOST_COMPILED.get(name, MOST_COMPILED_ELSE)
            yield {"part": "arrays", "optimizer": name, "arrays": count, "compiles": compiles}


def list_discovery(parameters: float) -> Iterator[Case]:
    for width, layers, vocabulary in SIZES:
        size = finding.Size(width, layers, vocabulary)
        if finding.count_parameters(size) <= parameters:
            yield {"part": "discovery", **size._asdict()}


def measure(case: Case) -> dict[str, Any]:
    """Measures a case in this process."""
    options = {key: value for key, value in case.items() if key != "part"}
    if case["part"] == "sharded":
        arrays = NETWORKS[options.pop("network")]()
        return sharded.measure_step(arrays, **options)
    if case["part"] == "arrays":
        return growth.measure_growth(**options)
    return finding.measure_finding(**options)


def run(case: Case) -> dict[str, Any]:
    """Measures a case in a new process; the case with the figures, or with its error."""
    environment = make_environment(case.get("devices", 1))
    if case["part"] == "discovery":
        environment |= GIVE_BACK
    done = start(["-m", "benchmarks.scale.cases", json.dumps(case)], environment)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        error = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return case | {"error": f"exit status {done.returncode}: {error}"}
    return case | json.loads(lines[-1])


def make_environment(devices: int) -> dict[str, str]:
    """The environment of a process with so many fake devices."""
    flags = re.sub(rf"{COUNT}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{flags} {COUNT}={devices}".strip()
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words, and waits for its end."""
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
