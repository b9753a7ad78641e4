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
