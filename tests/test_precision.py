"""The precision benchmark: what is recorded, what passes, and what is caught."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import optax
import pytest

from benchmarks import precision
from benchmarks.measuring import precision_cases, precision_inputs, precision_judging
from benchmarks.measuring.precision_cases import Row
from benchmarks.measuring.precision_judging import DTYPES, find_largest
from benchmarks.precision import main
from benchmarks.reporting import report
from benchmarks.training.methods import OPTIMIZERS


@pytest.fixture
def method(monkeypatch):
    """Replaces one optimizer by what a function makes of its arguments and the true one."""

    def replace(name, build):
        true = OPTIMIZERS[name].build
        changed = OPTIMIZERS[name]._replace(build=lambda *args: build(true, *args))
        monkeypatch.setitem(OPTIMIZERS, name, changed)

    return replace


def _rows(path):
    return {row["what"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def test_everything_is_recorded():
    reference, cpu = precision.load()
    rows = {row["what"]: row for row in cpu["rows"]}
    known = {
        what: row
        for case in precision_cases.list_cases().values()
        for what, row in case.rows.items()
    }
    lost = OPTIMIZERS.keys() - (rows.keys() & reference.keys())
    assert not lost, f"python -m benchmarks.precision --record --only {' '.join(lost)}"
    assert list(rows) == list(known)
    assert {what for what, row in known.items() if not (row.zero or row.like)} == reference.keys()
    assert all((row.like or what) in reference for what, row in known.items() if not row.zero)
    assert all(precision_judging.passes(row) for row in cpu["rows"])
    for what, row in known.items():
        for dtype in DTYPES:
            assert (rows[what][dtype] is not None) == (dtype in row.floors)
    # 1.01 times the learning rate makes 1e-2.
    assert all(rows[name]["float32"]["bound"] < 1e-3 for name in OPTIMIZERS)
    assert precision.REFERENCE.stat().st_size < 1_000_000


def test_this_cpu_passes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "here.json"
    chosen = ["adam", "adamsrt", "track(optax.adam)"]
    known = precision_cases.list_cases()
    once = {  # compiling it for bfloat16 too would take as long as all the rest
        what: row._replace(floors={"float32": row.floors["float32"]})
        for what, row in known[chosen[-1]].rows.items()
    }
    known[chosen[-1]] = known[chosen[-1]]._replace(rows=once)
    monkeypatch.setattr(precision, "list_cases", lambda: known)
    assert main(["--only", *chosen, "--out", str(out)]) == 0
    assert "everything passes" in capsys.readouterr().out
    content = json.loads(out.read_text("utf-8"))
    assert content["command"] == (
        "python -m benchmarks.precision --only adam adamsrt 'track(optax.adam)'"
    )
    assert content["environment"]["platform"] == "cpu"
    rows = _rows(out)
    assert len(rows) == 2 + 4
    assert 0 < rows["adam"]["float32"]["deviation"] < rows["adam"]["float32"]["bound"] < 1e-4
    assert 1e-3 < rows["adamsrt"]["bfloat16"]["deviation"] < 0.1
    assert rows["track(optax.adam): angle"]["bfloat16"] is None
    cells = precision.format_rows(content, precision.load()[1])
    assert [len(row) for row in cells] == [len(precision.HEADER)] * 6
    assert cells[0][0] == "adam"
    assert {row[-1] for row in cells} == {"passes"}


def test_a_wrong_optimizer_fails(method, tmp_path, capsys):
    method("sgd", lambda true, rate, *rest: true(1.01 * rate, *rest))
    out = tmp_path / "here.json"
    assert main(["--only", "sgd", "--out", str(out)]) == 1
    assert "sgd, float32: 1.0e-02 (" in capsys.readouterr().out
    found = _rows(out)["sgd"]["float32"]
    assert not found["passes"]
    assert found["deviation"] == pytest.approx(0.01, rel=0.01)


def test_nan_fails(method, tmp_path, capsys):
    method("sgd", lambda true, *args: optax.chain(true(*args), optax.scale(float("nan"))))
    out = tmp_path / "here.json"
    assert main(["--only", "sgd", "--out", str(out)]) == 1
    assert "sgd, bfloat16: NaN (" in capsys.readouterr().out
    content = json.loads(out.read_text("utf-8"))
    assert content["rows"][0]["float32"]["deviation"] is None
    assert precision.format_rows(content, content)[0] == (
        "sgd",
        "NaN",
        "NaN",
        "NaN",
        "NaN",
        "FAILS",
    )


def test_what_raises_fails_alone(method, capsys):
    def broken(true, *args):
        raise RuntimeError("no memory\nand more of it")

    method("adam", broken)
    assert main(["--only", "adam", "sgd"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "adam, float32: failed: RuntimeError: no memory" in lines
    assert any(line.split()[:1] == ["sgd"] and "passes" in line for line in lines)


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ({}, "KeyError"),
        ({"sgd": {}}, "ValueError"),
        ({"sgd": {"a": np.ones((1, 1))}}, "ValueError: shape"),
        ({"sgd": {"a": np.zeros(1)}}, "ZeroDivisionError"),
    ],
)
def test_other_arrays_than_the_reference(reference, error):
    values = {"sgd": {"a": np.ones(1)}}
    judged = partial(precision_judging.judge, "sgd", precision_cases.STEPPED, "float32", values)
    assert judged({"sgd": {"a": np.ones(1)}}, 0.0)["passes"]
    found = judged(reference, 0.0)
    assert found["failed"].startswith(f"not as in the reference: {error}")
    assert not found["passes"]


@pytest.mark.parametrize("damage", ["no file", "half a file", "no numbers", "other numbers"])
def test_no_reference(damage, tmp_path, monkeypatch, capsys):
    for name in ("REFERENCE", "CPU"):
        path = tmp_path / getattr(precision, name).name
        shutil.copy(getattr(precision, name), path)
        monkeypatch.setattr(precision, name, path)
    if damage == "no file":
        precision.REFERENCE.unlink()
    if damage == "half a file":
        precision.REFERENCE.write_bytes(precision.REFERENCE.read_bytes()[:1000])
    if damage == "no numbers":
        precision.CPU.write_text('{"rows": [{}]}', "utf-8")
    if damage == "other numbers":
        monkeypatch.setattr(precision, "compute_checksum", lambda: 0)
    with pytest.raises(SystemExit) as found:
        main(["--only", "sgd"])
    assert found.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no reference (")
    assert error.endswith("record one on a CPU: python -m benchmarks.precision --record\n")
    assert error.count("\n") == 1


def test_record(method, tmp_path, monkeypatch, capsys):
    cases = {"sgd": precision_cases.list_cases()["sgd"]}
    monkeypatch.setattr(precision, "list_cases", lambda: cases)
    recorded = precision.REFERENCE, precision.CPU
    for name in ("REFERENCE", "CPU"):
        monkeypatch.setattr(precision, name, tmp_path / getattr(precision, name).name)
    assert main(["--record"]) == 0
    assert precision.load_reference().keys() == {"sgd"}
    before, now = (_rows(path)["sgd"] for path in (recorded[1], precision.CPU))
    for dtype in DTYPES:
        assert now[dtype]["deviation"] == pytest.approx(before[dtype]["deviation"], rel=0.5)
    precision.REFERENCE.unlink()
    monkeypatch.setitem(cases, "sgd", cases["sgd"]._replace(compute=lambda dtype: 1 / 0))
    with pytest.raises(SystemExit) as found:
        main(["--record"])
    assert found.value.code == 1
    assert "error: nothing recorded: sgd: ZeroDivisionError" in capsys.readouterr().err
    assert not precision.REFERENCE.exists()


def test_record_a_new_optimizer(tmp_path, monkeypatch):
    """What is recorded of the others stays as it is."""
    cases = {name: precision_cases.list_cases()[name] for name in ("sgd", "sgd_mrt")}
    monkeypatch.setattr(precision, "list_cases", lambda: cases)
    recorded, before = precision.load_reference(), _rows(precision.CPU)
    for name in ("REFERENCE", "CPU"):
        path = tmp_path / getattr(precision, name).name
        path.write_bytes(getattr(precision, name).read_bytes())
        monkeypatch.setattr(precision, name, path)
    assert main(["--record", "--only", "sgd"]) == 0
    now, rows = precision.load_reference(), _rows(precision.CPU)
    assert now.keys() == recorded.keys()
    jax.tree.map(np.testing.assert_array_equal, now["sgd_mrt"], recorded["sgd_mrt"])
    assert list(rows) == ["sgd", "sgd_mrt"]
    assert rows["sgd_mrt"] == before["sgd_mrt"]
    assert rows["sgd"]["environment"]["platform"] == "cpu"
    assert rows["sgd"]["float32"]["passes"]


def test_recorded_on_a_cpu_only(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for argv in (["--record"], ["--record", "--only", "sgd"]):
        with pytest.raises(SystemExit) as found:
            main(argv)
        assert found.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_largest():
    x = {"a": np.array([3.0, 4.0]), "b": np.array([1.0])}
    assert find_largest(x, x, 0.0) == (0.0, "a")
    assert find_largest(x, {"a": np.array([3.0, 4.5]), "b": np.array([2.0])}, 0.0) == (0.5, "b")
    assert find_largest({"a": np.array([3.0, -3.0, 3.0, 3.0])}, None, 1.0) == (3.0, "a")
    for where in ("a", "b"):
        found, of = find_largest(x | {where: np.array([np.nan])}, x | {where: np.ones(1)}, 0.0)
        assert (np.isnan(found), of) == (True, where)
    text = {"c": np.asarray("no"), "d": np.asarray("sphere")}
    assert find_largest(text, text | {"d": np.asarray("no")}, 0.0) == (1.0, "d: sphere")
    with pytest.raises(ValueError, match="shape"):
        find_largest(x, x | {"b": np.ones((1, 1))}, 0.0)


@pytest.mark.parametrize(
    ("products", "floors"),
    [("float32", [1e-5, 0.1]), ("highest", [1e-5, 0.1]), ("tensorfloat32", [5e-3, 0.1])],
)
def test_floors(products, floors, monkeypatch):
    monkeypatch.setattr(report, "find_float32_products", lambda: products)
    row = Row({"float32": 1e-5, "bfloat16": 0.1}, coarse=5e-3)
    assert [precision_judging.choose_floor(row, dtype) for dtype in DTYPES] == floors
    assert precision_judging.choose_floor(row._replace(coarse=None), "float32") == 1e-5


def test_the_inputs_are_those_of_both_dtypes():
    for tree in (precision_inputs.make_inputs(0), precision_inputs.make_inputs(1, 20)):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jax.numpy.dtype("bfloat16")}
