"""The same on a study that was really run: what is reset is made again, to the same credit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parents[1] / "study"))

from tiny_study import TINY_PRESET, SilentListener

from tribute.config import StudyConfig
from tribute.models.checkpoint import load_checkpoint
from tribute.store.records import Store
from tribute.study.outputs import attributions_csv
from tribute.study.run import run_study
from tribute.study.status import model_folders, read_status
from tribute.study.upkeep import apply_reset, checkpoint_folders, find_waste, is_whole, model_hash, plan_reset

BEHAVIOR_MODULE = "def lightness(images):\n    return float(images.mean())\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    torch.set_num_threads(1)
    (tmp_path / "light_behaviors.py").write_text(BEHAVIOR_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_PRESET))
    values = {
        "name": "tiny",
        "preset": str(tmp_path / "tiny.yaml"),
        "outdir": str(tmp_path / "runs"),
        "behaviors": ["light_behaviors:lightness"],
        "fit": {"n_coalitions": 12, "n_end_points": 1},
        "test": {"n_coalitions": 3, "opt_seeds": [1]},
        "n_threads": 1,
    }
    return StudyConfig.parse(values, where="test")


def test_a_reset_model_is_made_again_and_gives_the_same_credit(config: StudyConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study(config, SilentListener(interrupt_after=5))
    found = read_status(config)
    assert (found.stage, found.n("finished"), found.n("running")) == ("coalitions", 5, 0)
    assert all(model.is_done for model in found.models)
    assert found.per_hour is not None and found.seconds_left is not None and found.run is None

    first = run_study(config, SilentListener())
    assert first is not None
    assert read_status(config).stage == "complete"
    folders = model_folders(config)
    checkpoints = {name: checkpoint_folders(folder)[-1] for name, folder in folders.items()}
    assert {name: model_hash(path) for name, path in checkpoints.items()} == {
        name: load_checkpoint(path).model_hash for name, path in checkpoints.items()
    }
    assert all(is_whole(path) for path in checkpoints.values())
    with Store.open(config.db_url) as store:
        assert not find_waste(config, store), "a study that was only run leaves no waste"
        reset = plan_reset(config, "full_model", store)
        gone = {role: sum(n.values()) for role, n in reset.counts().items()}
        assert gone.pop("picture") >= 1
        assert gone == {"empty": 1, "grand": 1, "fit": 12}
        apply_reset(reset, store)
    assert not any(path.is_dir() for path in config.run_dir.rglob("ckpt_steps_*"))
    listener = SilentListener()
    again = run_study(config, listener)
    assert again is not None
    assert listener.n_evaluations == 14, "the retrained test coalitions were kept"
    assert attributions_csv(again) == attributions_csv(first)
