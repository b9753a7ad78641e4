"""What killed processes began is removed by the next one; what living ones are writing is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_study import SilentListener

from tribute import files
from tribute.behaviors.features import read_artifact, write_artifact
from tribute.config import StudyConfig
from tribute.errors import CheckpointError
from tribute.files import remove_leftovers, room_sentence, unfinished_path, write_whole_dir


@pytest.fixture
def ended() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def begin(path: Path, pid: int, kind: str = "partial") -> Path:
    """What a process would have begun."""
    mine = unfinished_path(path, kind)
    return mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{pid}."))


def write_model(folder: Path, content: str) -> None:
    def write(partial: Path) -> None:
        (partial / "a").write_text(content)

    write_whole_dir(folder / "model", write)


def test_only_what_the_dead_began_is_removed(tmp_path: Path, ended: int) -> None:
    place = tmp_path / "runs" / "deep" / "ckpt.with.dots"
    place.parent.mkdir(parents=True)
    dead_dir, dead_file = begin(place, ended), begin(tmp_path / "summary.json", ended)
    dead_dir.mkdir()
    (dead_dir / "half").write_text("half")
    dead_file.write_text("half")
    alive, mine = begin(place, os.getppid()), begin(place, os.getpid())
    for path in (alive, mine):
        path.mkdir()
    others = [tmp_path / ".hidden", tmp_path / ".name.123.partial", tmp_path / "name.partial"]
    for path in others:
        path.write_text("whose?")
    assert sorted(remove_leftovers(tmp_path)) == sorted([dead_dir, dead_file])
    assert not dead_dir.exists() and not dead_file.exists()
    assert alive.is_dir() and mine.is_dir() and all(path.exists() for path in others)


def test_a_number_that_was_given_to_another_process_protects_nothing(tmp_path: Path) -> None:
    left = begin(tmp_path / "model", os.getpid())
    left.mkdir()
    assert remove_leftovers(tmp_path) == []
    long_ago = time.time() - 10 * 86_400  # before this process began
    os.utime(left, (long_ago, long_ago))
    assert remove_leftovers(tmp_path) == [left]


def test_another_machine_has_a_day(tmp_path: Path, ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = begin(tmp_path / "model", ended)
    left.write_text("half")
    monkeypatch.setattr(files, "_host", lambda: "0123abcd")
    assert remove_leftovers(tmp_path) == []
    before = time.time() - files.FOREIGN_SECONDS - 60
    os.utime(left, (before, before))
    assert remove_leftovers(tmp_path) == [left]


def test_what_was_moved_aside_to_be_replaced_comes_back(tmp_path: Path, ended: int) -> None:
    """Killed between the two renames: nothing has the name, and the old content is whole."""
    write_model(tmp_path, "old")
    new = begin(tmp_path / "model", ended)
    new.mkdir()
    (tmp_path / "model").rename(begin(tmp_path / "model", ended, "replaced"))
    remove_leftovers(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [("a", "old")]
    assert (tmp_path / "model").is_dir() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    write_model(tmp_path, "new")
    (tmp_path / "elsewhere").rename(begin(tmp_path / "model", ended, "replaced"))  # killed before it was deleted
    remove_leftovers(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [("a", "new")]


def test_an_artifact_clears_what_was_begun_of_it_alone(tmp_path: Path, ended: int) -> None:
    mine, others = begin(tmp_path / "key", ended), begin(tmp_path / "other-key", ended)
    for path in (mine, others):
        path.mkdir()
    assert write_artifact(tmp_path / "key", {"x": np.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["key", others.name])
    np.testing.assert_array_equal(read_artifact(tmp_path / "key")[0]["x"], np.ones(3))


def test_a_checkpoint_left_half_deleted_is_deleted_by_the_next_run(
    tmp_path: Path, in_new_process: Callable[..., None]
) -> None:
    """Of the checkpoint before the last one, deleted file by file, some files may be left."""
    from tribute.config import NoiseScheduleConfig, TrainConfig, UNetConfig
    from tribute.diffusion.train import CheckpointPolicy, Trainer
    from tribute.models.build import build_unet

    unet = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )
    trainer = Trainer(np.zeros((8, 8, 8, 1), np.uint8), NoiseScheduleConfig(), device="cpu")
    policy = CheckpointPolicy(tmp_path, {"unet": unet.model_dump(mode="json")}, 2)

    def train() -> list[str]:
        model = build_unet(unet, opt_seed=1)
        trainer.train(model, np.arange(8), TrainConfig(n_steps=4, batch_size=4), checkpoints=policy)
        return sorted(path.name for path in tmp_path.iterdir())

    assert train() == ["ckpt_steps_00000004"]
    (tmp_path / "ckpt_steps_00000002").mkdir()
    (tmp_path / "ckpt_steps_00000002" / "ema.safetensors").write_text("not yet deleted")
    assert train() == ["ckpt_steps_00000004"]


def test_a_damaged_pruned_model_is_kept_aside_and_pruned_again(make_study: Callable[..., StudyConfig]) -> None:
    from tribute.study.run import prepare_study

    config = make_study()

    def prepared_hash() -> str:
        prepared = prepare_study(config, SilentListener())
        assert prepared is not None
        return prepared.sparse.model_hash

    expected = prepared_hash()
    (pruned,) = (config.run_dir / "digits" / "pruned").rglob("ckpt_steps_*")
    (pruned / "unet.safetensors").write_bytes(b"damaged")
    (pruned.parent / begin(pruned, os.getppid()).name).mkdir()  # and another process is at work beside it
    assert prepared_hash() == expected
    assert (pruned.parent / f"{pruned.name}.damaged").is_dir() and pruned.is_dir()


def test_the_room_on_a_disk_is_said(tmp_path: Path) -> None:
    said = room_sentence(tmp_path / "not" / "there", 5 * 1024**2)
    assert said.startswith("about 5.0 MiB needed, ") and said.endswith(" free")
    assert CheckpointError(said)
