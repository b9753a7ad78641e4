"""A study small enough for a test: real digits, a tiny UNet, a few steps, behaviors that need no classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_study import TINY_PRESET

from tribute.config import StudyConfig

BEHAVIOR_MODULE = """
import numpy as np

def brightness(images):
    return float(images.mean())

def contrast(images):
    return float(images.std(axis=(1, 2, 3)).mean())

def broken(images):
    return float("nan")
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY_PRESET))
    return path


@pytest.fixture
def make_study(tmp_path: Path, tiny_preset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StudyConfig]:
    """Build the settings of a tiny study; keyword arguments change them."""
    (tmp_path / "ink_behaviors.py").write_text(BEHAVIOR_MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**changes: Any) -> StudyConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "dataset": "digits",
            "preset": str(tiny_preset),
            "outdir": str(tmp_path / "runs"),
            "behaviors": ["ink_behaviors:brightness", "ink_behaviors:contrast:lower"],
            "fit": {"n_coalitions": 24, "n_end_points": 2, "leave_one_out": True, "first_removal_seed": 300},
            "test": {"n_coalitions": 4, "opt_seeds": [1, 2]},
            "n_threads": 1,
            "pictures": {"n_images": 0},
        }
        return StudyConfig.parse(values | changes, where="test")

    return make
