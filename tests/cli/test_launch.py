"""The commands as several processes: one set of checkpoints, one store entry, the numbers of one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tribute.cli import main
from tribute.config import load_preset
from tribute.models.checkpoint import list_checkpoints, load_checkpoint
from tribute.store.records import Store

ROOT = Path(__file__).parents[2]
N_PROCESSES = 2
TRAIN = "--dataset digits --preset preset.yaml --method retrain --batch_size 8 --device cpu --n_threads 1"
UNLEARN = (
    "--load results/digits/retrain/models/full --db results.db --exp_name e1 --method gd --gd_steps 2 --batch_size 8 "
    "--n_samples 9 --sample_batch_size 4 --num_inference_steps 2 --model_behavior ink:brightness --device cpu "
    "--n_threads 1 --removal_dist shapley --removal_seed 3"
)


def one_of_several(rank: int, n_processes: int, folder: Path, rendezvous: Path, command: str, flags: str) -> None:
    """One process of a launch, which runs a command."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes)}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=n_processes,
        timeout=timedelta(seconds=120),  # for the survivor, should the other fail
    )
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    main(command, flags.split())


@pytest.fixture
def together(process_server: ForkServerContext, tmp_path: Path) -> Callable[[str, str], None]:
    """Runs a command in two processes."""

    def run(command: str, flags: str) -> None:
        rendezvous = tmp_path / f"rendezvous{len(list(tmp_path.glob('rendezvous*')))}"
        with ProcessPoolExecutor(N_PROCESSES, mp_context=process_server) as pool:
            futures = [
                pool.submit(one_of_several, rank, N_PROCESSES, tmp_path, rendezvous, command, flags)
                for rank in range(N_PROCESSES)
            ]
            for future in futures:
                future.result(timeout=240)

    return run


@pytest.fixture(autouse=True)
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a behavior that needs no classifier, and a preset whose runs can be prolonged."""
    preset = load_preset("digits").model_dump(mode="json")
    for settings in preset["training"].values():
        # A large eps: rounding must not decide the sign of a step where a gradient is nearly zero.
        settings["optimizer"] |= {"lr_schedule": "constant", "eps": 1e-4}
    preset["unet"] |= {"block_out_channels": [8, 16]}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    (tmp_path / "ink.py").write_text("def brightness(images):\n    return float(images.mean())\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def test_two_processes_save_and_measure_as_one(together: Callable[[str, str], None]) -> None:
    models = Path("results/digits/retrain/models/full")
    together("train", f"{TRAIN} --n_steps 2 --ckpt_freq 1")
    assert [path.name for path in models.iterdir()] == ["ckpt_steps_00000002"]
    together("train", f"{TRAIN} --n_steps 4 --ckpt_freq 2")  # resumed
    assert [path.name for path in models.iterdir()] == ["ckpt_steps_00000004"]
    main("train", f"{TRAIN} --n_steps 4 --outdir alone".split())
    found, alone = load_checkpoint(models), load_checkpoint(Path("alone") / models.relative_to("results"))
    for name, value in alone.unet.items():
        np.testing.assert_allclose(found.unet[name].numpy(), value.numpy(), atol=1e-5)
    assert found.meta["provenance"]["n_processes"] == N_PROCESSES

    for _ in range(2):  # the second time there is nothing to do, on both
        together("unlearn", UNLEARN)
    main("unlearn", UNLEARN.replace("results.db", "alone.db").split())
    by_two, by_one = stored("results.db"), stored("alone.db")
    assert len(by_two) == len(by_one) == 1
    assert by_two[0] == pytest.approx(by_one[0], abs=0.5)  # grey levels


def stored(db: str) -> list[float]:
    """The brightness of every evaluation in a store."""
    with Store.open(db) as store:
        return [item.behaviors["ink:brightness"] for item in store.find(1)]


def test_accelerate_launch_gives_the_loss_curve_of_one_process(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The shipped file for two processes, as documented."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or pytest.fail("no accelerate")
    flags = f"{TRAIN} --n_steps 3 --log_freq 1"
    config_file = ROOT / "accelerate_config_2_processes.yaml"
    done = subprocess.run(
        [accelerate, "launch", "--config_file", str(config_file), str(ROOT / "main.py"), *flags.split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    main("train", f"{flags} --outdir alone".split())
    assert losses(done.stdout) == pytest.approx(losses(capsys.readouterr().out), abs=2e-4)
    assert len(losses(done.stdout)) == 3
    assert len(list_checkpoints(Path("results/digits/retrain/models/full"))) == 1


def losses(printed: str) -> list[float]:
    """The losses that training printed."""
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+),", printed)]


@pytest.mark.parametrize("name", ["deepspeed_config_dp.yaml", "accelerate_config_2_processes.yaml"])
def test_the_shipped_launch_files_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / name))
    assert config.num_processes == N_PROCESSES
    assert config.mixed_precision is None  # the program's flag decides
    if name.startswith("deepspeed"):
        assert str(config.distributed_type) == "DistributedType.DEEPSPEED"
        assert config.deepspeed_config is not None
        assert config.deepspeed_config["zero_stage"] in (1, 2)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({"WORLD_SIZE": "3"}, TRAIN, "batch_size: expected a multiple of the 3 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, TRAIN, "accelerate launch asks for 'bf16'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, TRAIN, "DeepSpeed, which is not installed"),
        ({}, f"{TRAIN} --mixed_precision fp16", "fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_data_are_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    flags: str,
    expected: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tribute.study.worker.load_training_data", lambda **_: pytest.fail("data were read"))
    with pytest.raises(SystemExit):
        main("train", flags.split())
    assert expected in capsys.readouterr().err
