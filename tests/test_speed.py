"""The speed benchmark: who takes part, and what is said of each."""

import json
import math

import jax
import pytest

from benchmarks import parameters, speed


def test_parameters():
    assert sum(map(math.prod, parameters.resnet50().values())) == 25_557_032
    assert sum(map(math.prod, parameters.gpt2().values())) == 124_439_808
    assert len(parameters.gpt2()) == 148
    assert len(parameters.small()) == 300
    shapes, spheres = parameters.network("small")
    assert sum(s is not None for s in spheres.values()) == 100
    assert shapes["block7/kernel"].shape == (3, 3, 16, 16)


@pytest.mark.usefixtures("standard_promotion")
def test_run(tmp_path, monkeypatch, capsys):
    kernels = {f"block{i}": (3, 3, 4, 4) for i in range(3)}
    monkeypatch.setitem(parameters.LISTED, "small", lambda: parameters._with_norms(kernels))
    monkeypatch.setattr(
        speed, "optimizers", lambda *of, make=speed.optimizers: dict(list(make(*of).items())[:9])
    )
    speed.main(["--model", "small", "--rounds", "1", "--out", str(tmp_path)])
    assert "so.adamsrt" in capsys.readouterr().out
    content = json.loads((tmp_path / "speed_small.json").read_text("utf-8"))
    rows = content["optimizers"]
    assert content["command"].startswith("python -m benchmarks.speed --model small --rounds 1")
    assert rows[speed.REFERENCE]["time_ratio"] == rows[speed.FLOOR]["floor_ratio"] == 1.0
    assert rows[speed.REFERENCE]["state_bytes"] == 2 * 4 * 3 * (144 + 8) + 4
    assert 0.5 < rows["so.adamsrt"]["state_ratio"] < 0.6
    assert all(row["milliseconds"] > 0 and row["compile_seconds"] > 0 for row in rows.values())
    few = ["--model", "small", "--rounds", "1", "--only", "so.adamsrt", "--out", str(tmp_path)]
    speed.main(few)
    content = json.loads((tmp_path / "speed_few_small.json").read_text("utf-8"))
    assert list(content["optimizers"]) == [speed.FLOOR, speed.REFERENCE, "so.adamsrt"]
    assert content["command"].endswith("--only so.adamsrt")
    with pytest.raises(SystemExit):
        speed.main(["--model", "small", "--batch", "8"])
    assert "small are parameters without a network" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_torch_steps():
    """On the same parameters, where PyTorch is installed."""
    pytest.importorskip("torch")
    shapes, spheres = parameters.network("small")
    params = jax.tree.map(lambda x: jax.numpy.ones(x.shape), shapes)
    steps = speed.torch_steps(params, params, spheres, 1e-3, 0.0, 2)
    assert len(steps) >= 3
    for step in steps.values():
        step.run()
        assert step.seconds[0] > 0
        assert step.state_bytes >= 2 * 4 * 233_600
