"""One finished run, made once; every test that changes something gets a copy of its own, in another folder."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parents[1] / "study"))

from tiny_study import TINY_PRESET, SilentListener

from tribute.config import StudyConfig
from tribute.study.outputs import write_outputs
from tribute.study.run import run_study

BEHAVIOR_MODULE = """
def brightness(images):
    return float(images.mean())

def contrast(images):
    return float(images.std(axis=(1, 2, 3)).mean())
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with behaviors and the recipe of the smallest network."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "attested_behaviors.py").write_text(BEHAVIOR_MODULE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY_PRESET))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="session")
def make_study(workshop: Path) -> Callable[..., StudyConfig]:
    """Build the settings of a study of 12 coalitions; keyword arguments change them."""

    def make(**changes: Any) -> StudyConfig:
        values: dict[str, Any] = {
            "name": "attested",
            "dataset": "digits",
            "preset": str(workshop / "tiny.yaml"),
            "outdir": str(workshop / "runs"),
            "behaviors": ["attested_behaviors:brightness", "attested_behaviors:contrast:lower"],
            "fit": {"n_coalitions": 12, "n_end_points": 1},
            "test": {"n_coalitions": 3, "opt_seeds": [1, 2]},
            "n_threads": 1,
            "pictures": {"n_images": 0},
        }
        return StudyConfig.parse(values | changes, where="test")

    return make


@pytest.fixture(scope="session")
def finished(make_study: Callable[..., StudyConfig]) -> Path:
    """The run folder of a whole study; to be read only."""
    torch.set_num_threads(1)
    config = make_study()
    result = run_study(config, SilentListener())
    assert result is not None
    write_outputs(result)
    return config.run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run under another name, in another place."""
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(finished, copy)
    return copy


@pytest.fixture
def sql(run_dir: Path) -> Callable[..., None]:
    """Change the store of the copy behind the back of the library."""

    def execute(statement: str, *values: Any) -> None:
        with closing(sqlite3.connect(run_dir / "results.db")) as connection:
            assert connection.execute(statement, values).rowcount > 0
            connection.commit()

    return execute


@pytest.fixture
def edit_json(run_dir: Path) -> Callable[..., None]:
    """Change a JSON file of the copy."""

    def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        values = json.loads((run_dir / name).read_text())
        change(values)
        (run_dir / name).write_text(json.dumps(values, indent=1))

    return edit
