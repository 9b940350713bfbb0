"""The leaves of a tree with their paths: tuples of strings, one for each level."""

import collections
from collections.abc import Callable
from typing import Any

from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

Path = tuple[str, ...]


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a tree with their paths, and its structure.

    A trailing `.value` without siblings is dropped: `nnx.Optimizer` calls `init` with Flax variables and
    `update` with bare arrays, and a parameter must have the same path both times.
    """
    flat, treedef = tree_flatten_with_path(tree, is_leaf=is_leaf)
    children = collections.Counter(path[:-1] for path, _ in flat)

    def to_strings(path) -> Path:
        alone = bool(path) and children[path[:-1]] == 1
        if alone and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
            path = path[:-1]
        return tuple(keystr((key,), simple=True) for key in path)

    return [(to_strings(path), leaf) for path, leaf in flat], treedef


def join_paths(paths: Any) -> str:
    """At most 20 paths as text for an error message, and the number of the others."""
    names = ["/".join(path) or "(the whole tree)" for path in paths]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
