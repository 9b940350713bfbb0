"""One step of an optimizer, compiled for a mesh of fake devices: memory, collectives, seconds."""

import time
from typing import Any

import jax
from jax.sharding import AxisType

from benchmarks.measuring.collectives import count_collectives
from benchmarks.scale.networks import (
    Arrays,
    count_local_bytes,
    describe_params,
    make_spheres,
    shard_state,
)
from benchmarks.scale.optimizers import OPTIMIZERS, make_step

MODEL = {64: 4, 256: 8, 1024: 8}  # devices along the axis "model"


def make_mesh(devices: int) -> jax.sharding.Mesh:
    model = MODEL[devices]
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((devices // model, model), ("fsdp", "model"), axis_types=types)


def measure_step(arrays: Arrays, optimizer: str, devices: int) -> dict[str, Any]:
    """Compiles a step with parameters and state donated. Nothing is allocated, and nothing runs."""
    mesh = make_mesh(devices)
    params = describe_params(arrays, mesh)
    tx = OPTIMIZERS[optimizer](*make_spheres(arrays))
    state = shard_state(jax.eval_shape(tx.init, params), arrays, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(make_step(tx), donate_argnums=(0, 1), out_shardings=shardings)
    start = time.process_time()
    lowered = jitted.lower(params, state, params)
    traced = time.process_time()
    compiled: Any = lowered.compile()
    finished = time.process_time()
    sent = count_collectives(compiled.as_text())
    shards = [count_local_bytes(params[name]) for name, array in arrays.items() if array.hidden]
    return {
        "parameter_bytes": count_local_bytes(params),
        "state_bytes": count_local_bytes(state),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "smallest_matrix_shard_bytes": min(shards),
        "collective_arrays": dict(sent.arrays),
        "collective_bytes": dict(sent.bytes),
        "largest_collective_bytes": sent.largest,
        "trace_seconds": traced - start,
        "compile_seconds": finished - traced,
    }
