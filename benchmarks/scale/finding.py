"""Time and memory of `so.find_spheres` on transformers of several sizes."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import jax

import spherical_optax as so
from benchmarks.scale.transformer import (
    BATCH,
    LENGTH,
    Size,
    declare_spheres,
    make_params,
    predict,
)


def measure_finding(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """The peak counts everything that the process holds beyond its state before the parameters."""
    size = Size(width, layers, vocabulary)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, vocabulary)
    before = read_resident_bytes(tokens.block_until_ready())
    params = jax.block_until_ready(make_params(size, jax.random.key(0)))
    start = time.process_time()
    spheres = so.find_spheres(lambda p: predict(p, tokens), params, key=jax.random.key(2))
    seconds = time.process_time() - start
    sizes = [x.size for x in jax.tree.leaves(params)]
    return {
        "arrays": len(sizes),
        "parameters": sum(sizes),
        "right": spheres == declare_spheres(params),
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def count_parameters(size: Size) -> int:
    shapes = jax.eval_shape(lambda key: make_params(size, key), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


def read_resident_bytes(_: Any = None) -> int:
    """The memory that the process holds at present, on Linux."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
