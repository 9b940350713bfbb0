"""The code in the README runs, in the order in which it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so
from benchmarks import readme

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("standard_promotion")  # for Optax's bias correction
def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["value"] < 2.3  # below the log(10) of guessing
    one = {"a": so.Sphere(), "b": None, "c": None}
    other = {"a": None, "b": so.Sphere(()), "c": None}
    assert names["union"](one, other) == {"a": so.Sphere(), "b": so.Sphere(()), "c": None}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "page", sorted((README.parent / "docs").glob("*.md")), ids=lambda p: p.stem
)
def test_python_blocks_of_the_docs_run(page):
    """Every optimizer in them takes a step."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    params = names["params"]
    optimizers = {k: x for k, x in names.items() if isinstance(x, optax.GradientTransformation)}
    assert len(optimizers) >= 10
    for name, tx in optimizers.items():
        updates, _ = tx.update(params, tx.init(params), params)
        for leaf in jax.tree.leaves(updates):
            assert bool(jnp.isfinite(leaf).all()), name


@pytest.mark.parametrize("page", readme.PAGES, ids=["README", "benchmarks/README"])
def test_the_numbers_are_those_of_the_results(page):
    text = page.read_text("utf-8")
    assert readme.render(page, text) == text, "run: python -m benchmarks.readme"
