"""Studies of seconds, in this process and in others, and a store with evaluations of a value function that is known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_study import TINY_PRESET
from workshop import BEHAVIOR_MODULE

from tribute.config import StudyConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with behaviors that count their calls, and the recipe of the smallest network."""
    (tmp_path / "counted.py").write_text(BEHAVIOR_MODULE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_PRESET))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counted", raising=False)  # of an earlier test
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(path for path in sys.path if path)}")
    return tmp_path


@pytest.fixture
def make_study(workshop: Path) -> Callable[..., StudyConfig]:
    """Build the settings of a study of 8 coalitions; keyword arguments change them."""

    def make(**changes: Any) -> StudyConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "dataset": "digits",
            "preset": str(workshop / "tiny.yaml"),
            "outdir": str(workshop / "runs"),
            "behaviors": ["counted:brightness", "counted:contrast"],
            "fit": {"n_coalitions": 6, "n_end_points": 1},
            "test": {"n_coalitions": 0},
            "pictures": {"n_images": 0},  # which measures further coalitions
            "n_threads": 1,
        }
        return StudyConfig.parse(values | changes, where="test")

    return make
