"""The code in the README runs, in the order in which it stands there."""

import pathlib
import re

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


@pytest.mark.parametrize("page", readme.PAGES, ids=["README", "benchmarks/README"])
def test_the_numbers_are_those_of_the_results(page):
    text = page.read_text("utf-8")
    assert readme.render(page, text) == text, "run: python -m benchmarks.readme"
