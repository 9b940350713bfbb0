"""What `find_spheres` and `check_spheres` look at: outputs and gradients at random points."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._groups import accurate
from spherical_optax._spheres import named_leaves


class Function:
    """`fn` as a function of the real arrays among its parameters, in at least float32 if it can.

    Attributes:
      leaves: all leaves of the parameters, with their paths; `arrays` are those at `real`.
      gradient: jitted; (arrays, factors, key) -> a random point times the factors, one per array,
        and the gradient there of a random contraction of the outputs.
      outputs: jitted; (arrays, key) -> the real outputs at a random point, which `point` returns.
    """

    def __init__(self, who: str, fn: Callable[[Any], Any], params: Any):
        if not callable(fn):
            raise ValueError(f"{who}: fn is {fn!r}, not a function of the parameters")
        self._fn = fn
        self.leaves, self.treedef = named_leaves(params, lambda x: x is None)
        for path, leaf in self.leaves:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"{who}: {'/'.join(path)!r} is a {leaf}, without values; give real parameters"
                )
        self.real = [i for i, (_, leaf) in enumerate(self.leaves) if _is_real(leaf)]
        self.paths = [self.leaves[i][0] for i in self.real]
        self.arrays = [jnp.asarray(self.leaves[i][1]) for i in self.real]
        if not self.arrays:
            raise ValueError(f"{who}: there are no real arrays among the parameters")
        self._dtypes = [accurate(x).dtype for x in self.arrays]
        if not self._shapes():
            raise ValueError(
                f"{who}: fn(params) returns no real array; let it return logits, a loss or both"
            )
        self.gradient = jax.jit(self._gradient)
        self.point = jax.jit(self._point)
        self.outputs = jax.jit(self._outputs)

    def _shapes(self) -> Any:
        """The outputs' shapes; settles whether `fn` takes low-precision parameters in float32."""
        low = [x.dtype for x in self.arrays]
        if low != self._dtypes:
            try:
                return jax.eval_shape(self._outputs, self.arrays)
            except Exception:  # it mixes them with others of their dtype: whatever that raises
                self._dtypes = low
        return jax.eval_shape(self._outputs, self.arrays)

    def _outputs(self, arrays: list[jax.Array]) -> list[jax.Array]:
        leaves = [leaf for _, leaf in self.leaves]
        for i, x, dtype in zip(self.real, arrays, self._dtypes, strict=True):
            leaves[i] = x.astype(dtype)
        outputs = jax.tree.leaves(self._fn(jax.tree.unflatten(self.treedef, leaves)))
        outputs = [jnp.asarray(y) for y in outputs]
        parts = [
            part
            for y in outputs
            for part in ([y.real, y.imag] if jnp.iscomplexobj(y) else [y])
            if jnp.issubdtype(part.dtype, jnp.floating)
        ]
        return [accurate(part) for part in parts if part.size]

    def _point(
        self, arrays: list[jax.Array], factors: list[jax.Array], key: jax.Array
    ) -> list[jax.Array]:
        keys = jax.random.split(key, len(arrays))
        moved = [_perturbed(accurate(x), k) for x, k in zip(arrays, keys, strict=True)]
        moved = [x * f.astype(x.dtype) for x, f in zip(moved, factors, strict=True)]
        # What fn will round, in the end, is not the point to multiply the gradient with.
        return [x.astype(d).astype(x.dtype) for x, d in zip(moved, self._dtypes, strict=True)]

    def _gradient(
        self, arrays: list[jax.Array], factors: list[jax.Array], key: jax.Array
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        point_key, key = jax.random.split(key)
        point = self._point(arrays, factors, point_key)

        def contracted(x: list[jax.Array]) -> jax.Array:
            outputs = self._outputs(x)
            keys = jax.random.split(key, len(outputs))
            return sum(
                (_contracted(y, k) for y, k in zip(outputs, keys, strict=True)), jnp.zeros(())
            )

        return point, jax.grad(contracted)(point)


def dimensions(x: Any) -> int:
    """How many axes are longer than 1: a scale of shape (1, 1, 1, c) is a vector."""
    return sum(length > 1 for length in jnp.shape(x))


def _is_real(x: Any) -> bool:
    if x is None or not hasattr(x, "dtype") and not isinstance(x, float):
        return False
    return jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x) > 0


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
        rms = jnp.where(rms < 1e-3 * usual, usual, rms)
        return x + rms * jax.random.normal(key, x.shape, x.dtype, **where)
    # Entries keep their sign: a scale or a temperature may have to be positive.
    noise = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0, **where)
    sign = jnp.where(x == 0, jnp.sign(noise), jnp.sign(x))
    size = jnp.where(jnp.abs(x) < 0.1, 1.0, jnp.abs(x))
    return sign * size * (0.5 + jnp.abs(noise))


def _contracted(y: jax.Array, key: jax.Array) -> jax.Array:
    """<y, random normal>, in units of y's own size, so that no output drowns another."""
    size = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(y))))
    cotangent = jax.random.normal(key, y.shape, y.dtype)
    total = jnp.sum(y * cotangent) / jnp.where(size > 0, size, 1.0)
    return total.astype(jnp.result_type(float))
