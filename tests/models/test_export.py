"""What is exported comes back through diffusers with the same bits, and what would not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tribute.config import NoiseScheduleConfig, PruneConfig, SampleConfig, UNetConfig
from tribute.diffusion.sample import initial_noise, sample_images
from tribute.errors import CheckpointError
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from tribute.models.export import export_model, usage
from tribute.models.pipelines import load_model
from tribute.models.pruning import prune_unet

SCHEDULE = NoiseScheduleConfig(
    num_train_timesteps=50,
    beta_end=0.2,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    set_alpha_to_one=False,
    trained_betas=tuple(0.003 * (i + 1) for i in range(50)),
)


def checkpoint_of(unet: UNetConfig, folder: Path, pruned: bool = False) -> Checkpoint:
    """A checkpoint of ours whose moving average is not its weights."""
    model, average = build_unet(unet, opt_seed=1), build_unet(unet, opt_seed=2)
    recipe = prune_unet(model, PruneConfig()).recipe if pruned else None
    if pruned:
        prune_unet(average, PruneConfig())
    meta = {"unet": unet.model_dump(mode="json"), "noise_schedule": SCHEDULE.model_dump(mode="json")}
    save_checkpoint(folder, n_steps=3, unet=model.state_dict(), ema=average.state_dict(), meta=meta, pruning=recipe)
    return load_checkpoint(folder)


def test_diffusers_loads_the_pipeline_and_computes_the_same_bits(unet_config: UNetConfig, tmp_path: Path) -> None:
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt")
    for use_ema in (True, False):
        folder = tmp_path / f"exported-{use_ema}"
        export_model(checkpoint, folder, use_ema=use_ema)
        noisy, timesteps = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 49])
        with torch.inference_mode():
            expected = build_model(checkpoint, use_ema=use_ema)(noisy, timesteps).sample
            for pipeline_class in (DDPMPipeline, DDIMPipeline):
                pipeline = pipeline_class.from_pretrained(folder, use_safetensors=True)
                assert torch.equal(pipeline.unet(noisy, timesteps).sample, expected)
                assert pipeline.scheduler.config["prediction_type"] == "v_prediction"


def test_the_exported_pipeline_samples_our_images(
    unet_config: UNetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.ddim import pipeline_ddim

    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt")
    export_model(checkpoint, tmp_path / "exported")
    noise = initial_noise(0, range(16), (1, 8, 8))
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: noise.clone())
    pipeline = pipeline_ddim.DDIMPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    theirs = (255 * pipeline(batch_size=16, num_inference_steps=6, output_type="np").images).round().astype(int)
    config = SampleConfig(n_samples=16, num_inference_steps=6)
    ours = sample_images(build_model(checkpoint), config, SCHEDULE).astype(int)
    assert abs(ours - theirs).max() <= 1  # grey levels


def test_what_was_exported_comes_back_as_it_was(unet_config: UNetConfig, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt")
    export_model(checkpoint, tmp_path / "exported", readme="# Model\n")
    again = load_model(tmp_path / "exported")
    assert again.meta["unet"] == checkpoint.meta["unet"]
    assert again.meta["noise_schedule"] == checkpoint.meta["noise_schedule"]
    assert again.ema.keys() == checkpoint.ema.keys()
    assert all(torch.equal(again.ema[name], checkpoint.ema[name]) for name in again.ema)
    assert (tmp_path / "exported" / "README.md").read_text() == "# Model\n"


def test_a_foreign_model_can_be_exported_again(write_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    first = load_model(write_pipeline())
    export_model(first, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert all(torch.equal(again.ema[name], first.ema[name]) for name in first.ema)
    assert again.meta["noise_schedule"] == first.meta["noise_schedule"]


def test_a_conditional_model_is_exported_in_parts(unet_config: UNetConfig, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unet_config.replace(num_class_embeds=11), tmp_path / "ckpt")
    export_model(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported" / "model_index.json").exists()
    scope: dict[str, Any] = {}
    exec(usage(checkpoint, str(tmp_path / "exported")), scope)
    noisy, timesteps, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 49]), torch.tensor([0, 3, 10])
    with torch.inference_mode():
        assert torch.equal(
            scope["unet"](noisy, timesteps, labels).sample, build_model(checkpoint)(noisy, timesteps, labels).sample
        )
    assert scope["scheduler"].config["timestep_spacing"] == "trailing"
    assert load_model(tmp_path / "exported").meta["unet"]["num_class_embeds"] == 11


def test_the_advice_on_loading_works(unet_config: UNetConfig, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt")
    export_model(checkpoint, tmp_path / "exported")
    scope: dict[str, Any] = {}
    exec(usage(checkpoint, str(tmp_path / "exported")), scope)
    assert scope["pipeline"].unet.config["sample_size"] == 8


def test_a_pruned_model_is_refused_with_the_reason(unet_config: UNetConfig, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt", pruned=True)
    with pytest.raises(CheckpointError, match="is pruned: its layers have uneven widths"):
        export_model(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_folder_in_use_is_left_alone(unet_config: UNetConfig, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unet_config, tmp_path / "ckpt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        export_model(checkpoint, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_nothing_is_left_of_an_export_that_fails(
    unet_config: UNetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.DDIMScheduler.save_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"could not be written \(disk full\)"):
        export_model(checkpoint_of(unet_config, tmp_path / "ckpt"), tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_the_index_names_a_pipeline_that_diffusers_has(unet_config: UNetConfig, tmp_path: Path) -> None:
    import diffusers

    export_model(checkpoint_of(unet_config, tmp_path / "ckpt"), tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert hasattr(diffusers, index["_class_name"])
    assert index["_diffusers_version"] == diffusers.__version__
