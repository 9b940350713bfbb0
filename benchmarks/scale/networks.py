"""Large networks by the shapes of their parameters, and how these lie on a mesh of devices.

The axis "fsdp" of the mesh cuts the parameters where they only have to be stored, "model" where the
products of matrices are cut, too. Experts lie along "model".
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import spherical_optax as so

# 7 billion parameters, as Llama has them.
LAYERS, WIDTH, HIDDEN, VOCABULARY = 32, 4096, 11008, 32_000
# The mixture: its layers, experts in a layer, width, and width within an expert.
MIXTURE_LAYERS, EXPERTS, MIXTURE_WIDTH, EXPERT_HIDDEN = 100, 16, 2048, 1024

INTO, OUT_OF = PartitionSpec("fsdp", "model"), PartitionSpec("model", "fsdp")
VECTOR = PartitionSpec("fsdp")


class Array(NamedTuple):
    shape: tuple[int, ...]
    partition: PartitionSpec
    hidden: bool = False  # whether it is a matrix between layers, or a stack of such matrices


Arrays = dict[str, Array]


def list_layer(width: int, hidden: int) -> Arrays:
    """Attention, a gated feed-forward part, and two norms."""
    arrays = {name: Array((width, width), INTO, True) for name in ("query", "key", "value")}
    arrays["out"] = Array((width, width), OUT_OF, True)
    arrays |= {name: Array((width, hidden), INTO, True) for name in ("gate", "up")}
    arrays["down"] = Array((hidden, width), OUT_OF, True)
    return arrays | _list_norms(width)


def list_mixture_layer(width: int, hidden: int, experts: int) -> Arrays:
    """Attention, a router, experts in one stack each of their matrices, and two norms."""
    arrays = {name: Array((width, width), INTO, True) for name in ("query", "key", "value")}
    arrays["out"] = Array((width, width), OUT_OF, True)
    arrays["router"] = Array((width, experts), PartitionSpec("fsdp"))
    into, out_of = (PartitionSpec("model", *rest) for rest in (("fsdp",), (None, "fsdp")))
    arrays |= {name: Array((experts, width, hidden), into, True) for name in ("gate", "up")}
    arrays["down"] = Array((experts, hidden, width), out_of, True)
    return arrays | _list_norms(width)


def _list_norms(width: int) -> Arrays:
    return {name: Array((width,), VECTOR) for name in ("attention_norm", "feed_forward_norm")}


def _list_ends(width: int) -> Arrays:
    return {
        "embed": Array((VOCABULARY, width), OUT_OF),
        "norm": Array((width,), VECTOR),
        "head": Array((width, VOCABULARY), INTO),
    }


def unroll(layer: Arrays, layers: int) -> Arrays:
    return {f"layer{i}/{name}": array for i in range(layers) for name, array in layer.items()}


def scan(layer: Arrays, layers: int) -> Arrays:
    """Every array of all layers as one stack, as `jax.lax.scan` over the layers takes it."""
    return {
        name: Array((layers, *shape), PartitionSpec(None, *partition), hidden)
        for name, (shape, partition, hidden) in layer.items()
    }


def list_llama(layers: int = LAYERS, stack: Callable[..., Arrays] = unroll) -> Arrays:
    return stack(list_layer(WIDTH, HIDDEN), layers) | _list_ends(WIDTH)


def list_mixture(layers: int = MIXTURE_LAYERS, stack: Callable[..., Arrays] = unroll) -> Arrays:
    layer = list_mixture_layer(MIXTURE_WIDTH, EXPERT_HIDDEN, EXPERTS)
    return stack(layer, layers) | _list_ends(MIXTURE_WIDTH)


NETWORKS: dict[str, Callable[..., Arrays]] = {
    "7B": list_llama,
    "7B, scanned": functools.partial(list_llama, stack=scan),
    "mixture": list_mixture,
    "mixture, scanned": functools.partial(list_mixture, stack=scan),
}


def make_spheres(arrays: Arrays) -> tuple[Any, Any]:
    """For the matrices between layers: a sphere per output, and a sphere per matrix."""

    def make(*last: int) -> dict[str, so.Sphere | None]:
        return {
            name: so.Sphere((*range(len(array.shape) - 2), *last)) if array.hidden else None
            for name, array in arrays.items()
        }

    return make(-1), make()


def describe_params(arrays: Arrays, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters by shape and sharding only, in float32."""
    return {
        name: jax.ShapeDtypeStruct(
            array.shape, jnp.float32, sharding=NamedSharding(mesh, array.partition)
        )
        for name, array in arrays.items()
    }


def shard_state(state: Any, arrays: Arrays, mesh: jax.sharding.Mesh) -> Any:
    """The state with shardings: what belongs to a parameter is cut along the axes of its full length."""

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = next((k for e in reversed(path) if (k := getattr(e, "key", None)) in arrays), None)
        names: list[Any] = []
        if name is not None and len(arrays[name].shape) == x.ndim:
            shape, partition = arrays[name].shape, arrays[name].partition
            padded = (*partition, *[None] * (x.ndim - len(partition)))
            lengths = zip(shape, x.shape, padded, strict=True)
            names = [cut if own == length else None for own, length, cut in lengths]
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def count_local_bytes(tree: Any) -> int:
    """The bytes of a sharded tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
