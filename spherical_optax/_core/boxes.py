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

# Where the classes are. A library that is not imported has made no such object.
_BOXES = (
    ("flax.core.meta", "AxisMetadata"),
    ("flax.nnx.variablelib", "Variable"),
    ("haliax.core", "NamedArray"),
    ("penzai.core.named_axes", "NamedArrayBase"),
    ("penzai.core.variables", "AbstractVariableValue"),
)
_MAPPINGS = (("haiku._src.data_structures", "FlatMap"),)
# The metadata of `nnx.Variable` that names mesh axes.
_SHARDINGS = ("out_sharding", "optimizer_sharding")


def _get_classes(names: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    """Those classes whose libraries are imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(cls for cls in found if cls is not None)


def is_box(x: Any) -> bool:
    """Whether x is a box around one array, or around a None."""
    classes = _get_classes(_BOXES)
    return bool(classes) and isinstance(x, classes) and len(_list_contents(x)) == 1


def open_box(x: Any) -> Any:
    """What is in the box x; x itself if it is no box."""
    return _list_contents(x)[0] if is_box(x) else x


def is_end(x: Any) -> bool:
    """Whether x is a None or a box: the leaves of a tree of parameters."""
    return x is None or is_box(x)


def open_boxes(tree: Any) -> Any:
    """The tree with the contents of its boxes in place of them."""
    tree = to_dictionaries(tree)
    return jax.tree.map(open_box, tree, is_leaf=is_box) if _get_classes(_BOXES) else tree


def to_dictionaries(tree: Any) -> Any:
    """The tree with dictionaries in place of Haiku's FlatMaps."""
    classes = _get_classes(_MAPPINGS)

    def is_mapping(x: Any) -> bool:
        return isinstance(x, classes)

    def convert(x: Any) -> Any:
        if not is_mapping(x):
            return x
        return {key: to_dictionaries(value) for key, value in x.items()}

    return jax.tree.map(convert, tree, is_leaf=is_mapping) if classes else tree


def box_like(like: Any, tree: Any) -> Any:
    """The tree with the boxes of `like`, which has the same structure otherwise."""
    if not _get_classes(_BOXES + _MAPPINGS):
        return tree
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
    if _is_partitioned(box):
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
    if _is_partitioned(box):
        return {"names": box.names}
    if _is_a(box, "flax.nnx.variablelib", "Variable"):
        metadata = box.get_metadata()
        return {key: metadata[key] for key in _SHARDINGS if metadata.get(key)}
    return None


def _is_partitioned(box: Any) -> bool:
    return _is_a(box, "flax.core.meta", "Partitioned")


def _is_a(x: Any, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(x, cls)


def _list_contents(box: Any) -> list[Any]:
    return jax.tree.leaves(box, is_leaf=lambda x: x is None)
