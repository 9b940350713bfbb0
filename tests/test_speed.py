"""The speed benchmark: who takes part, and what is said of each."""

import json
import math
import warnings
from types import SimpleNamespace

import chex
import jax
import pytest

import spherical_optax as so
from benchmarks import speed
from benchmarks.measuring import contenders, kernel_times, optax_steps, parameters, speed_peers


def test_parameters():
    assert sum(map(math.prod, parameters.list_resnet50().values())) == 25_557_032
    assert sum(map(math.prod, parameters.list_gpt2().values())) == 124_439_808
    assert len(parameters.list_gpt2()) == 148
    assert len(parameters.list_small()) == 300
    shapes, spheres = parameters.describe_network("small")
    assert sum(s is not None for s in spheres.values()) == 100
    assert shapes["block7/kernel"].shape == (3, 3, 16, 16)


@pytest.mark.usefixtures("standard_promotion")
def test_run(tmp_path, monkeypatch, capsys):
    kernels = {f"block{i}": (3, 3, 4, 4) for i in range(3)}
    monkeypatch.setitem(parameters.LISTED, "small", lambda: parameters._add_norms(kernels))
    monkeypatch.setattr(
        speed,
        "make_optimizers",
        lambda *of, make=speed.make_optimizers: dict(list(make(*of).items())[:9]),
    )
    speed.main(["--model", "small", "--rounds", "1", "--out", str(tmp_path)])
    assert "so.adamsrt" in capsys.readouterr().out
    content = json.loads((tmp_path / "speed_small.json").read_text("utf-8"))
    rows = content["optimizers"]
    assert content["command"].startswith("python -m benchmarks.speed --model small --rounds 1")
    assert rows[speed.REFERENCE]["time_ratio"] == rows[speed.FLOOR]["floor_ratio"] == 1.0
    assert rows[speed.REFERENCE]["state_bytes"] == 2 * 4 * 3 * (144 + 8) + 4
    assert 0.5 < rows["so.adamsrt"]["state_ratio"] < 0.6
    assert all(row["milliseconds"] > 0 for row in rows.values())
    ours = [row for name, row in rows.items() if not name.startswith(speed_peers.LIBRARIES)]
    assert all(row["compile_seconds"] > 0 for row in ours)
    few = ["--model", "small", "--rounds", "1", "--only", "so.adamsrt", "--out", str(tmp_path)]
    with warnings.catch_warnings():  # of nanobind's, at the first use of jax.profiler.ProfileData
        warnings.simplefilter("ignore", DeprecationWarning)
        speed.main([*few, "--trace"])
    assert "microseconds" in capsys.readouterr().out
    content = json.loads((tmp_path / "speed_few_small.json").read_text("utf-8"))
    traces = content["traces"]
    for name, trace in traces.items():
        assert 0 < trace["busy_microseconds"] <= trace["span_microseconds"], name
    # x + c g of nine arrays needs nine kernels
    assert round(traces[speed.FLOOR]["kinds"]["loop fusion"]["launches"]) == 9
    listed = json.loads((tmp_path / "kernels_of_speed_few_small.json").read_text("utf-8"))[
        "kernels"
    ]
    assert {row["kind"] for row in listed[speed.FLOOR].values()} == {"loop fusion"}
    speed.main(few)
    content = json.loads((tmp_path / "speed_few_small.json").read_text("utf-8"))
    assert list(content["optimizers"]) == [speed.FLOOR, speed.REFERENCE, "so.adamsrt"]
    assert content["command"].endswith("--weight-decay 0 --only so.adamsrt")
    with pytest.raises(SystemExit):
        speed.main(["--model", "small", "--batch", "8"])
    assert "small are parameters without a network" in capsys.readouterr().err


