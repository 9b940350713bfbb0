"""The simulation of large networks: what is sent, how tracing grows, how much memory discovery takes."""

import cProfile
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from benchmarks.measuring.collectives import count_collectives
from benchmarks.scale import __main__ as command
from benchmarks.scale import cases, finding, networks, sharded, table, transformer
from benchmarks.scale.optimizers import OPTIMIZERS, REFERENCE, make_step
from spherical_optax._discovery import portions, radial_sums, random_points

from .command_line import expect_one_error_line
from .compiling import usual_jit

PROGRAM = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8,4], y: bf16[4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %both = (f32[8]{0}, f32[]) all-reduce(%x, %y), to_apply=%add
  %start = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%y), dimensions={0}
  %whole = bf16[32]{0} all-gather-done(%start)
  %part = f32[2,4]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%add
  ROOT %next = f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1}}
}
"""


def make_abstract_mesh(devices):
    model = sharded.MODEL[devices]
    return jax.sharding.AbstractMesh((devices // model, model), ("fsdp", "model"))


# --- what is counted --------------------------------------------------------------------------


def test_collectives_are_counted_by_kind_and_bytes():
    arrays, sizes, largest = count_collectives(PROGRAM)
    assert arrays == {
        "all-reduce": 2,
        "all-gather": 1,
        "reduce-scatter": 1,
        "collective-permute": 1,
    }
    assert sizes == {
        "all-reduce": 32 + 4,
        "all-gather": 64,
        "reduce-scatter": 128,
        "collective-permute": 128,
    }
    assert largest == 128


def test_the_networks_have_the_size_that_they_are_meant_to_have():
    found = {
        name: (len(arrays), sum(math.prod(a.shape) for a in arrays.values()))
        for name, make in networks.NETWORKS.items()
        if (arrays := make())
    }
    assert found == {
        "7B": (291, 6_738_415_616),
        "7B, scanned": (12, 6_738_415_616),
        "mixture": (1003, 11_878_811_648),
        "mixture, scanned": (13, 11_878_811_648),
    }


@pytest.mark.parametrize("devices", sharded.MODEL)
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_every_matrix_is_cut_over_all_devices(network, devices):
    mesh, arrays = make_abstract_mesh(devices), networks.NETWORKS[network]()
    params = networks.describe_params(arrays, mesh)
    for name, x in params.items():
        local = math.prod(x.sharding.shard_shape(x.shape))
        if arrays[name].hidden or name in ("embed", "head"):
            assert local * devices == x.size, name
        else:
            assert local < x.size, name
    total = 4 * sum(x.size for x in params.values())
    assert networks.count_local_bytes(params) == pytest.approx(total / devices, rel=0.01)


def test_a_state_is_cut_like_its_parameter_where_they_have_an_axis_in_common():
    mesh = make_abstract_mesh(64)
    arrays = {"layer/down": networks.Array((8, 16, 32), networks.PartitionSpec(None, "fsdp"), True)}
    shape = jax.ShapeDtypeStruct
    state = {"ema": {"layer/down": shape((8, 16, 32), jnp.float32)}, "count": shape((), jnp.int32)}
    state["sum"] = {"layer/down": shape((8, 1, 32), jnp.float32)}
    placed = networks.shard_state(state, arrays, mesh)
    specs = jax.tree.map(lambda x: x.sharding.spec, placed)
    assert specs == {
        "ema": {"layer/down": networks.PartitionSpec(None, "fsdp", None)},
        "sum": {"layer/down": networks.PartitionSpec(None, None, None)},
        "count": networks.PartitionSpec(),
    }


# --- two layers of the 7 billion parameters on 64 devices ------------------------------------

WORKER = """
import json
from benchmarks.scale import networks, sharded
from benchmarks.scale.optimizers import OPTIMIZERS
arrays = networks.list_llama(2)
names = list(OPTIMIZERS)[:4]
print(json.dumps({name: sharded.measure_step(arrays, name, 64) for name in names}))
"""


@pytest.fixture(scope="module")
def two_layers():
    """What each optimizer keeps and sends; only shapes are needed, so the sizes are the real ones."""
    done = cases.start(["-c", WORKER], cases.make_environment(64))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_adamw_sends_nothing(two_layers):
    assert two_layers[REFERENCE]["collective_arrays"] == {}
    assert two_layers[REFERENCE]["temporary_bytes"] < 2**10


def test_a_sum_over_a_sharded_axis_is_all_that_is_sent(two_layers):
    """Of every kernel AdamSRT sends three numbers per output, and AdamH six per matrix."""
    adamsrt, adamh = two_layers["so.adamsrt"], two_layers["so.adamh"]
    outputs = 3 * 4096 // 4 + 4096 // 16 + 2 * 11008 // 4 + 4096 // 16  # of a layer, on one device
    assert adamsrt["collective_arrays"] == {"all-reduce": 2 * 3 * 7}
    assert adamsrt["collective_bytes"] == {"all-reduce": 2 * 3 * 4 * outputs}
    assert adamh["collective_bytes"] == {"all-reduce": 6 * 2 * 7 * 4}
    assert adamh["largest_collective_bytes"] == 4


@pytest.mark.parametrize("name", ["so.adamsrt", "so.adamh", "so.track(optax.adamw)"])
def test_nothing_of_the_size_of_a_parameter_is_gathered(two_layers, name):
    """One number per output is a hundredth of the smallest shard of a matrix."""
    row = two_layers[name]
    assert row["collective_arrays"].keys() == {"all-reduce"}
    assert 0 < row["largest_collective_bytes"] < 0.011 * row["smallest_matrix_shard_bytes"]
    assert sum(row["collective_bytes"].values()) < 0.02 * row["parameter_bytes"]


def test_the_state_is_sharded(two_layers):
    """A device holds its share, plus one number per output, which is cut along the model axis only."""
    params = two_layers[REFERENCE]["parameter_bytes"]
    ratios = {name: row["state_bytes"] / params for name, row in two_layers.items()}
    ends = 2 * 32_000 * 4096 / (2 * 32_000 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert ratios[REFERENCE] == pytest.approx(2, abs=1e-3)
    assert ratios["so.adamh"] == pytest.approx(2, abs=1e-3)
    assert ratios["so.adamsrt"] == pytest.approx(1 + ends, abs=0.01)
    assert ratios["so.track(optax.adamw)"] == pytest.approx(2, abs=0.03)


# --- the number of arrays ---------------------------------------------------------------------


def count_calls(name, arrays):
    """Calls of Python functions while a step is traced: an exact number in place of a time."""
    params = {f"layer{i}": jax.ShapeDtypeStruct((64, 32), jnp.float32) for i in range(arrays)}
    tx = OPTIMIZERS[name](*(dict.fromkeys(params, s) for s in (so.Sphere(), so.Sphere(()))))
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(make_step(tx))
    profile = cProfile.Profile()
    profile.enable()
    step.trace(params, state, params)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", list(OPTIMIZERS)[:4])
def test_tracing_is_linear_in_the_number_of_arrays(name):
    few, more, most = 5, 15, 35
    count_calls(name, few)  # what is cached is cached
    calls = [count_calls(name, arrays) for arrays in (few, more, most)]
    per_array = (calls[1] - calls[0]) / (more - few)
    assert 0 < (calls[2] - calls[1]) / (most - more) < 1.05 * per_array


# --- discovery --------------------------------------------------------------------------------


def test_portions_hold_every_array_once_and_in_order():
    arrays = [np.zeros(n) for n in (3, 4, 9, 1, 1, 5, 6)]
    found = list(portions.make_portions(arrays, 7))
    assert [[x.size for x in arrays[p]] for p in found] == [[3, 4], [9], [1, 1, 5], [6]]
    assert list(portions.make_portions(arrays)) == [slice(0, 7)]


def test_the_spheres_of_the_transformer_are_found_in_portions_too(monkeypatch):
    size = finding.Size(128, 1, 32)
    params = transformer.make_params(size, jax.random.key(0))
    assert finding.count_parameters(size) == sum(x.size for x in jax.tree.leaves(params))
    tokens = jnp.arange(32).reshape(8, 4)
    declared = transformer.declare_spheres(params)
    for entries in (2**24, 40_000):
        monkeypatch.setattr(portions, "ENTRIES", entries)
        with jax.numpy_rank_promotion("allow"):
            found = so.find_spheres(
                lambda params: transformer.predict(params, tokens), params, key=jax.random.key(2)
            )
        assert found == declared


@pytest.mark.parametrize(("entries", "enough"), [(2**18, True), (2**24, False)])
def test_discovery_needs_at_most_four_copies_of_the_parameters(entries, enough):
    """By the memory of its programs, in portions that are small beside the model, and in one."""
    params = transformer.make_params(finding.Size(256, 4, 512), jax.random.key(0))
    tokens = jnp.arange(32).reshape(8, 4)
    with jax.numpy_rank_promotion("allow"):
        function = random_points.Function("test", lambda p: transformer.predict(p, tokens), params)
    arrays, seed = function.arrays, np.zeros(4, np.uint32)

    def count_copies(fn, *args):
        """The temporary memory of a program, in copies of the parameters."""
        with jax.numpy_rank_promotion("allow"):
            compiled = usual_jit(fn).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / sum(x.nbytes for x in arrays)

    drawing = adding = 0.0
    for portion in portions.make_portions(arrays, entries):
        some, factors = arrays[portion], np.ones(len(arrays[portion]), np.float32)
        dtypes = tuple(x.dtype for x in some)
        draw = functools.partial(random_points._draw_arrays, dtypes=dtypes)
        drawing = max(drawing, count_copies(draw, some, seed, factors))
        adding = max(adding, count_copies(radial_sums._reduce_all, some, some))
    gradient = count_copies(function.compute_gradient, arrays, seed)
    # Beside the parameters there are a point and then its gradient, too.
    peak = max(2 + drawing, 3 + gradient, 3 + adding)
    assert (peak <= 4) == enough


# --- command line, result file ----------------------------------------------------------------


def test_the_command_writes_its_part_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    seconds = {"init_seconds": 0.1, "trace_seconds": 2.0, "compile_seconds": 3.0}
    monkeypatch.setattr(cases, "run", lambda case: case | seconds)
    arrays = ["--only", "arrays", "--arrays", "20", "10"]
    assert command.main([*arrays, "--out", str(tmp_path)]) == 0
    sizes = {"arrays": 24, "parameters": 10**6, "right": True, "seconds": 1.0, "peak_bytes": 16e6}
    monkeypatch.setattr(cases, "run", lambda case: case | sizes)
    few = ["--only", "discovery", "--parameters", "4e6"]
    assert command.main([*few, "--out", str(tmp_path)]) == 0
    assert "4.0" in capsys.readouterr().out
    content = json.loads((tmp_path / "scale.json").read_text("utf-8"))
    assert list(content["parts"]) == ["arrays", "discovery"]
    found = content["parts"]["arrays"]
    assert found["command"].startswith("python -m benchmarks.scale --arrays 10 20 --only arrays")
    first, *_, last = [(case["optimizer"], case["arrays"]) for case in found["cases"]]
    assert (first, last) == ((REFERENCE, 10), (cases.TRACK, 20))
    assert str(tmp_path) not in json.dumps(content)


def test_a_case_that_fails_is_an_entry_and_no_end():
    row = cases.run({"part": "arrays", "optimizer": "nobody", "arrays": 1, "compiles": False})
    assert row["error"] == "exit status 1: KeyError: 'nobody'"
    sharded_row = {"network": "7B", "devices": 64, "optimizer": "x", "error": "too slow"}
    assert table.format_sharded([sharded_row])[0][3] == "too slow"
    assert len(table.format_sharded([sharded_row])[0]) == len(table.SHARDED.header)


def test_times_per_array_are_compared():
    rows = [
        {"optimizer": name, "arrays": n, "init_seconds": 0.0, "compile_seconds": compiling}
        | {"trace_seconds": tracing}
        for name, n, tracing, compiling in (
            (REFERENCE, 100, 1.0, 2.0),
            (REFERENCE, 1000, 11.0, 20.0),
            ("so.adamh", 100, 3.0, 3.0),
            ("so.adamh", 1000, 33.0, None),
        )
    ]
    cells = [row[5:] for row in table.format_arrays(rows)]
    assert cells[1] == ("1.10", "1.00", "1.00", "1.00")
    assert cells[3] == ("1.10", "-", "3.00", "-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "7"], "--devices: invalid choice: 7"),
        (["--arrays", "0"], "--arrays: must be at least 1, got 0"),
        (["--parameters", "x"], "--parameters: invalid float value: 'x'"),
        (["--only", "everything"], "everything"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(capsys, options, message):
    expect_one_error_line(capsys, lambda: command.main(options), message)


# --- the committed results --------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    path = Path(command.__file__).parents[1] / "results" / "scale.json"
    parts = json.loads(path.read_text("utf-8"))["parts"]
    assert list(parts) == list(command.PARTS)
    return {name: part["cases"] for name, part in parts.items()}


def count_outputs(array, devices):
    """The outputs of a matrix, or of all in a stack, on one device."""
    sharding = jax.NamedSharding(make_abstract_mesh(devices), array.partition)
    *stack, _, outputs = sharding.shard_shape(array.shape)
    return math.prod(stack) * outputs


def test_committed_shards(committed):
    """One number per output is the most that is sent, except by Muon, whose matrices are gathered."""
    rows = [row for row in committed["sharded"] if "error" not in row]
    assert {row["devices"] for row in rows} == set(cases.DEVICES)
    for row in rows:
        arrays = networks.NETWORKS[row["network"]]().values()
        outputs = max(count_outputs(x, row["devices"]) for x in arrays if x.hidden)
        if "muon" not in row["optimizer"]:
            assert row["collective_arrays"].keys() <= {"all-reduce"}
            assert row["largest_collective_bytes"] <= 4 * outputs


def test_committed_muon(committed):
    """What MuonH gathers is what Optax's Muon gathers."""
    rows = {(r["network"], r["devices"], r["optimizer"]): r for r in committed["sharded"]}
    ours = {key: row for key, row in rows.items() if key[2] == "so.muonh"}
    assert ours
    for (network, devices, _), row in ours.items():
        muon = rows[network, devices, "optax.contrib.muon"]
        assert row["collective_bytes"]["all-gather"] == muon["collective_bytes"]["all-gather"]
        assert row["largest_collective_bytes"] == muon["largest_collective_bytes"]
        assert row["temporary_bytes"] <= muon["temporary_bytes"]


def test_committed_arrays(committed):
    rows = {(row["optimizer"], row["arrays"]): row for row in committed["arrays"]}
    for name in (REFERENCE, "so.adamsrt", "so.adamh", cases.TRACK):
        most = max(arrays for optimizer, arrays in rows if optimizer == name)
        few, many = (rows[name, n]["trace_seconds"] / n for n in (100, most))
        assert many < 2 * few, name  # 10 or 40 times if tracing were quadratic


def test_committed_discovery(committed):
    rows = committed["discovery"]
    assert max(row["parameters"] for row in rows) > 3.4e8
    assert all(row["right"] for row in rows)
    _, large, copies = table.find_marginal_copies(rows)
    assert copies <= 4
    assert large["parameters"] > 3.4e8
