"""Progress bars on a terminal, and plain lines where there is none (a pipe, CI)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
SILENCE = 60.0  # seconds without a line, where there are no bars


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` equal parts with what has just been done."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task("compiling", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return

    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if done * LINES // total > (done - 1) * LINES // total:
            console.print(f"{done}/{total}  {text}", highlight=False)

    yield advance


class Overall:
    """How far many runs are, together and the present one: bars on a terminal, else lines.

    `total` and `done` count epochs, of all runs and of those that were finished before.
    """

    def __init__(self, console: Console, total: int, done: int):
        self.total, self.done, self._before = total, done, done
        self._start = self._said = time.monotonic()
        self._name = ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(
            *columns,
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self.bars.add_task("epochs of all runs", total=total, completed=done)
        self._run = self.bars.add_task("compiling", total=None)

    def update(self, run: str, text: str, epoch: int, epochs: int, done: int) -> None:
        """`done` epochs, those of finished runs and of the present one."""
        if run != self._name:  # what a checkpoint restored has not been done here
            self._name, self._before = run, self._before + epoch - 1
        self.done = done
        self.bars.update(self._all, completed=done)
        self.bars.update(self._run, completed=epoch, total=epochs, description=f"{text}  {run}")
        if self.bars.disable and time.monotonic() - self._said >= SILENCE and epoch < epochs:
            self._say(f"{run}: epoch {epoch}/{epochs}, {text}; {self.estimate_left()} left")

    def report_finished(self, text: str, done: int) -> None:
        self.done = done
        self._say(f"{text}; {self.estimate_left()} left")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self.bars.console.print(text, highlight=False, soft_wrap=True)

    def estimate_left(self) -> str:
        """How long the rest will take at the speed so far, if all epochs are alike."""
        here = self.done - self._before
        if not here:
            return "unknown"
        seconds = (time.monotonic() - self._start) * (self.total - self.done) / here
        return f"about {timedelta(seconds=round(seconds))}"
