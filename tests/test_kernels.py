"""What is counted of a program for a GPU; compiled for one only where its compiler is installed."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kernels
from benchmarks.measuring import contenders, h100, hlo, parameters
from benchmarks.training import recipes
from benchmarks.training.methods import OPTIMIZERS

F = 4 * 1000  # the bytes of an array of the program below
PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[1000]{0}, s32[])->f32[1000]{0}}

FileLocations
1 {file_name_id=1 function_name_id=1 line=20 end_line=20 column=8 end_column=119}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_sum (p: f32[1000]) -> f32[] {
  %p = f32[1000]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
}

%fused_slice (p.1: f32[1000], i: s32[]) -> f32[10] {
  %p.1 = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[10,100]{1,0} bitcast(%p.1)
  %taken = f32[1,10]{1,0} dynamic-slice(%row, %i, %i), dynamic_slice_sizes={1,10}
  ROOT %flat = f32[10]{0} bitcast(%taken)
}

%fused_double (p.2: f32[1000]) -> (f32[1000], bf16[1000]) {
  %p.2 = f32[1000]{0} parameter(0)
  %first = f32[10]{0} slice(%p.2), slice={[0:10]}
  %twice = f32[1000]{0} add(%p.2, %p.2)
  %half = bf16[1000]{0} convert(%twice)
  ROOT %both = (f32[1000]{0}, bf16[1000]{0}) tuple(%twice, %half)
}

%command_buffer (q: f32[1000]) -> f32[1000] {
  %q = f32[1000]{0} parameter(0)
  ROOT %convolution = f32[1000]{0} custom-call(%q, %q), custom_call_target="__cudnn$convForward"
}

%async_copy (r: f32[1000]) -> f32[1000] {
  %r = f32[1000]{0} parameter(0)
  ROOT %copied = f32[1000]{0} copy(%r)
}

%body (state: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %state = (s32[], f32[1000]{0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[1000]{0} get-tuple-element(%state), index=1
  %again = f32[1000]{0} call(%x), to_apply=%command_buffer
  ROOT %next = (s32[], f32[1000]{0}) tuple(%n, %again)
}

%condition (state.1: (s32[], f32[1000])) -> pred[] {
  %state.1 = (s32[], f32[1000]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] fusion(%n.1), kind=kLoop, calls=%add
}

%look (seen: (f32[1000])) -> (f32[]) {
  %seen = (f32[1000]{0}) parameter(0)
  %y = f32[1000]{0} get-tuple-element(%seen), index=0
  %norm = f32[] fusion(%y), kind=kInput, calls=%fused_sum
  %norm.1 = f32[] fusion(%y), kind=kInput, calls=%fused_sum
  ROOT %found = (f32[]) tuple(%norm)
}

%pass (kept: (f32[])) -> (f32[]) {
  ROOT %kept = (f32[]) parameter(0)
}

ENTRY %main (x.1: f32[1000], k: s32[], pair: (f32[1000], pred[])) -> (f32[1000], f32[]) {
  %x.1 = f32[1000]{0} parameter(0), metadata={op_name="x (of two)"}
  %k = s32[] parameter(1)
  %pair = (f32[1000]{0}, pred[]) parameter(2)
  %flag = pred[] get-tuple-element(%pair), index=1
  %number = s32[] constant(3)
  %double = (f32[1000]{0}, /*index=1*/bf16[1000]{0:S(5)}) fusion(%x.1), kind=kLoop, calls=%fused_double
  %y.1 = f32[1000]{0} get-tuple-element(%double), index=0
  %slice = f32[10]{0} fusion(%y.1, /*index=1*/%k), kind=kLoop, calls=%fused_slice
  %gemm = f32[10]{0} fusion(%x.1), kind=kCustom, calls=%fused_slice
  %copy-start = (f32[1000]{0}, f32[1000]{0:S(5)}, u32[]) copy-start(%y.1)
  %copy-done = f32[1000]{0} copy-done(%copy-start)
  %later = ((f32[1000]{0}), f32[1000]{0:S(5)}, s32[]) async-start(%copy-done), calls=%async_copy
  %kept.1 = ((f32[1000]{0}), f32[1000]{0:S(5)}, s32[]) async-update(%later)
  %now = f32[1000]{0} async-done(%kept.1)
  %state.2 = (s32[], f32[1000]{0}) tuple(%number, %now)
  %loop = (s32[], f32[1000]{0}) while(%state.2), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}
  %z = f32[1000]{0} get-tuple-element(%loop), index=1
  %seen.1 = (f32[1000]{0}) tuple(%z)
  %cond = (f32[]) conditional(%flag, %seen.1, %seen.1), true_computation=%look, false_computation=%pass
  %radius = f32[] get-tuple-element(%cond), index=0
  ROOT %result = (f32[1000]{0}, f32[]) tuple(%z, %radius)
}
"""


