"""The files that a call brings back: few, none of them large, and all of use later.

results.tar.gz    tables, times, figures of precision; unpacked by `collect` into benchmarks/results/gpu
cache.tar         compiled programs, as many as can travel with the next `first`
log.txt           the end of every command's output
"""

import errno
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
LARGEST = 15 * MIB  # a file that comes back may have 16 MiB
CACHE = 6 * MIB  # 64 MiB may travel, of which the checkout takes 7 and half of the data 49
LOG = 64 * 1024  # bytes of each command's output
MADE_BY = "made_by.json"  # in the cache: the device and the version of JAX that can use it


class FullError(Exception):
    """There is no room for all files that should come back; the message is one line."""


def bring_back(keep: Path, out: Path, say: Callable[[str], None]) -> None:
    """Packs the most valuable files first; a FullError names files without room, left in `keep`."""
    lost = []
    pieces: dict[str, Callable[[Path], None]] = {
        "results.tar.gz": lambda path: _pack(
            path, "w:gz", keep / "results", _list_files(keep / "results")
        ),
        "log.txt": lambda path: _join_logs(path, keep / "logs"),
        "cache.tar": lambda path: _pack(path, "w", keep / "cache", _choose_cache(keep / "cache")),
    }
    for name, write in pieces.items():
        partial = out / f"{name}.tmp"
        try:
            out.mkdir(parents=True, exist_ok=True)
            write(partial)
            if partial.stat().st_size > LARGEST:
                raise OSError(errno.EFBIG, f"{partial.stat().st_size / MIB:.0f} MiB are too many")
            partial.replace(out / name)
            say(f"{name}: {(out / name).stat().st_size / MIB:.1f} MiB")
        except OSError as error:
            partial.unlink(missing_ok=True)
            lost.append(f"{name} ({error.strerror})")
    if lost:
        raise FullError(f"{out}: cannot take {', '.join(lost)}; it is still in {keep}")


def unpack(archive: Path, folder: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        folder.mkdir(parents=True, exist_ok=True)
        tar.extractall(folder, filter="data")
        return [member.name for member in tar.getmembers() if member.isfile()]


def take_cache(carried: Path, cache: Path, made_by: Mapping[str, Any]) -> str:
    """Unpacks the cache that an earlier call brought back; returns one line about the outcome."""
    if not carried.exists():
        return "no compiled programs were carried"
    fresh = cache.with_name(f"{cache.name}.carried")
    try:
        names = unpack(carried, fresh)
        theirs = json.loads((fresh / MADE_BY).read_text("utf-8"))
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        why = type(error).__name__
        return f"{carried}: no cache of compiled programs ({why}); everything is compiled anew"
    if theirs != dict(made_by):
        shutil.rmtree(fresh)
        return f"{carried}: compiled by {theirs}, and this is {dict(made_by)}; compiled anew"
    shutil.copytree(fresh, cache, dirs_exist_ok=True)
    shutil.rmtree(fresh)
    return f"{len(names)} files of compiled programs were carried"


def _list_files(folder: Path) -> list[Path]:
    skipped = {"locks", "unfinished"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not skipped & set(path.relative_to(folder).parts)
        and path.suffix not in (".tmp", ".lock")
        and path.name != ".lockfile"  # a lock of JAX
    )


def _choose_cache(cache: Path) -> list[Path]:
    """The programs that were used last: after the second call, those that training needs.

    JAX notes the time of use of NAME-cache in NAME-atime if the cache has a largest size.
    """

    def used(path: Path) -> float:
        noted = path.with_name(path.name.removesuffix("-cache") + "-atime")
        return (noted if noted.exists() else path).stat().st_mtime

    files = [path for path in _list_files(cache) if not path.name.endswith("-atime")]
    files.sort(key=lambda path: (path.name != MADE_BY, -used(path)))
    chosen, size = [], 0
    for path in files:
        size += path.stat().st_size + 1024  # a tar's header and padding
        if size > CACHE:
            break
        chosen.append(path)
    return chosen


def drop_unfinished(cache: Path, seconds: float) -> None:
    """Deletes entries that a killed process may have left half written: JAX would never replace them."""
    for path in cache.rglob("*-cache"):
        if time.time() - path.stat().st_mtime < seconds:
            path.unlink(missing_ok=True)


def _pack(path: Path, mode: Any, folder: Path, files: Iterable[Path]) -> None:
    with tarfile.open(path, mode) as tar:
        for file in files:
            tar.add(file, str(file.relative_to(folder)))


def _join_logs(path: Path, folder: Path) -> None:
    with path.open("wb") as file:
        for log in sorted(folder.glob("*.log"), key=os.path.getmtime):
            text = log.read_bytes()
            file.write(f"\n== {log.stem}, {len(text)} bytes\n".encode() + text[-LOG:])
