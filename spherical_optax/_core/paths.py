"""Leaves of trees, and their paths as strings."""

import collections
from collections.abc import Callable
from typing import Any

from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

Path = tuple[str, ...]


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> tuple[list[tuple[Path, Any]], Any]:
    """Leaves with their paths as strings; the path of a Flax `nnx.Variable` is that of its value.

    `nnx.Optimizer` initialises with variables and updates with bare arrays: the same path both times.
    """
    flat, treedef = tree_flatten_with_path(tree, is_leaf=is_leaf)
    siblings = collections.Counter(path[:-1] for path, _ in flat)

    def name(path) -> Path:
        alone = bool(path) and siblings[path[:-1]] == 1
        if alone and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
            path = path[:-1]
        return tuple(keystr((key,), simple=True) for key in path)

    return [(name(path), leaf) for path, leaf in flat], treedef


def join_paths(paths: Any) -> str:
    names = ["/".join(path) or "(the whole tree)" for path in paths]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
