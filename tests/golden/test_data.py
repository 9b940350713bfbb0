"""The copied recordings are the published ones, where those are at hand."""

import json
import pathlib

import numpy as np
import pytest

from . import recorded

PUBLISHED = pathlib.Path(__file__).parents[3] / "shared" / "golden"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published set is not beside the repository")
def test_copy_is_faithful():
    manifest = json.loads((PUBLISHED / "manifest.json").read_text())
    published = {case["id"]: case for case in manifest["cases"]}
    for name, case in recorded.CASES.items():
        assert case["hyper"] == published[name]["hyper"]
        assert case["grouping"] == published[name]["grouping"]
        with np.load(PUBLISHED / published[name]["file"]) as stored:
            for leaf, path in recorded.trajectory(case).items():
                expected = stored[published[name]["arrays"][leaf]][case["kept_steps"]]
                np.testing.assert_array_equal(path, expected)
    for problem in recorded.CATALOGUE["problems"]:
        with np.load(PUBLISHED / manifest["problems"][problem]["file"]) as stored:
            for name in stored:
                np.testing.assert_array_equal(
                    recorded.arrays("problems")[f"{problem}__{name}"], stored[name]
                )
    with (
        np.load(PUBLISHED / "theory_thm2.npz") as published_steps,
        np.load(recorded.DATA / "theory_thm2.npz") as copied_steps,
    ):
        assert set(copied_steps) == set(published_steps)
        for name in published_steps:
            np.testing.assert_array_equal(copied_steps[name], published_steps[name])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published set is not beside the repository")
@pytest.mark.parametrize("name", ["cases.json", "problem.npz", "trajectories.npz"])
def test_copy_of_norm_control_is_faithful(name):
    ours, published = recorded.DATA / "norm_control" / name, PUBLISHED / "norm_control" / name
    assert ours.read_bytes() == published.read_bytes()
