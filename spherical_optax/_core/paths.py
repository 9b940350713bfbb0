"""The leaves of a tree with their paths: tuples of strings, one for each level."""

import collections
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from spherical_optax._core.boxes import is_box, open_box, to_dictionaries

Path = tuple[str, ...]


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a tree with their paths, and its structure."""
    return list_leaves(tree, is_leaf), jax.tree.structure(tree, is_leaf=is_leaf)


def list_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda x: x is None
) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths; by default, a None is a leaf.

    A parameter has one path in all trees: a box around it (see `boxes`) is no level of the path, and
    neither is a trailing `.value` without siblings, which older versions of Flax add.
    """
    flat, _ = tree_flatten_with_path(
        to_dictionaries(tree), is_leaf=lambda x: is_leaf(x) or is_box(x)
    )
    children = collections.Counter(path[:-1] for path, _ in flat)

    def to_strings(path) -> Path:
        alone = bool(path) and children[path[:-1]] == 1
        if alone and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
            path = path[:-1]
        return tuple(keystr((key,), simple=True) for key in path)

    leaves = [(to_strings(path), open_box(leaf)) for path, leaf in flat]
    return [(path, x) for path, x in leaves if x is not None or is_leaf(x)]


def join_paths(paths: Any) -> str:
    """At most 20 paths as text for an error message, and the number of the others."""
    names = ["/".join(path) or "(the whole tree)" for path in paths]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
