"""What checking a run brings to light, as sentences for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tribute.study.manifest import Manifest


@dataclass
class Verification:
    """What agrees, what differs, and what could not be checked and why; sentences for people.

    Attributes:
        run_dir: The run folder.
        manifest: As read; None where there is none, or it cannot be read.
        agreed: What was checked and agrees.
        differences: What differs.
        unchecked: What was not checked, with the reason.
    """

    run_dir: Path
    manifest: Manifest | None = None
    agreed: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def conclude(self, differences: Sequence[str], agreed: str) -> None:
        """Differences of one check, or what agrees when there are none."""
        self.differences += differences
        if not differences:
            self.agreed.append(agreed)


def fingerprint_difference(what: str, recorded: str, now: str) -> str:
    """Two fingerprints as a sentence."""
    return f"{what}: recorded fingerprint {recorded[:12]}, found {now[:12]}"
