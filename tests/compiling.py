"""A quicker jit. Tests compile far more than they compute.

Where the very numbers or buffers of the usual compilation are tested, `jax.jit` stays.
"""

import functools

import jax


def _known(**options: object) -> dict[str, object]:
    """The options, if this version of XLA has them all."""
    try:
        jax.jit(lambda: 0.0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


# On CPUs: no optimisation in LLVM, and the emitters before those through MLIR, for as long as there are
# some. Together a third of the time.
quick_jit = functools.partial(
    jax.jit,
    compiler_options=_known(xla_backend_optimization_level=0)
    | _known(xla_cpu_use_fusion_emitters=False),
)