def test_count():
    kinds = Counter({"loop fusion": 2, "copy": 2, "custom call": 7, "other": 1 + 1})
    # Doubling, the slices and the index, copying twice, the loop with two operands, the flag.
    read = F + (40 + 4) + 40 + 2 * F + 7 * 2 * F + 1
    written = (F + F // 2) + 40 + 40 + 2 * F + 7 * F
    assert hlo.count(PROGRAM) == (kinds, read, written)
    assert hlo.count(PROGRAM).kernels == 13
    looking = hlo.count(PROGRAM, larger=True)
    assert looking == (kinds + Counter({"input fusion": 2}), read + 2 * F, written + 8)
    branches = "branch_computations={%pass, %look}"
    indexed = PROGRAM.replace("true_computation=%look, false_computation=%pass", branches)
    assert indexed != PROGRAM
    assert hlo.count(indexed, larger=True) == looking


def test_count_of_a_loop_body():
    body = hlo.count(PROGRAM, loop_body=True)
    assert body == (Counter({"custom call": 1}), 2 * F, F)
    with pytest.raises(ValueError, match="how often it runs is not known"):
        hlo.count(PROGRAM.replace("known_trip_count", "unknown"))
    with pytest.raises(ValueError, match="the program has 0 loops, not one"):
        hlo.count(PROGRAM.replace(" while(", " call("), loop_body=True)
    with pytest.raises(ValueError, match="not understood: %z = f32"):
        hlo.count(PROGRAM.replace("%z = f32[1000]{0} get", "%z = f32[1000]{0}get"))


def test_size():
    shapes = {"f32[]": 4, "bf16[3,2]{1,0:T(8,128)}": 12, "pred[5]": 5, "s4[3]": 2, "token[]": 0}
    shapes |= {"c64[2]": 16, "f8e4m3fn[7]": 7, "(f32[2]{0}, (u8[3]{0}, s64[0]{0}))": 11}
    assert {shape: hlo.count_bytes(shape) for shape in shapes} == shapes


@pytest.mark.parametrize("argument", [[], ["--only", "optax.adam", "--out", "/nowhere/at/all"]])
def test_no_compiler(argument, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        kernels.main(argument)
    assert capsys.readouterr().err == (
        "error: the compiler for NVIDIA GPUs is not installed: pip install 'jax[cuda13]' "
        "(any machine will do, no GPU is needed)\n"
    )


@pytest.mark.parametrize("option", ["--model", "--only"])
def test_unknown(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.main([option, "nobody"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: argument {option}: invalid choice: 'nobody'")
    assert error.count("\n") == 1


def row(n):
    moved = {"read_bytes": 4 * 10**6, "written_bytes": 2 * 10**6, "temporary_bytes": 2**19}
    return {"kernels": n, "kinds": {"copy": n}, "at_most": None, "compile_cpu_seconds": 1.0} | moved


def test_cells():
    rows = {"optax.adam": row(4), "so.adams": row(6) | {"at_most": row(9), "read_bytes": 10**6}}
    assert kernels.format_rows(rows) == [
        ("optax.adam", "4", "1.00", "4.0", "2.0", "1.00", "0.5", "1.0"),
        ("so.adams", "6 to 9", "1.50", "1.0", "2.0", "0.50", "0.5", "1.0"),
    ]
    assert len(kernels.HEADER) == len(kernels.format_rows(rows)[0])


def test_a_model_counted_alone(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"

    def write(model, rows, decay=0.0):
        kernels.write(path, model, f"One step on {model}", rows, decay)
        return json.loads(path.read_text("utf-8"))

    write("small", {"optax.adam": row(1)})
    write("gpt2", {"optax.adam": row(2), "so.adams": row(3)})
    content = write("small", {"so.adams": row(4)})
    assert list(content["models"]) == ["gpt2", "small"]
    small = content["models"]["small"]["optimizers"]
    assert {name: row["kernels"] for name, row in small.items()} == {"optax.adam": 1, "so.adams": 4}
    assert content["command"] == (
        "python -m benchmarks.kernels --model gpt2 small --weight-decay 0 --only optax.adam so.adams"
    )
    assert list(write("small", {"optax.adam": row(1)}, decay=0.1)["models"]) == ["small"]
    monkeypatch.setattr(kernels.jax, "__version__", "0.0.0")
    assert list(write("resnet18", {"optax.adam": row(1)}, decay=0.1)["models"]) == ["resnet18"]


def test_committed():
    path = Path(kernels.__file__).parent / "results" / "kernels.json"
    content = json.loads(path.read_text("utf-8"))
    models = ["gpt2", "resnet50", "resnet18", "small"]
    assert content["command"] == (
        f"python -m benchmarks.kernels --model {' '.join(models)} --weight-decay 0"
    )
    assert content["environment"]["device"] == h100.DEVICE
    assert "jax-cuda13-plugin" in content["environment"]
    assert list(content["models"]) == models
    found = {name: model["optimizers"] for name, model in content["models"].items()}
    # All that were there when the table was made. A new optimizer may wait for the next recording.
    present = list(kernels.make_optimizers(None, 0.0))
    for rows in found.values():
        assert list(rows) == [name for name in present if name in rows]
        assert len(rows) >= 17
        assert {"so.adam", "so.adams", "so.adamst", "so.adamsrt", "so.adamg"} < rows.keys()
        assert all(sum(row["kinds"].values()) == row["kernels"] for row in rows.values())
    # The floor is a kernel for every array, and reads two arrays and writes one.
    for name, listed in parameters.LISTED.items():
        floor = found[name][contenders.FLOOR]
        assert floor["kernels"] == len(listed())
        assert floor["read_bytes"] == pytest.approx(2 * floor["written_bytes"], rel=1e-4)


def test_committed_training():
    path = Path(kernels.__file__).parent / "results" / "kernels_training.json"
    content = json.loads(path.read_text("utf-8"))
    assert content["command"] == "python -m benchmarks.kernels --training resnet20"
    rows = content["optimizers"]
    assert len(rows) == 2 * len(recipes.PAPER_METHODS)
    for name in recipes.PAPER_METHODS:
        label = OPTIMIZERS[name].label
        assert rows[f"{label}, few kernels"]["kernels"] < 0.8 * rows[label]["kernels"]


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, h100.COMPILERS)), reason="no compiler for NVIDIA GPUs"
)
@pytest.mark.usefixtures("standard_promotion")
def test_small():
    shapes, spheres = parameters.describe_network("small")
    tx = kernels.make_optimizers(spheres, 0.0)
    for name, expected in {"optax.adam": 302, "so.adamsrt": 602}.items():
        assert kernels.measure(tx[name], shapes)["kernels"] == pytest.approx(expected, abs=3)
