"""Imports within `spherical_optax.analysis`: theory knows no tracking, no part knows an optimizer."""

import ast
import pathlib

import pytest

import spherical_optax as so

ANALYSIS = pathlib.Path(so.analysis.__file__).parent
FORBIDDEN = {
    "_theory": ("analysis._tracking", "analysis._pictures"),
    "_tracking": ("analysis._pictures",),
    "_pictures": ("analysis._tracking",),
}


@pytest.mark.parametrize("path", sorted(ANALYSIS.rglob("*.py")), ids=lambda path: path.stem)
def test_data_flows_one_way(path):
    imported = [
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    forbidden = ("_transforms", "_optimizers", "_discovery", *FORBIDDEN.get(path.parent.name, ()))
    for module in imported:
        assert not module.startswith(tuple(f"spherical_optax.{name}" for name in forbidden))
