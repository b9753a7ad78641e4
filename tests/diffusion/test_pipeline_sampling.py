"""Models of diffusers sample here as they do there: same noise, same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tribute.config import NoiseScheduleConfig, SampleConfig
from tribute.diffusion.loss import denoising_loss
from tribute.diffusion.sample import initial_noise, sample_images
from tribute.models.build import build_noise_schedule
from tribute.models.checkpoint import build_model
from tribute.models.pipelines import load_model

SETTINGS: list[dict[str, Any]] = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"},
    {"timestep_spacing": "linspace", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"steps_offset": 1, "clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"trained_betas": [0.002 * (i + 1) for i in range(50)]},
]


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda item: ",".join(item) or "plain")
def test_ddim_gives_the_images_of_the_diffusers_pipeline(
    changes: dict[str, Any], class_name: str, write_pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.pipelines.ddim import pipeline_ddim

    if class_name == "DDIMScheduler" and "steps_offset" in changes:
        changes = {**changes, "set_alpha_to_one": False}
    scheduler = getattr(diffusers, class_name)(num_train_timesteps=50, beta_end=0.2, **changes)
    folder = write_pipeline(scheduler)
    noise = initial_noise(3, range(16), (1, 8, 8))
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: noise.clone())
    pipeline = pipeline_ddim.DDIMPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=16, num_inference_steps=7, output_type="pt").images

    checkpoint = load_model(folder)
    schedule = NoiseScheduleConfig.parse(checkpoint.meta["noise_schedule"], where="test")
    sampled: list[torch.Tensor] = []

    def keep(images: torch.Tensor) -> torch.Tensor:
        sampled.append(images)
        return images

    config = SampleConfig(n_samples=16, num_inference_steps=7, noise_seed=3)
    sample_images(build_model(checkpoint), config, schedule, decode=keep)
    torch.testing.assert_close((sampled[0] / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=2e-6)
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_training_aims_at_what_the_model_predicts(prediction_type: str, write_pipeline: Callable[..., Path]) -> None:
    """With x_t = a x_0 + s e: the noise e, the velocity a e - s x_0 (Salimans and Ho 2022), or the image x_0."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=50, beta_end=0.2, prediction_type=prediction_type)
    checkpoint = load_model(write_pipeline(scheduler))
    schedule = build_noise_schedule(NoiseScheduleConfig.parse(checkpoint.meta["noise_schedule"], where="test"))
    model = build_model(checkpoint)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 11, 30, 49])
    kept = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    target = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction_type]
    with torch.inference_mode():
        expected = (model(a * clean + s * noise, timesteps).sample - target).square().mean()
        found = denoising_loss(model, schedule, clean, noise, timesteps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
