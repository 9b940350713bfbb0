"""The notebooks run, in their small setting, and are committed as executed, with their pictures."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 240

# In a process of its own: Jupyter's warnings are not ours, and neither is its event loop.
EXECUTE = """
import sys

import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=int(sys.argv[2]), kernel_name="python3").execute()
"""

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: pathlib.Path, kind: str) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def _outputs(path: pathlib.Path) -> list[dict]:
    return [output for cell in _cells(path, "code") for output in cell["outputs"]]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@notebooks
def test_runs_in_the_small_setting(path, tmp_path):
    pytest.importorskip("nbclient")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    # The interpreter that runs the tests, whatever kernels are installed.
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    work = tmp_path / "work"
    work.mkdir()
    env = dict(os.environ)
    # One device, as a reader has it, instead of the eight of conftest.py.
    flags = env.pop("XLA_FLAGS", "").split()
    env["XLA_FLAGS"] = " ".join(f for f in flags if "host_platform_device_count" not in f)
    env |= {
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they compile more than they compute
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "SPHERICAL_OPTAX_SMALL": "1",
        # The package that is tested, also where another copy of it is installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(SECONDS)],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS + 30,
    )
    assert done.returncode == 0, done.stderr


@notebooks
def test_is_executed_in_order(path):
    cells = _cells(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@notebooks
def test_outputs_are_pictures_without_errors(path):
    outputs = _outputs(path)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert "Traceback" not in json.dumps(outputs)


@notebooks
def test_begins_with_a_title_and_the_installation(path):
    title, first = _cells(path, "markdown")[0], _cells(path, "code")[0]
    assert "".join(title["source"]).startswith("# ")
    source = "".join(first["source"])
    assert re.search(r"try:\n    import spherical_optax\b", source)
    assert re.search(r"except ImportError:\n(.*\n)*    %pip install ", source)


@notebooks
def test_names_no_place_of_a_machine(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)  # base64 may hold anything
    text = json.dumps(content)
    assert not [place for place in ("/tmp/", "/home/", "/work/", "/Users/") if place in text]
