"""Options and error messages that the command lines of the benchmarks share."""

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

DTYPES = ("float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage."""
        self.exit(2, f"error: {message}\n")

    def require_writable(self, out: Path, folder: Path) -> None:
        """Ends the command now if the folder cannot be written, not after hours of training."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            self.error(f"--out {out}: {error.strerror}")


def at_least(
    kind: Callable[[str], float], minimum: float, below: float = math.inf
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        if not value < below:
            raise argparse.ArgumentTypeError(f"must be below {below}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints this name when `kind` rejects the text
    return parse


def write_options(args: argparse.Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """The words of the options that have another value than their default."""
    words = []
    for name, default in defaults.items():
        if (value := getattr(args, name)) != default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def write_command(command: str, args: argparse.Namespace, defaults: Mapping[str, Any]) -> str:
    """The command with the options that have another value than their default."""
    return " ".join([command, *write_options(args, defaults), "--out FOLDER"])


def add_dtype(parser: argparse.ArgumentParser) -> None:
    help_text = "of the activations; parameters and optimizer state stay in float32"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=help_text)


def to_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
