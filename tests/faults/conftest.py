"""A tiny study for tests of faults, and a small disk that can be filled."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults import PRESET
from tribute.config import StudyConfig

BEHAVIORS = """
import hashlib

def brightness(images):
    return float(images.mean())

def digest(images):
    return float(int(hashlib.sha256(images.tobytes()).hexdigest()[:12], 16))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StudyConfig]:
    """Settings of a tiny study; keyword arguments change them."""
    (tmp_path / "fault_behaviors.py").write_text(BEHAVIORS)
    (tmp_path / "tiny.yaml").write_text(json.dumps(PRESET))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRIBUTE_CACHE", str(tmp_path / "cache"))

    def make(**changes: Any) -> StudyConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "dataset": "digits",
            "preset": str(tmp_path / "tiny.yaml"),
            "outdir": str(tmp_path / "runs"),
            "behaviors": ["fault_behaviors:brightness", "fault_behaviors:digest"],
            "fit": {"n_coalitions": 12, "n_end_points": 1, "first_removal_seed": 300},
            "test": {"n_coalitions": 0},
            "ckpt_freq": 2,
            "pictures": {"n_images": 0},  # which measures further coalitions
            "n_threads": 1,
        }
        return StudyConfig.parse(values | changes, where="test")

    return make


@dataclass(frozen=True)
class SmallDisk:
    """A real disk that is soon full."""

    path: Path

    def fill(self, *, but_kib: int = 0) -> None:
        """Fill it with one file, but for some room."""
        stat = os.statvfs(self.path)
        with (self.path / "ballast").open("wb") as file:
            file.write(b"\0" * max(0, stat.f_bavail * stat.f_frsize - 1024 * but_kib))

    def make_room(self) -> None:
        """Take that file away."""
        (self.path / "ballast").unlink()

    def names(self) -> list[str]:
        """All files and folders but that one."""
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.name != "ballast")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 8 MiB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode != 0:
        pytest.skip(f"no disk can be mounted here, which takes root: {done.stderr.strip()}")
    yield SmallDisk(place)
    subprocess.run(["umount", "--lazy", str(place)], check=True)
