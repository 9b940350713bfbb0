"""A quarter of an hour on a GPU that is lent, used by two calls of one command.

    python -m benchmarks.gpu prepare --data-dir DIR     # here: packs the data, notes the commit
    python3 -m benchmarks.gpu first SECONDS             # there: numbers, step times; compiles
    python3 -m benchmarks.gpu second SECONDS            # there: trains until the time is up
    python -m benchmarks.gpu collect FOLDER             # here: takes in what came back

The GPU's machine has a copy of the files without history, no installation of this package and no
network. 64 MiB can travel with a call; half of CIFAR-10 goes with each. The calls write their results
to the folder that $OUT names. The next two calls may be days later, on another machine: they go on
where these end.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cli import Parser, at_least
from benchmarks.gpu import calls, luggage, parcels, settings, stages

LIMIT = 62 * luggage.MIB  # 64 MiB may travel
KEEP = Path.home() / "spherical_optax_gpu"  # on the GPU's machine, as long as that stays
CARRY = {"first": ("commit", "a", "cache.tar"), "second": ("commit", "b")}


class UsageError(Exception):
    """The command cannot be carried out as it was given; the message is one line."""


def prepare(data_dir: Path, folder: Path) -> None:
    npz = data_dir / "cifar10.npz"
    if not npz.exists():
        raise UsageError(f"{npz} is not there")
    if _git("status", "--porcelain"):
        raise UsageError("commit first: results name the commit that made them")
    parcels.pack(npz, folder)
    commit = f"{_git('rev-parse', 'HEAD')} {stages.hash_sources()}\n"
    (folder / "commit").write_text(commit, "utf-8")
    tracked = sum(
        path.stat().st_size
        for name in _git("ls-files", "-z").split("\0")
        if (path := stages.ROOT / name).is_file()
    )
    for call, names in CARRY.items():
        there = [folder / name for name in names if (folder / name).exists()]
        size = tracked + sum(map(_count_bytes, there))
        print(
            f"{call}: {size / luggage.MIB:.1f} MiB travel; carry "
            + " ".join(f"{folder.name}/{path.name}" for path in there)
        )
        if size > LIMIT:
            raise UsageError(f"{call}: more than {LIMIT / luggage.MIB:.0f} MiB cannot travel")


def collect(folder: Path, results: Path, carried: Path) -> None:
    archive = folder / "results.tar.gz"
    if not archive.exists():
        raise UsageError(f"{archive} is not there: nothing came back")
    try:
        names = luggage.unpack(archive, results)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"{archive}: is no archive, or not a whole one") from error
    print(f"{len(names)} results are in {results}")
    if (cache := folder / "cache.tar").exists():
        carried.mkdir(parents=True, exist_ok=True)
        shutil.copy(cache, carried / cache.name)
        print(f"the next first call can carry {carried / cache.name}")
    print("next: python -m benchmarks.readme, look at the page, and commit both")


def run_call(args: Any) -> int:
    if not (out := os.environ.get("OUT")):
        raise UsageError("the variable OUT does not name the folder for what should come back")
    for ended in (signal.SIGTERM, signal.SIGHUP):  # even then the call brings back its results
        signal.signal(ended, lambda *_: sys.exit("ended from outside"))
    setting = settings.SMALL if args.small else settings.Setting()
    if getattr(args, "models", None) is not None:
        setting = setting._replace(models=args.models)
    call = stages.Call(setting, args.seconds, args.keep, Path(out))
    try:
        getattr(calls, args.command)(call)
    except (stages.CallError, subprocess.TimeoutExpired, OSError) as error:
        call.failed.append(str(error))
    finally:
        call.end()
        try:
            luggage.bring_back(call.keep, call.out, call.say)
        except luggage.FullError as error:
            call.failed.append(str(error))
        for line in call.failed:
            print(f"FAILED  {line}", flush=True)
    return 1 if call.failed else 0


def _git(*words: str) -> str:
    command = ["git", "-C", str(stages.ROOT), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip("\n\0")


def _count_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.gpu", description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="pack the data, note the commit")
    command.add_argument("--data-dir", type=Path, required=True, help="holds cifar10.npz")
    command.add_argument("--folder", type=Path, default=stages.CARRIED)
    for name in ("first", "second"):
        command = commands.add_parser(name, help=str(getattr(calls, name).__doc__).splitlines()[0])
        help_text = "within which the call ends; let the tool that runs it wait 20 longer"
        command.add_argument("seconds", type=at_least(float, 60.0, 3600.0), help=help_text)
        if name == "first":
            help_text = "whose step times are measured; none if no model is named"
            command.add_argument("--models", nargs="*", metavar="MODEL", help=help_text)
        command.add_argument("--small", action="store_true", help="the rehearsal's setting")
        command.add_argument("--keep", type=Path, default=KEEP, help="what stays between the two")
    command = commands.add_parser("unpack", help="put the halves together; `second` does it")
    command.add_argument("--keep", type=Path, default=KEEP)
    command = commands.add_parser("collect", help="take in what came back")
    command.add_argument("folder", type=Path)
    command.add_argument("--results", type=Path, default=calls.RESULTS)
    command.add_argument("--carried", type=Path, default=stages.CARRIED)
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            prepare(args.data_dir, args.folder)
        elif args.command == "collect":
            collect(args.folder, args.results, args.carried)
        elif args.command == "unpack":
            print(parcels.unpack(args.keep / "data", args.keep / "npz"))
        else:
            return run_call(args)
    except (UsageError, parcels.ParcelError, stages.CallError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
