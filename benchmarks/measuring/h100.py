"""XLA's compiler for an H100, on a machine that has none."""

import functools
import importlib.util
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.reporting import report

DESCRIPTION = Path(__file__).with_name("h100.txtpb")
DEVICE = "H100 (described, compiled without one)"
COMPILERS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
NO_COMPILER = "the compiler for NVIDIA GPUs is not installed: pip install 'jax[cuda13]'"


def list_compilers() -> list[str]:
    return [name for name in COMPILERS if importlib.util.find_spec(name)]


@functools.cache
def get_mesh() -> Mesh:
    """The described device. Programs can be compiled for it, but nothing can run on it."""
    text = DESCRIPTION.read_text("utf-8")
    described = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=text, topology="1x1x1"
    )
    return Mesh(np.array(described.devices[:1]), ("data",))


def compile_for_h100(fn: Any, *shapes: Any, donate: Sequence[int] = ()) -> tuple[Any, float]:
    """The compiled program, and the seconds of processor time that compiling took."""
    sharding = NamedSharding(get_mesh(), PartitionSpec())
    jitted = jax.jit(
        fn, donate_argnums=tuple(donate), in_shardings=sharding, out_shardings=sharding
    )
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    lowered = jitted.lower(*placed)
    start = time.process_time()
    return lowered.compile(), time.process_time() - start


def describe_environment() -> dict[str, Any]:
    """The environment of a result: the described GPU, and the compiler's version."""
    environment = report.describe_environment() | {"device": DEVICE, "platform": "gpu"}
    del environment["float32_products"], environment["cores"]  # of this machine's CPU
    plugins = [name.replace("_", "-") for name in list_compilers()]
    return environment | {name: version(name) for name in plugins}
