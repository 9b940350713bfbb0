"""How long every kernel of a compiled step runs, as JAX's profiler sees it."""

import glob
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from benchmarks.measuring import hlo


class Launch(NamedTuple):
    """One run of a kernel: the instruction of the compiled program, and when, in nanoseconds."""

    instruction: str
    start: float
    duration: float


def trace(run: Callable[[], Any]) -> list[Launch]:
    """All kernels that `run` launches, in the order of time. `run` waits for its results."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        return read_launches(jax.profiler.ProfileData.from_file(path).planes)


def read_launches(planes: Iterable[Any]) -> list[Launch]:
    """The kernels in a trace: of a GPU, what its streams ran; of a CPU, what XLA's threads ran."""
    found = []
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # a summary of what the streams ran
            for event in line.events:
                name = next((value for key, value in event.stats if key == "hlo_op"), "")
                if name.startswith("command_buffer") or (devices and not name):
                    name = event.name  # of the kernel, where a CUDA graph hides the instruction
                if name:
                    found.append(Launch(name, event.start_ns, event.duration_ns))
    return sorted(found, key=lambda launch: launch.start)


def summarize(launches: list[Launch], program: str, steps: int) -> dict[str, Any]:
    """Launches, microseconds and bytes of one of `steps` steps, by kind and by instruction.

    "busy" is the time during which at least one kernel ran, "span" that from the first start to the
    last end. What lies between them is waiting for launches.
    """
    known = hlo.list_instructions(program)
    known |= {name.replace(".", "_"): row for name, row in known.items()}  # as kernels are named
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    busy = end = 0.0
    for name, start, duration in launches:
        kind, moved = known.get(name, ("other", 0))
        for row in (kinds[kind], kernels[name]):
            row["launches"] += 1 / steps
            row["microseconds"] += duration / 1e3 / steps
            row["bytes"] += moved / steps
        busy += max(start + duration - max(start, end), 0.0)
        end = max(end, start + duration)
    slowest = sorted(kernels.items(), key=lambda item: -item[1]["microseconds"])
    return {
        "kinds": kinds,
        "busy_microseconds": busy / 1e3 / steps,
        "span_microseconds": (end - launches[0].start) / 1e3 / steps if launches else 0.0,
        "kernels": {name: {"kind": known.get(name, ("other",))[0], **row} for name, row in slowest},
    }