@pytest.mark.usefixtures("standard_promotion")
def test_ten_steps_in_one_call():
    """As an accelerator gets them, each with a gradient of its own: the same as ten calls."""
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jax.numpy.float32)}
    params, grads = {"kernel": jax.numpy.ones((3, 3, 2, 4))}, {}
    grads["kernel"] = jax.random.normal(jax.random.key(0), (contenders.EVERY, 3, 3, 2, 4))
    spheres = jax.tree.map(lambda _: so.Sphere(), shapes)
    tx = contenders.make_optimizers(spheres, 0.0)["so.adamsrt"]
    once, often = (optax_steps.Step(tx, params, grads, scan=scan) for scan in (True, False))
    optax_steps.compile_all([once, often])
    for step in (once, often):
        step.run()
        assert step.seconds[0] > 0
    chex.assert_trees_all_close((once.params, once.state), (often.params, often.state), rtol=1e-5)
    rows = speed.measure(shapes, spheres, 2, 0.0, only=["so.adamsrt"], torch=False, scan=True)
    assert rows[speed.FLOOR]["floor_ratio"] == 1.0


def test_kernels_of_a_gpu():
    """By the names of instructions, and inside a CUDA graph by those of the kernels."""

    def event(name, start, duration, **stats):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())

    host = SimpleNamespace(name="python", events=[event("f", 0, 9, hlo_op="nothing")])
    stream = SimpleNamespace(
        name="Stream #7(Compute)",
        events=[
            event("loop_multiply_fusion_1", 4000, 2000, hlo_op="command_buffer_4"),
            event("input_reduce", 1000, 3000, hlo_op="input_reduce_fusion"),
            event("memcpy", 9000, 1000),
        ],
    )
    summary = SimpleNamespace(name="XLA Ops", events=stream.events)
    launches = kernel_times.read_launches(
        [
            SimpleNamespace(name="/host:CPU", lines=[host]),
            SimpleNamespace(name="/device:GPU:0", lines=[summary, stream]),
        ]
    )
    assert [launch.instruction for launch in launches] == [
        "input_reduce_fusion",
        "loop_multiply_fusion_1",
        "memcpy",
    ]
    program = """
%fused (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} multiply(%a, %a)
}
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %input_reduce_fusion = f32[] fusion(%x), kind=kInput, calls=%fused
  ROOT %loop_multiply_fusion.1 = f32[100]{0} fusion(%x), kind=kLoop, calls=%fused
}"""
    found = kernel_times.summarize(launches, program, steps=2)
    assert found["kinds"] == {
        "input fusion": {"launches": 0.5, "microseconds": 1.5, "bytes": 202.0},
        "loop fusion": {"launches": 0.5, "microseconds": 1.0, "bytes": 400.0},
        "other": {"launches": 0.5, "microseconds": 0.5, "bytes": 0.0},
    }
    assert found["busy_microseconds"] == 3.0
    assert found["span_microseconds"] == 4.5
    assert list(found["kernels"]) == ["input_reduce_fusion", "loop_multiply_fusion_1", "memcpy"]


def test_another_device_does_not_overwrite(monkeypatch):
    assert speed.make_file_name("gpt2") == "speed_gpt2.json"
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert speed.make_file_name("gpt2", few=True) == "speed_few_nvidia-h100-80gb-hbm3_gpt2.json"


@pytest.mark.filterwarnings("ignore")
def test_torch_steps():
    """On the same parameters, where PyTorch is installed."""
    pytest.importorskip("torch")
    shapes, spheres = parameters.describe_network("small")
    params = jax.tree.map(lambda x: jax.numpy.ones(x.shape), shapes)
    grads = jax.tree.map(lambda x: jax.numpy.ones((2, *x.shape)), shapes)
    steps = speed_peers.make_torch_steps(params, grads, spheres, 1e-3, 0.0, 2)
    assert len(steps) >= 3
    for step in steps.values():
        step.run()
        assert step.seconds[0] > 0
        assert step.state_bytes >= 2 * 4 * 233_600
