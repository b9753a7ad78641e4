"""The published commands and a whole study on latents, from a Parquet file of real photographs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_study import SilentListener

from tribute.cli import main
from tribute.config import Preset, StudyConfig
from tribute.errors import MixedResultsError
from tribute.store.records import Store
from tribute.study import latents as study_latents
from tribute.study.pictures import read_pictures
from tribute.study.run import run_study

MakePreset = Callable[..., Preset]

BEHAVIORS = "import numpy as np\n\n\ndef brightness(images):\n    return float(images.mean())\n"


@pytest.fixture
def workshop(tmp_path: Path, latent_preset: MakePreset, photo_parquet: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Flags of a working folder with a preset, data and a behavior."""
    (tmp_path / "tiny.yaml").write_text(latent_preset("kl").to_yaml())
    (tmp_path / "light.py").write_text(BEHAVIORS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return f"--dataset cifar --data_dir {photo_parquet}"


def tribute(command: str, flags: str) -> None:
    main(command, flags.split())


def refused(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says before it ends with status 1."""
    with pytest.raises(SystemExit) as exit_info:
        tribute(command, flags)
    assert exit_info.value.code == 1
    return capsys.readouterr().err


def test_save_encodes_and_stops_and_reuse_goes_on_to_a_measured_coalition(
    workshop: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = f"{workshop} --preset tiny.yaml --method retrain"
    # The other published flags are accepted here, even without the GPU and the package that they need to train.
    tribute("train", f"{train} --mixed_precision fp16 --use_8bit_optimizer --precompute_stage save")
    said = capsys.readouterr().out
    assert "encoding: 40 of 40 images" in said and "40 latents of shape (6, 8, 8)" in said
    path = Path(next(line for line in said.splitlines() if line.startswith("latents: ")).removeprefix("latents: "))
    assert json.loads((path / "manifest.json").read_text())["source"]["codec"]["kind"] == "AutoencoderKL"
    assert not Path("results").exists()
    tribute("train", f"{train} --precompute_stage save")
    assert "40 latents" in capsys.readouterr().out

    load_codec = study_latents.load_codec
    monkeypatch.delattr(study_latents, "load_codec")
    tribute("train", f"{train} --precompute_stage reuse")
    full = "results/cifar/retrain/models/full"
    prune = "--pruning_ratio 0.3 --pruner magnitude --thr 0.05"
    tribute("prune", f"--load {full} {prune}")
    tribute("train", f"{workshop} --preset tiny.yaml --method prune_fine_tune {prune} --precompute_stage reuse")
    monkeypatch.setattr(study_latents, "load_codec", load_codec, raising=False)
    sparse = "results/cifar/prune_fine_tune/models/pruner=magnitude_pruning_ratio=0.3_threshold=0.05/full"
    measure = f"--load {sparse} --method gd --db results.db --exp_name e --model_behavior light:brightness"
    tribute("unlearn", f"{measure} --removal_dist shapley --precompute_stage reuse --save_samples grid.png")
    assert (tmp_path / "grid.png").exists()
    with Store.open("results.db", create=False) as store:
        (record,) = store.find()
    assert record.status == "finished" and 0 < record.behaviors["light:brightness"] < 255
    assert len(record.spec.settings["codec"]) == 64


def test_the_codec_can_be_elsewhere_but_not_another(
    workshop: str, codecs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(codecs["vq"], tmp_path / "moved")
    shutil.copytree(codecs["vq2"], tmp_path / "other")
    tribute("train", f"{workshop} --preset tiny.yaml --method retrain --codec {codecs['vq']}")
    full = "results/cifar/retrain/models/full"
    measure = (
        f"--load {full} --method gd --gd_steps 1 --db r.db --exp_name e --model_behavior light:brightness "
        "--removal_dist shapley"
    )
    tribute("unlearn", f"{measure} --codec moved")
    capsys.readouterr()
    said = refused("unlearn", f"{measure} --codec other", capsys)
    assert "another codec" in said and "--codec" in said
    assert "another codec" in refused("prune", f"--load {full} --codec other", capsys)
    assert "nothing there" in refused("unlearn", f"{measure} --codec ./missing", capsys)
    assert "main.py" in refused("unlearn", f"{measure} --precompute_stage save", capsys)


def test_a_study_of_a_latent_model_uses_its_codec_where_the_study_says(
    workshop: str, codecs: dict[str, Path], photo_parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset of the study is one of pixels: network and codec are those of the model."""
    import shutil

    shutil.copytree(codecs["kl"], tmp_path / "moved")
    preset = Preset.from_yaml(Path("tiny.yaml"))
    tribute("train", f"{workshop} --preset tiny.yaml --method retrain")
    Path("pixels.yaml").write_text(preset.replace(codec=None, dataset="pixels").to_yaml())
    study = {
        "name": "loaded",
        "dataset": "cifar",
        "data_dir": str(photo_parquet),
        "preset": "pixels.yaml",
        "codec": "moved",
        "behaviors": ["light:brightness"],
        "full_model": {"load": "results/cifar/retrain/models/full"},
        "fit": {"n_coalitions": 6, "n_end_points": 1},
        "test": {"n_coalitions": 0},
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    capsys.readouterr()
    tribute("run", "study.yaml --dry_run")
    shown = yaml.safe_load(capsys.readouterr().out)["preset"]
    assert shown["codec"]["path"] == "moved" and shown["dataset"] == "pixels"
    assert run_study(StudyConfig.from_yaml(Path("study.yaml")), SilentListener()) is not None
    tribute("prune", "--load results/cifar/retrain/models/full --preset pixels.yaml --codec moved")


def test_codec_flags_are_for_latent_presets(workshop: str, capsys: pytest.CaptureFixture[str]) -> None:
    digits = "--dataset digits --method retrain --n_steps 1"
    assert "one of pixels" in refused("train", f"{digits} --codec codec", capsys)
    assert "one of pixels" in refused("train", f"{digits} --precompute_stage reuse", capsys)
    train = f"{workshop} --preset tiny.yaml --method retrain"
    assert "--precompute_stage save" in refused("train", f"{train} --precompute_stage reuse", capsys)
    assert not Path("results").exists() or not list(Path("results").rglob("ckpt_steps_*"))


def test_the_published_network_is_shown_without_network_or_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)  # the command's own pair of sockets, for signals, may be made
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tribute("train", "--dataset cifar --preset celeba --method retrain --precompute_stage save --dry_run")
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["codec"]["path"] == "CompVis/ldm-celebahq-256" and settings["codec"]["scaling_factor"] == 1.0


def test_a_whole_study_runs_on_latents(
    tmp_path: Path, workshop: str, photo_parquet: Path, codecs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "name": "latent",
        "dataset": "cifar",
        "preset": "tiny.yaml",
        "codec": str(codecs["vq"]),
        "data_dir": str(photo_parquet),
        "outdir": str(tmp_path / "runs"),
        "behaviors": ["light:brightness"],
        "fit": {"n_coalitions": 8, "n_end_points": 1},
        "test": {"n_coalitions": 0},
        "n_threads": 1,
    }
    config = StudyConfig.parse(values, where="test")
    result = run_study(config, SilentListener())
    (found,) = result.behaviors
    assert found.fit_masks.shape == (8, 4)
    assert len(np.unique(found.fit_behaviors)) > 1
    np.testing.assert_allclose(
        found.attributions["shapley"].values.sum(), found.end_points.grand.mean() - found.end_points.empty.mean()
    )
    # Pictures are of decoded images.
    full, sparse, *_ = read_pictures(config.run_dir)
    size = config.load_preset().image_size
    for shown in (full, sparse):
        with Image.open(shown.path) as picture:
            assert picture.mode == "RGB"
            assert picture.width == shown.columns * (size + 1) * max(1, 64 // size)
    other = StudyConfig.parse({**values, "codec": str(codecs["vq2"])}, where="test")
    with pytest.raises(MixedResultsError, match="codec: saved"):
        run_study(other, SilentListener())


def test_the_celeba_preset_is_the_published_network() -> None:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    from tribute.config import load_preset

    preset = load_preset("celeba")
    with torch.device("meta"):
        network = UNet2DModel(**preset.unet.model_dump())
    # 274 M, as Rombach et al. 2022 give for CelebA-HQ (table 12).
    assert sum(parameter.numel() for parameter in network.parameters()) == 274_056_163
    assert (preset.image_size, preset.image_channels, preset.unet.sample_size) == (256, 3, 64)
    schedule = preset.noise_schedule
    assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end) == ("scaled_linear", 0.0015, 0.0195)
    assert not schedule.clip_sample and not any(config.random_flip for config in preset.training.values())
