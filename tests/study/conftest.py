"""A study small enough for a test: real digits, a tiny UNet, a few steps, behaviors that need no classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

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

TINY_PRESET = {
    "dataset": "digits",
    "unet": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 2,
        "downsample_padding": 1,
    },
    "training": {
        "retrain": {"n_steps": 6, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "prune_fine_tune": {"n_steps": 4, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "gd": {"n_steps": 3, "batch_size": 8, "optimizer": {"lr": 1e-2}},
    },
    "sampling": {"n_samples": 12, "sampler": "dpm-solver++", "num_inference_steps": 2, "batch_size": 12},
}


class SilentListener:
    """Keeps what a study reports."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.messages: list[str] = []
        self.n_evaluations = 0
        self.interrupt_after = interrupt_after

    def stage(self, title: str) -> None:
        self.messages.append(title)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        if title == "coalitions":
            self.n_evaluations += 1
            if self.n_evaluations == self.interrupt_after:
                raise KeyboardInterrupt


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
        }
        return StudyConfig.parse(values | changes, where="test")

    return make
