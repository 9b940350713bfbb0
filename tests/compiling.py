"""How the tests compile: quickly, but for what says otherwise.

Tests compile far more than they compute. XLA's optimisations take nearly all of that time: compiling a
step of AdamSRT takes 0.69 s of processor time with them and 0.08 s with QUICK (JAX 0.10, a CPU).
"""

import os
import subprocess
import sys

import jax

# Flags of XLA on a CPU, and what they are by default: optimisation in LLVM, fusions through MLIR, and a
# module for each of many threads.
QUICK = {
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_use_fusion_emitters": (False, True),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}


def compile_quickly() -> None:
    """Sets the flags for this process and for those that it starts; not after JAX has been used."""
    before = os.environ.get("XLA_FLAGS", "")
    if any(name in before for name in QUICK):
        return
    quick = [f"--{name}={value}".lower() for name, (value, _) in QUICK.items()]
    known = quick if _knows(before, quick) else [flag for flag in quick if _knows(before, [flag])]
    os.environ["XLA_FLAGS"] = " ".join([before, *known]).strip()


def _knows(before: str, flags: list[str]) -> bool:
    """XLA ends a process that gives it a flag which it does not know."""
    environment = os.environ | {"XLA_FLAGS": " ".join([before, *flags]).strip()}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def usual_jit(function, **options):
    """`jax.jit` with all optimisations: where the exact numbers or the buffers are what is tested."""
    flags = os.environ.get("XLA_FLAGS", "")
    usual = {name: usual for name, (_, usual) in QUICK.items() if name in flags}
    return jax.jit(function, compiler_options=usual, **options)
