"""Printing: tables, progress, logs."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from tribute.errors import ConfigError, printable

if TYPE_CHECKING:  # it brings PyTorch, for which commands that only compute would wait
    from tribute.diffusion.train import Progress

console = Console(soft_wrap=False, highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")
"""Of the processes that `accelerate launch` starts, only the first prints."""


class _PrintableFormatter(logging.Formatter):
    """Messages may hold names of others: they are shown, and the terminal does not obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging() -> None:
    """Warnings of the library go to standard error; third parties stay quiet."""
    handler = RichHandler(console=Console(stderr=True, emoji=False), show_path=False, show_time=False, markup=False)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logger = logging.getLogger("tribute")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Says at every import that a kernel for 4-bit inference is missing, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> None:
    """A table whose first column is text and whose others are numbers; cells are plain text, never markup."""
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(
            escape(printable(name)),
            justify="left" if i == 0 else "right",
            no_wrap=i > 0,
            overflow="ellipsis" if i else "fold",  # a name or a path that is cut off may be any of several
        )
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    print_line(title)  # not the table's own title, which wraps at the width of a narrow table
    console.print(table)
    if note:
        print_line(note)


def print_line(text: str) -> None:
    """Plain text, on one line unless it has line feeds; what a terminal would obey is escaped."""
    console.print(printable(text), markup=False, soft_wrap=True)


def confirm(question: str, *, yes: bool) -> bool:
    """Ask at the terminal; `yes` answers for the user.

    Args:
        question: What is about to happen, as a question.
        yes: The answer was given on the command line (`--yes`).

    Returns:
        Whether to go on; an empty answer means no.

    Raises:
        ConfigError: There is nobody to ask.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Expected an answer, and there is no terminal to ask at. Give --yes to go on")
    try:
        answer = console.input(escape(printable(f"{question} [y/N] ")))
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def size_text(n_bytes: int) -> str:
    """Bytes as text for people, in powers of ten."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= divisor:
            return f"{n_bytes / divisor:.1f} {unit}"
    return f"{n_bytes} bytes"


def interval_text(low: float, high: float) -> str:
    """An interval as text; one that could not be estimated is unknown."""
    return "unknown" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"


class TrainingReport:
    """Prints where a training run stands; rewrites one line on a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __call__(self, at: Progress) -> None:
        text = (
            f"{self.title}: step {at.step:,}/{at.n_steps:,}, loss {at.loss:.4f}, "
            f"{at.images_per_second:,.0f} images/s, lr {at.lr:.2e}"
        )
        print_line(text)


class EncodingReport:
    """Prints how many images are encoded, a line now and then."""

    def __init__(self, seconds_between_lines: float = 10.0) -> None:
        self.seconds_between_lines = seconds_between_lines
        self._started: tuple[float, int] | None = None
        self._last = 0.0

    def __call__(self, n_done: int, n_images: int) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = (now, n_done)
            print_line(f"encoding: {n_done:,} of {n_images:,} images were encoded before")
        elif n_done == n_images or now - self._last >= self.seconds_between_lines:
            rate = (n_done - self._started[1]) / max(now - self._started[0], 1e-9)
            print_line(f"encoding: {n_done:,} of {n_images:,} images, {rate:,.1f} images/s")
            self._last = now


class StudyReport:
    """Prints a study's progress: one rewritten line on a terminal, a line now and then elsewhere."""

    def __init__(self, seconds_between_lines: float = 20.0) -> None:
        self.live = sys.stdout.isatty()
        self.seconds_between_lines = seconds_between_lines
        self._last = 0.0
        self._open_line = False

    def stage(self, title: str) -> None:
        """A stage begins."""
        self._close_line()
        console.print(f"[bold]{escape(printable(title))}[/bold]")
        self._last = 0.0

    def message(self, text: str) -> None:
        """A fact worth a line."""
        self._close_line()
        print_line(f"  {text}")

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        """A stage advances."""
        line = printable(f"  {title} {n_done}/{n_total}  {text}")
        now = time.monotonic()
        if self.live:
            sys.stdout.write("\r" + line[: console.width - 1].ljust(console.width - 1))
            sys.stdout.flush()
            self._open_line = n_done < n_total
            if not self._open_line:
                sys.stdout.write("\n")
        elif n_done == n_total or now - self._last >= self.seconds_between_lines:
            print_line(line)
            self._last = now

    def _close_line(self) -> None:
        if self._open_line:
            sys.stdout.write("\n")
            self._open_line = False
