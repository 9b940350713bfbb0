"""`find_spheres` on networks that others wrote: what it finds, whether that is right, how long it takes.

    python -m benchmarks.discovery [--out FILE.json]

For each network, a pattern matches the paths of the arrays that are on spheres by its source code.
Networks of packages that are not installed are skipped (`pip install dm-haiku equimo==1.1.0 flaxmodels`;
later versions of equimo have other modules).
"""

import functools
import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import spherical_optax as so
from benchmarks.cli import Parser
from benchmarks.reporting import report, tables

KEY = jax.random.key(0)


class Network(NamedTuple):
    package: str
    make: Callable[[Any], tuple[Callable[[Any], Any], Any]]  # package -> function, parameters
    spheres: str  # a regular expression for the paths of arrays on spheres
    kind: so.Sphere | None  # the sphere of each of these arrays, without its tie
    tied: bool = False  # whether arrays of one module are tied


def make_images(size: int, channels_first: bool = False) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), (8, size, size, 3))
    return x.transpose(0, 3, 1, 2) if channels_first else x


def _make_haiku(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(haiku: Any) -> Any:
        build = getattr(haiku.nets, name)
        net = haiku.transform_with_state(
            lambda x: build(num_classes=10, **options)(x, is_training=True)
        )
        x = make_images(64)
        params, state = jax.jit(net.init)(KEY, x)
        return lambda params: net.apply(params, state, KEY, x)[0], params

    return make


def _make_haiku_mlp(haiku: Any) -> Any:
    net = haiku.transform(lambda x: haiku.nets.MLP([32, 32, 10])(x.reshape(len(x), -1)))
    x = make_images(8)
    params = net.init(KEY, x)
    return lambda params: net.apply(params, KEY, x), params


def _make_flaxmodels(flaxmodels: Any) -> Any:
    net = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10)
    x = make_images(64)
    variables = jax.jit(functools.partial(net.init, train=True))(KEY, x)

    def fn(params: Any) -> Any:
        variables_ = {**variables, "params": params}
        return net.apply(variables_, x, train=True, mutable=["batch_stats"])[0]

    return fn, variables["params"]


def _make_equimo(name: str, size: int, **options: Any) -> Callable[[Any], Any]:
    def make(equimo: Any) -> Any:
        equinox = importlib.import_module("equinox")
        net = getattr(importlib.import_module("equimo.models"), name)(
            num_classes=10, **options, key=KEY
        )
        params, static = equinox.partition(net, equinox.is_inexact_array)
        x = make_images(size, channels_first=True)

        def fn(params: Any) -> Any:
            net = equinox.combine(params, static)
            return jax.vmap(lambda x: net(x, key=KEY, inference=True))(x)

        return fn, params

    return make


FILTER, LAYER = so.Sphere(), so.Sphere(())
VIT = {
    "img_size": 32,
    "in_channels": 3,
    "dim": 48,
    "patch_size": 8,
    "num_heads": [3],
    "depths": [3],
}
CONVNEXT = {"in_channels": 3, "dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
NETWORKS = {
    "haiku ResNet18": Network("haiku", _make_haiku("ResNet18"), r"conv.*/w$", FILTER),
    # Pre-activation: a shortcut, and no BatchNorm, follows the last convolution of a block.
    "haiku ResNet50 v2": Network(
        "haiku",
        _make_haiku("ResNet50", resnet_v2=True),
        r"(initial_conv|/conv_0|/conv_1)/w$",
        FILTER,
    ),
    "haiku MobileNetV1": Network("haiku", _make_haiku("MobileNetV1"), r"conv.*/w$", FILTER),
    "haiku MLP": Network("haiku", _make_haiku_mlp, "(?!)", None),
    "flaxmodels ResNet18": Network("flaxmodels", _make_flaxmodels, r"Conv_\d+/kernel$", FILTER),
    "equimo ViT": Network("equimo", _make_equimo("VisionTransformer", 32, **VIT), "(?!)", None),
    # LayerNorm over channels follows the stem and the depthwise convolutions: it ties kernel and bias.
    "equimo ConvNeXt": Network(
        "equimo",
        _make_equimo("ConvNeXt", 64, **CONVNEXT),
        r"dwconv|blocks/0/downsample/conv",
        LAYER,
        True,
    ),
}


def measure(network: Network) -> dict[str, Any] | None:
    try:
        package = importlib.import_module(network.package)
    except ImportError:
        return None
    fn, params = network.make(package)
    start = time.perf_counter()
    survey = so.survey_spheres(fn, params, key=jax.random.key(2))
    seconds = time.perf_counter() - start
    wrong = []
    for finding in survey.findings:
        expected = network.kind if re.search(network.spheres, finding.path) else None
        if expected is not None and network.tied:
            expected = so.Sphere(expected.index_axes, None, finding.path.rpartition("/")[0])
        if finding.sphere != expected:
            wrong.append(f"{finding.path}: {finding.sphere}, not {expected} ({finding.verdict})")
    on = [f for f in survey.findings if f.sphere is not None]
    start = time.perf_counter()
    check = so.check_spheres(fn, params, survey.spheres, key=jax.random.key(3))
    return {
        "version": getattr(package, "__version__", None),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "arrays": len(survey.findings),
        "on_spheres": len(on),
        "wrong": wrong,
        "confirmed_by_check_spheres": check.ok,
        "largest_figure_on_spheres": max((f.natural for f in on), default=None),
        "largest_change_when_scaled": max((c.change for c in check.checks), default=None),
        "smallest_figure_off_spheres": min(f.natural for f in survey.findings if f.sphere is None),
        "find_seconds": seconds,
        "check_seconds": time.perf_counter() - start,
    }


HEADER = ("network", "parameters", "arrays", "on spheres", "wrong", "checked", "find s", "check s")


def make_table(rows: dict[str, dict[str, Any] | None]) -> Table:
    texts = [
        (name, "not installed")
        if row is None
        else (
            name,
            f"{row['parameters']:,}",
            str(row["arrays"]),
            str(row["on_spheres"]),
            str(len(row["wrong"])),
            "ok" if row["confirmed_by_check_spheres"] else "NO",
            f"{row['find_seconds']:.1f}",
            f"{row['check_seconds']:.1f}",
        )
        for name, row in rows.items()
    ]
    title = "find_spheres on others' networks"
    return tables.to_rich(HEADER, texts, title, framed=True, wrapped=HEADER)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.discovery", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out.parent)
        packages = sorted({network.package for network in NETWORKS.values()})
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            parser.error(
                f"--out {args.out}: would lose the networks of {', '.join(missing)}: install them first"
            )
    console, rows = Console(), {}
    for name, network in NETWORKS.items():
        rows[name] = measure(network)
        for line in (rows[name] or {}).get("wrong", []):
            console.print(f"{name}: {line}", highlight=False)
    console.print(make_table(rows))
    if args.out:
        content = {
            "command": "python -m benchmarks.discovery",
            "environment": report.describe_environment(),
            "networks": rows,
        }
        report.write_json(args.out, content)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
