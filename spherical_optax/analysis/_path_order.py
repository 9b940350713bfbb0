"""The order in which tables and pictures list parameters."""

import re


def sort_paths(paths: list[str]) -> list[str]:
    """Puts Conv_2 before Conv_10 if the paths are in the order in which JAX sorts the keys of dicts.

    Paths in any other order stay as they are: their tree has an order of its own.
    """
    parts = [path.split("/") for path in paths]
    if parts != sorted(parts):
        return paths
    return sorted(paths, key=lambda path: [(s.zfill(9), s) for s in re.split(r"(\d+)", path)])
