"""A quicker jit. Tests compile far more than they compute.

Where the very numbers or buffers of the usual compilation are tested, `jax.jit` stays.
"""

import functools

import jax

# Without optimisation in LLVM. (An option that not every supported JAX knows would be an error.)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
