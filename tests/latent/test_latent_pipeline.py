"""A latent pipeline of diffusers: loaded with its codec, sampled as diffusers samples it, measured by the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tribute.cli import main
from tribute.config import Preset
from tribute.data.tensors import TrainingData
from tribute.diffusion.sample import initial_noise, sample_images, to_uint8
from tribute.models.build import build_unet
from tribute.models.checkpoint import build_model, load_checkpoint, save_checkpoint
from tribute.models.export import codec_of, export_model, usage
from tribute.models.pipelines import adopt_model, read_pipeline
from tribute.store.records import Store
from tribute.study.latents import LatentSpace

MakePreset = Callable[..., Preset]


@pytest.fixture
def pipeline_folder(tmp_path: Path, codecs: dict[str, Path], latent_preset: MakePreset) -> Path:
    """A tiny `LDMPipeline` as diffusers writes it."""
    from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline

    unet = latent_preset().unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = UNet2DModel(**unet.model_dump())
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
    vqvae = VQModel.from_pretrained(codecs["vq"] / "vqvae")
    LDMPipeline(vqvae, network, DDIMScheduler(**schedule)).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_images_are_those_of_the_pipeline_itself(
    pipeline_folder: Path, latent_preset: MakePreset, photo_data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond as module

    checkpoint = read_pipeline(pipeline_folder, origin={})
    preset = adopt_model(latent_preset("kl"), checkpoint)
    assert preset.codec is not None and preset.codec.subfolder == "vqvae" and preset.codec.factor == 2
    sampling = preset.sampling.replace(num_inference_steps=5)
    decode = LatentSpace(preset, photo_data).decode
    ours = sample_images(build_model(checkpoint), sampling, preset.noise_schedule, decode=decode)

    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: initial_noise(0, range(shape[0]), shape[1:]))
    pipeline = module.LDMPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=6, num_inference_steps=5, output_type="np").images
    expected = to_uint8(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1)
    assert expected.std() > 1
    assert np.abs(ours.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_what_is_exported_takes_its_codec_along(
    kind: str, latent_preset: MakePreset, photo_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond as module

    preset = latent_preset(kind)
    assert preset.codec is not None
    preset = preset.replace(codec=preset.codec.replace(scaling_factor=0.7).model_dump())
    network = build_unet(preset.unet, opt_seed=4)
    meta = {name: getattr(preset, name).model_dump(mode="json") for name in ("unet", "noise_schedule")}
    meta["preset"] = preset.model_dump(mode="json")
    weights = network.state_dict()
    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "ours", n_steps=1, unet=weights, ema=weights, meta=meta))
    codec = codec_of(checkpoint)
    assert "LDMPipeline" in usage(checkpoint, "exported", codec)
    export_model(checkpoint, tmp_path / "exported", codec=codec)

    sampling = preset.sampling.replace(num_inference_steps=5)
    ours = sample_images(network.eval(), sampling, preset.noise_schedule, decode=LatentSpace(preset, photo_data).decode)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: initial_noise(0, range(shape[0]), shape[1:]))
    pipeline = module.LDMPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=len(ours), num_inference_steps=5, output_type="np").images
    expected = to_uint8(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1)
    assert expected.std() > 1
    assert np.abs(ours.astype(int) - expected).max() <= 1
    assert adopt_model(latent_preset("vq"), read_pipeline(tmp_path / "exported", origin={})).codec is not None


def test_a_codec_that_is_elsewhere_stays_there(latent_preset: MakePreset, tmp_path: Path) -> None:
    preset = latent_preset("vq")
    assert preset.codec is not None
    preset = preset.with_codec(str(tmp_path / "moved"))
    weights = build_unet(preset.unet).state_dict()
    meta = {name: getattr(preset, name).model_dump(mode="json") for name in ("unet", "noise_schedule")}
    meta["preset"] = preset.model_dump(mode="json")
    save_checkpoint(tmp_path / "ours", n_steps=1, unet=weights, ema=weights, meta=meta)
    main("export", ["--model", str(tmp_path / "ours"), "--to", str(tmp_path / "exported")])
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["scheduler", "unet"]


def test_a_coalition_is_measured_from_a_pipeline(
    pipeline_folder: Path,
    photo_parquet: Path,
    latent_preset: MakePreset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tiny.yaml").write_text(latent_preset("kl").to_yaml())
    (tmp_path / "glow.py").write_text("def brightness(images):\n    return float(images.mean())\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = (
        f"--load pipeline --dataset cifar --data_dir {photo_parquet} --preset tiny.yaml --method gd --gd_steps 2 "
        "--db r.db --exp_name e --removal_dist shapley --model_behavior glow:brightness"
    )
    main("unlearn", flags.split())
    with Store.open("r.db", create=False) as store:
        (record,) = store.find()
    assert record.status == "finished" and "codec" in record.spec.settings
