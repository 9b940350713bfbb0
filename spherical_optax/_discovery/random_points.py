"""What `find_spheres` and `check_spheres` look at: outputs and gradients at random points."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxprs_in_params

from spherical_optax._core.paths import leaves_with_paths
from spherical_optax._core.safe_math import upcast


class Function:
    """`fn` as a function of the real arrays among its parameters, in at least float32 if it can.

    Attributes:
      leaves: all leaves of the parameters, with their paths; `arrays` are those at `real`.
      rounds: whether it computes in less than float32 on the way.
      outputs: jitted; arrays -> the real outputs.
      gradient: jitted; arrays, key -> the gradient of a random contraction of the outputs.
    """

    def __init__(self, who: str, fn: Callable[[Any], Any], params: Any):
        if not callable(fn):
            raise ValueError(
                f"{who}: fn is a {type(fn).__name__}, not a function of the parameters"
            )
        self._fn = fn
        self.leaves, self.treedef = leaves_with_paths(params, lambda x: x is None)
        for path, leaf in self.leaves:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"{who}: {'/'.join(path)!r} is a {leaf}, without values; give real parameters"
                )
            if isinstance(leaf, Tracer):
                raise ValueError(f"{who}: {'/'.join(path)!r} is traced; call {who} outside of jit")
        self.real = [i for i, (_, leaf) in enumerate(self.leaves) if _is_real(leaf)]
        self.paths = [self.leaves[i][0] for i in self.real]
        self.arrays = [jnp.asarray(self.leaves[i][1]) for i in self.real]
        if not self.arrays:
            raise ValueError(f"{who}: there are no real arrays among the parameters")
        self._dtypes = [upcast(x).dtype for x in self.arrays]
        traced = self._trace()
        if not traced.out_avals:
            raise ValueError(
                f"{who}: fn(params) returns no real array; let it return logits, a loss or both"
            )
        self.rounds = _low_precision(traced.jaxpr)
        self.outputs = jax.jit(self._outputs)
        self.gradient = jax.jit(self._gradient)

    def _trace(self) -> Any:
        """Settles whether `fn` takes low-precision parameters in float32."""
        trace = jax.make_jaxpr(self._outputs)
        low = [x.dtype for x in self.arrays]
        if low != self._dtypes:
            try:
                return trace(self.arrays)
            except Exception:  # it mixes them with others of their dtype: whatever that raises
                self._dtypes = low
        return trace(self.arrays)

    def _outputs(self, arrays: list[jax.Array]) -> list[jax.Array]:
        leaves = [leaf for _, leaf in self.leaves]
        for i, x, dtype in zip(self.real, arrays, self._dtypes, strict=True):
            leaves[i] = x.astype(dtype)
        # In full float32 also where an accelerator would multiply matrices in less.
        with jax.default_matmul_precision("highest"):
            outputs = jax.tree.leaves(self._fn(jax.tree.unflatten(self.treedef, leaves)))
        outputs = [jnp.asarray(y) for y in outputs]
        parts = [
            part
            for y in outputs
            for part in ([y.real, y.imag] if jnp.iscomplexobj(y) else [y])
            if jnp.issubdtype(part.dtype, jnp.floating)
        ]
        return [upcast(part) for part in parts if part.size]

    def point(self, key: jax.Array, factors: Sequence[float] | None = None) -> list[jax.Array]:
        """Random parameters, times a factor for each array."""
        keys = jax.random.split(key, len(self.arrays))
        factors = [1.0] * len(self.arrays) if factors is None else factors
        columns = zip(self.arrays, keys, factors, self._dtypes, strict=True)
        return [_point(x, k, np.float32(f), dtype) for x, k, f, dtype in columns]

    def _gradient(self, point: list[jax.Array], key: jax.Array) -> list[jax.Array]:
        def contracted(x: list[jax.Array]) -> jax.Array:
            outputs = self._outputs(x)
            keys = jax.random.split(key, len(outputs))
            parts = (_contracted(y, k) for y, k in zip(outputs, keys, strict=True))
            # With room below for what float16 holds; the size of a gradient does not matter here.
            return (256.0 if self.rounds else 1.0) * functools.reduce(operator.add, parts)

        return jax.grad(contracted)(point)


def fast_key(who: str, key: Any) -> jax.Array:
    """Of all of JAX's generators this one compiles fastest: ten times so on a CPU."""
    try:
        bits = jax.random.bits(key, (4,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: key is {key!r}, not one jax.random.key(...)") from error
    return jax.random.wrap_key_data(bits, impl="rbg")


def dimensions(x: Any) -> int:
    """How many axes are longer than 1: a scale of shape (1, 1, 1, c) is a vector."""
    return sum(length > 1 for length in jnp.shape(x))


def _low_precision(jaxpr: Any) -> bool:
    """Whether anything is computed in less than float32."""

    def low(aval: Any) -> bool:
        dtype = getattr(aval, "dtype", None)
        return dtype in (jnp.bfloat16, jnp.float16)

    return any(
        any(low(v.aval) for v in equation.outvars)
        or any(map(_low_precision, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _is_real(x: Any) -> bool:
    if x is None or (not hasattr(x, "dtype") and not isinstance(x, float)):
        return False
    return jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x) > 0


@functools.partial(jax.jit, static_argnames="dtype")
def _point(x: jax.Array, key: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    x = upcast(x)
    x = factor.astype(x.dtype) * _perturbed(x, key)
    # What fn will round is not the point to multiply its gradient with.
    return x.astype(dtype).astype(x.dtype)


def _perturbed(x: jax.Array, key: jax.Array) -> jax.Array:
    """A random point of about the same radius, where nothing is hidden behind a zero.

    Flax's own ResNet starts with BatchNorm scales of zero, which hide every filter of their branch.
    """
    sharding = jax.typeof(x).sharding
    where = {"out_sharding": sharding} if sharding.mesh.explicit_axes else {}
    if dimensions(x) > 1:
        # As of the usual initialisations, for arrays that start at zero or all but zero.
        usual = x.size ** (0.5 / dimensions(x) - 0.5)
        rms = jnp.sqrt(jnp.mean(jnp.square(x)))
        hidden = rms < 1e-3 * usual
        noise = jax.random.normal(key, x.shape, x.dtype, **where)
        return jnp.where(hidden, usual * noise, (x + rms * noise) * 2**-0.5)
    # Entries keep their sign: a scale or a temperature may have to be positive.
    noise = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0, **where)
    sign = jnp.where(x == 0, jnp.sign(noise), jnp.sign(x))
    size = jnp.where(jnp.abs(x) < 0.1, 0.5, jnp.abs(x))
    return sign * size * (0.5 + jnp.abs(noise))


def _contracted(y: jax.Array, key: jax.Array) -> jax.Array:
    """<y, random normal>, in units of y's own size, so that no output drowns another."""
    size = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(y))))
    cotangent = jax.random.normal(key, y.shape, y.dtype)
    total = jnp.sum(y * cotangent) / jnp.where(size > 0, size, 1.0)
    return total.astype(jnp.result_type(float))
