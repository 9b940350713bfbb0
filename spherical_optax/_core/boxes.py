"""Boxes: nodes of other libraries around one array each, with metadata about its axes.

Flax's `nn.Partitioned` and `nnx.Variable` name the mesh axes along which the array is sharded, and a
`NamedArray` of Haliax or Penzai names the axes themselves. One number per group has other axes than its
array: in a state it gets a box with the names of the index axes alone, or no box at all.

Haiku's FlatMap is opened like a box: it gives its entries no paths and cannot hold a None, so all
modules of this package see a dictionary in its place.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax._core.shapes import Shape

# The classes by module and name: a library that is not imported has made no such object.
_PARTITIONED = ("flax.core.meta", "Partitioned")
_VARIABLE = ("flax.nnx.variablelib", "Variable")
_BOXES = (
    ("flax.core.meta", "AxisMetadata"),
    _VARIABLE,
    ("haliax.core", "NamedArray"),
    ("penzai.core.named_axes", "NamedArrayBase"),
    ("penzai.core.variables", "AbstractVariableValue"),
)
_FLAT_MAP = ("haiku._src.data_structures", "FlatMap")
# The metadata of `nnx.Variable` that names mesh axes.
_SHARDINGS = ("out_sharding", "optimizer_sharding")


@functools.lru_cache
def _is_class(cls: type, *names: tuple[str, str]) -> bool:
    """Whether a class is one of these, or derived from one."""
    return any((base.__module__, base.__qualname__) in names for base in cls.__mro__)


def is_box(x: Any) -> bool:
    """Whether x is a box around one array, or around a None."""
    return _is_class(type(x), *_BOXES) and len(_list_contents(x)) == 1


def open_box(x: Any) -> Any:
    """What is in the box x; x itself if it is no box."""
    return _list_contents(x)[0] if is_box(x) else x


def is_end(x: Any) -> bool:
    """Whether x is a None or a box: the leaves of a tree of parameters."""
    return x is None or is_box(x)


def open_boxes(tree: Any) -> Any:
    """The tree with the contents of its boxes in place of them."""
    return jax.tree.map(open_box, to_dictionaries(tree), is_leaf=is_box)


def to_dictionaries(tree: Any) -> Any:
    """The tree with dictionaries in place of Haiku's FlatMaps."""
    if _FLAT_MAP[0] not in sys.modules:
        return tree

    def is_flat_map(x: Any) -> bool:
        return _is_class(type(x), _FLAT_MAP)

    def convert(x: Any) -> Any:
        if not is_flat_map(x):
            return x
        return {key: to_dictionaries(value) for key, value in x.items()}

    return jax.tree.map(convert, tree, is_leaf=is_flat_map)


def box_like(like: Any, tree: Any) -> Any:
    """The tree with the boxes of `like`, which has the same structure otherwise."""
    boxes, treedef = jax.tree.flatten(like, is_leaf=is_end)
    if not boxes:
        return tree
    values = list(map(open_box, jax.tree.leaves(tree, is_leaf=is_end)))
    if len(values) > len(boxes):  # a FlatMap forgets its None
        values = [x for x in values if x is not None]
    return jax.tree.unflatten(treedef, map(put_in_box, boxes, values))


def with_open_boxes(update: Callable[..., Any]) -> Callable[..., Any]:
    """The `update` of a transformation that sees no boxes; its results are in boxes again."""

    @functools.wraps(update)
    def update_in_boxes(updates, state, params=None, **extra_args):
        found, new_state = update(
            open_boxes(updates), open_boxes(state), open_boxes(params), **extra_args
        )
        return box_like(updates, found), box_like(state, new_state)

    return update_in_boxes


def put_in_box(box: Any, value: Any) -> Any:
    """The value in a copy of the box; the value itself if `box` is no box."""
    if not is_box(box):
        return value
    return jax.tree.unflatten(jax.tree.structure(box, is_leaf=lambda x: x is None), [value])


def put_in_box_per_group(box: Any, value: Any, kept: Shape) -> Any:
    """Boxes a number per group: mesh axes stay named on the array axes `kept`, and on no others."""
    if value is None or not is_box(box) or jnp.ndim(value) != jnp.ndim(open_box(box)):
        return value

    def restrict(names: Any) -> tuple[Any, ...]:
        return tuple(name if axis in kept else None for axis, name in enumerate(names))

    names = _get_names(box)
    if names is None or not all(
        isinstance(x, tuple | jax.sharding.PartitionSpec) for x in names.values()
    ):
        return value
    restricted = {key: restrict(axes) for key, axes in names.items()}
    if _is_class(type(box), _PARTITIONED):
        return box.replace(value=value, **restricted)
    boxed = put_in_box(box, value)
    if restricted:
        boxed.set_metadata(**restricted)
    return boxed


def is_sharded_by_box(box: Any) -> bool:
    """Whether the metadata of a box of Flax says that its array is sharded."""
    names = _get_names(box) if is_box(box) else None
    return any(axis is not None for axes in (names or {}).values() for axis in axes)


def _get_names(box: Any) -> dict[str, Any] | None:
    """All metadata of a box that names mesh axes; None for boxes that we do not know in detail."""
    if _is_class(type(box), _PARTITIONED):
        return {"names": box.names}
    if _is_class(type(box), _VARIABLE):
        metadata = box.get_metadata()
        return {key: metadata[key] for key in _SHARDINGS if metadata.get(key)}
    return None


def _list_contents(box: Any) -> list[Any]:
    return jax.tree.leaves(box, is_leaf=lambda x: x is None)
