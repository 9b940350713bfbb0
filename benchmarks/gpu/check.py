"""Describes this machine in one line of JSON; fails with one line if a package is missing."""

import importlib
import json
import sys

NEEDED = (
    "flax",
    "optax",
    "orbax.checkpoint",
    "filelock",
    "sklearn",
    "scipy",
    "matplotlib",
    "rich",
    "PIL",
)


def main() -> None:
    missing = []
    for name in ("jax", *NEEDED):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
        else:
            if name == "PIL" and not importlib.import_module("PIL.features").check("webp"):
                missing.append("PIL with WebP")
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    import jax

    from benchmarks.cli import to_one_line
    from benchmarks.reporting import report

    try:
        kind, platform = jax.devices()[0].device_kind, jax.default_backend()
    except RuntimeError as error:
        sys.exit(f"no device: {to_one_line(error)}")
    found = {"device": kind, "platform": platform, "jax": jax.__version__}
    print(json.dumps(found | {"slug": report.make_device_slug() or "cpu"}))


if __name__ == "__main__":
    main()
