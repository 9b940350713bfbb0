"""Fully sharded parameters, gradients and state: the same numbers, and no large array is sent."""

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import fsdp

COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def sent(program):
    """Number of entries of every array that a collective of a compiled program makes."""
    return [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for result in COLLECTIVE.findall(program.as_text())
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    ]


def assert_close(actual, expected, name):
    tolerance = fsdp.TOLERANCE.get(name, 1e-6)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@functools.cache
def run_on_one_device(name):
    return fsdp.run(name, lambda seed: jax.tree.map(jnp.asarray, fsdp.values(seed)))


@pytest.mark.parametrize("name", fsdp.OPTIMIZERS)
def test_fsdp(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    program, path = fsdp.run(name, lambda seed: fsdp.sharded(seed, mesh))
    single, expected = run_on_one_device(name)
    for leaf, x in path[-1].items():
        assert x.sharding.spec == fsdp.LEAVES[leaf][2]
        assert_close(x, expected[-1][leaf], name)
    assert not sent(single)
    if name != "muonh":  # whose matrices are multiplied
        assert max(sent(program), default=0) <= fsdp.GROUPS
        assert sent(program) or name in ("sgd", "sgd_momentum", "adam")


@pytest.mark.parametrize("name", fsdp.OPTIMIZERS)
def test_init_shards_what_is_shaped_like_a_parameter(name):
    """Without being told, where it is not compiled."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = fsdp.sharded(0, mesh)
    state = fsdp.OPTIMIZERS[name]().init(params)
    sharding = {x.shape: x.sharding for x in params.values() if x.size > fsdp.GROUPS}
    moments = [x for x in jax.tree.leaves(state) if x.size > fsdp.GROUPS]
    assert moments or name in ("sgd", "adamg_star")
    assert all(x.sharding.is_equivalent_to(sharding[x.shape], x.ndim) for x in moments)


def test_large_collectives_would_be_seen():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = fsdp.sharded(0, mesh)
    replicated = jax.NamedSharding(mesh, fsdp.P())
    program = jax.jit(lambda x: 2 * x, out_shardings=replicated).lower(params["layer"]).compile()
    assert max(sent(program)) == 48 * 40


WORKER = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.sharding import fsdp
assert (jax.process_count(), jax.device_count()) == (2, 8)
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
found = {}
for name in fsdp.IN_TWO_PROCESSES:
    steps = fsdp.STEPS_OF_TWO_PROCESSES
    _, path = fsdp.run(name, lambda seed: fsdp.sharded(seed, mesh), steps)
    gathered = multihost_utils.process_allgather(path[-1], tiled=True)
    found |= {f"{name}/{leaf}": x for leaf, x in gathered.items()}
if jax.process_index() == 0:
    np.savez(sys.argv[3], **found)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    out = tmp_path / "found.npz"
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, i, str(out)],
            env=os.environ | flags,
            cwd=Path(__file__).parents[2],
        )
        for i in "01"
    ]
    assert [worker.wait(timeout=1200) for worker in workers] == [0, 0]
    with np.load(out) as found:
        for name in fsdp.IN_TWO_PROCESSES:
            _, expected = run_on_one_device(name)
            for leaf, x in expected[fsdp.STEPS_OF_TWO_PROCESSES].items():
                assert_close(found[f"{name}/{leaf}"], x, name)
