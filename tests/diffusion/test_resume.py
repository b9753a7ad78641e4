from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.config import NoiseScheduleConfig, TrainConfig, UNetConfig
from tribute.diffusion import train as train_module
from tribute.diffusion.train import CheckpointPolicy, Progress, Trainer
from tribute.models import checkpoint as checkpoint_module
from tribute.models.build import build_unet
from tribute.models.checkpoint import list_checkpoints, load_checkpoint
from tribute.seeding import numpy_stream
from tribute.types import Images

Run = tuple[Images, NoiseScheduleConfig, UNetConfig, np.ndarray, TrainConfig]
Moment = tuple[str, int]

N_STEPS = 8
CKPT_FREQ = 2
stream = numpy_stream(0, "moments of death")
MOMENTS: list[Moment] = [
    *(("after step", int(step)) for step in sorted(stream.choice(np.arange(1, N_STEPS), 2, replace=False))),
    # Three files per checkpoint: within the weights, the average or the optimizer state of any of them.
    *(
        ("within file", int(file))
        for file in sorted(stream.choice(np.arange(3 * N_STEPS // CKPT_FREQ), 2, replace=False))
    ),
    ("before the rename", int(stream.integers(4))),
    ("before the older one is deleted", int(stream.integers(1, 4))),
]


@pytest.fixture(scope="module")
def run(
    digit_images: Images,
    noise_schedule: NoiseScheduleConfig,
    dropout_unet: UNetConfig,
    rows: np.ndarray,
    train_config: TrainConfig,
) -> Run:
    return digit_images[:32], noise_schedule, dropout_unet, rows, train_config.replace(n_steps=N_STEPS)


def train(run: Run, folder: Path, *, keep_all: bool = False, on_log: Callable[[Progress], None] | None = None) -> None:
    images, noise_schedule, unet, rows, config = run
    policy = CheckpointPolicy(folder, {"unet": unet.model_dump(mode="json")}, CKPT_FREQ, keep_all)
    trainer = Trainer(images, noise_schedule, device="cpu")
    trainer.train(build_unet(unet, opt_seed=1), rows, config, checkpoints=policy, on_log=on_log, log_freq=1)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number: int, function: Callable[..., Any], last_words: Callable[..., None] = die) -> Callable[..., Any]:
    """`function`, but the call with this number kills the process."""
    calls = iter(range(1_000))

    def wrapped(*args: Any) -> Any:
        if next(calls) == number:
            last_words(*args)
        return function(*args)

    return wrapped


def write_half_and_die(values: Any, path: Path) -> None:
    path.write_bytes(b"half a file")
    die()


def train_and_be_killed(run: Run, folder: Path, moment: Moment) -> None:
    """Train in this process until the moment, which nothing survives."""
    import safetensors.torch

    kind, number = moment
    on_log = None
    if kind == "after step":
        on_log = lambda progress: die() if progress.step == number else None  # noqa: E731
    elif kind == "within file":
        safetensors.torch.save_file = die_at_call(number, safetensors.torch.save_file, write_half_and_die)
    elif kind == "before the rename":
        checkpoint_module.write_whole_dir.__globals__["_flush_to_disk"] = die_at_call(4 * number + 3, lambda _: None)
    else:
        train_module.delete_older = die_at_call(number, train_module.delete_older)
    train(run, folder, on_log=on_log)


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(run, folder, keep_all=True)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of weights, moving average and optimizer state in the last checkpoint."""
    found = load_checkpoint(folder, with_training_state=True)
    assert found.n_steps == N_STEPS
    assert set(found.meta["files"]) == {"unet.safetensors", "ema.safetensors", "training_state.safetensors"}
    return found.meta["files"]


def test_the_same_run_twice_is_the_same(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    train(run, tmp_path, keep_all=True)
    for path in list_checkpoints(undisturbed):
        assert load_checkpoint(tmp_path / path.name).meta["files"] == load_checkpoint(path).meta["files"]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]} {moment[1]}")
def test_a_killed_run_ends_as_if_it_had_not_been(
    run: Run, undisturbed: Path, tmp_path: Path, moment: Moment, in_new_process: Callable[..., Any]
) -> None:
    with pytest.raises(BrokenProcessPool):
        in_new_process(train_and_be_killed, run, tmp_path, moment)
    partial = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert len(partial) == (moment[0] in ("within file", "before the rename"))
    for path in list_checkpoints(tmp_path):  # whatever has the name of a checkpoint is whole
        load_checkpoint(path, with_training_state=True)
    assert N_STEPS not in [load_checkpoint(path).n_steps for path in list_checkpoints(tmp_path)] or moment[1] == 3
    train(run, tmp_path)
    assert hashes(tmp_path) == hashes(undisturbed)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    run: Run, undisturbed: Path, tmp_path: Path, in_new_process: Callable[..., Any]
) -> None:
    for moment in [("within file", 1), ("after step", 3), ("after step", 7)]:
        with pytest.raises(BrokenProcessPool):
            in_new_process(train_and_be_killed, run, tmp_path, moment)
    assert load_checkpoint(tmp_path).n_steps == 6
    train(run, tmp_path)
    assert hashes(tmp_path) == hashes(undisturbed)


@pytest.mark.parametrize("n_steps", range(CKPT_FREQ, N_STEPS + 1, CKPT_FREQ))
def test_any_checkpoint_can_be_resumed(run: Run, undisturbed: Path, tmp_path: Path, n_steps: int) -> None:
    name = f"ckpt_steps_{n_steps:08d}"
    shutil.copytree(undisturbed / name, tmp_path / name)
    steps: list[int] = []
    train(run, tmp_path, on_log=lambda progress: steps.append(progress.step))
    assert steps == list(range(n_steps + 1, N_STEPS + 1))
    assert hashes(tmp_path) == hashes(undisturbed)


def test_an_interrupted_run_can_be_resumed(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path, on_log=interrupt)
    assert [load_checkpoint(path).n_steps for path in list_checkpoints(tmp_path)] == [4]
    train(run, tmp_path)
    assert hashes(tmp_path) == hashes(undisturbed)


def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_it_resumed(
    run: Run, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n_steps in (2, 4, 6):
        name = f"ckpt_steps_{n_steps:08d}"
        shutil.copytree(undisturbed / name, tmp_path / name)
    state = tmp_path / "ckpt_steps_00000006" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        train(run, tmp_path, keep_all=True, on_log=lambda progress: steps.append(progress.step))
    assert steps == [5, 6, 7, 8]
    assert "training_state.safetensors is damaged" in caplog.text
    assert (tmp_path / "ckpt_steps_00000006.damaged" / "training_state.safetensors").read_bytes() == bytes(content)
    assert hashes(tmp_path) == hashes(undisturbed)
