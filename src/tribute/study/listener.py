"""What a study tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What a study reports while it runs."""

    def stage(self, title: str) -> None:
        """A stage begins."""
        ...

    def message(self, text: str) -> None:
        """A fact worth a line."""
        ...

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        """A stage advances; `text` says what was just done."""
        ...


def duration_text(seconds: float) -> str:
    """Seconds as text for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
