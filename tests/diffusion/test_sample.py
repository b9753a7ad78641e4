from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from tribute.config import NoiseScheduleConfig, SampleConfig, UNetConfig, load_preset
from tribute.diffusion.sample import from_uint8, initial_noise, sample_images, to_uint8
from tribute.errors import ConfigError
from tribute.models.build import build_noise_schedule, build_unet
from tribute.seeding import torch_stream
from tribute.types import Images

SAMPLERS = ["ddim", "dpm-solver++"]


@pytest.fixture(scope="module")
def model(unet_config: UNetConfig) -> UNet2DModel:
    return build_unet(unet_config, opt_seed=5).eval()


def settings(sampler: str = "ddim", **changes: Any) -> SampleConfig:
    values = {"n_samples": 20, "num_inference_steps": 4, "batch_size": 20, "sampler": sampler, **changes}
    return SampleConfig.parse(values, where="test")


class KnownDenoiser(torch.nn.Module):
    """The exact prediction for images whose pixels are independent normals of given mean and deviation."""

    def __init__(self, schedule: NoiseScheduleConfig, mean: float, deviation: float) -> None:
        super().__init__()
        self.config = {"in_channels": 1, "sample_size": 4}
        self.schedule = schedule
        self.kept = build_noise_schedule(schedule).alphas_cumprod.double()
        self.mean, self.deviation = mean, deviation
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.seen.append(sample)
        kept = self.kept[timestep]
        variance = kept * self.deviation**2 + 1 - kept
        noisy = sample.double()
        clean = self.mean + kept.sqrt() * self.deviation**2 / variance * (noisy - kept.sqrt() * self.mean)
        noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        predictions = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean,
        }
        return (predictions[self.schedule.prediction_type].float(),)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_the_batch(model: UNet2DModel, noise_schedule: Any, sampler: str) -> None:
    images = sample_images(model, settings(sampler), noise_schedule)
    assert images.shape == (20, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20
    for batch_size in (1, 7, 19, 64):
        again = sample_images(model, settings(sampler, batch_size=batch_size), noise_schedule)
        np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(sample_images(model, settings(sampler, n_samples=9), noise_schedule), images[:9])


def test_a_prediction_is_the_same_in_every_batch_that_sampling_uses() -> None:
    """Rounding to 256 grey levels hides most differences; this looks at the float32 trajectories of a wider network."""
    config = load_preset("cifar-small").unet.replace(sample_size=8)
    model = build_unet(config).eval()
    schedule = NoiseScheduleConfig()
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    last_inputs = {}
    for batch_size in (1, 2, 5, 15, 16, 33):
        seen.clear()
        sample_images(
            model, settings(n_samples=3, batch_size=33, num_inference_steps=3), schedule, image_idx=range(batch_size)
        )
        last_inputs[batch_size] = seen[-1][:batch_size]
    for batch_size, found in last_inputs.items():
        assert torch.equal(found, last_inputs[33][:batch_size]), batch_size


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_images_can_be_asked_for(model: UNet2DModel, noise_schedule: Any, sampler: str) -> None:
    images = sample_images(model, settings(sampler), noise_schedule)
    found = sample_images(model, settings(sampler, batch_size=2), noise_schedule, image_idx=[7, 3, 19, 3, 0])
    np.testing.assert_array_equal(found, images[[7, 3, 19, 3, 0]])


def test_every_model_sees_the_same_noise(unet_config: UNetConfig, noise_schedule: Any) -> None:
    def first_input(opt_seed: int, **changes: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        model = build_unet(unet_config, opt_seed=opt_seed)
        model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        torch.rand(opt_seed + 1)
        sample_images(model, settings(**changes), noise_schedule)
        return seen[0]

    noise = first_input(0)
    assert torch.equal(noise, first_input(1))
    assert torch.equal(noise, first_input(2, sampler="dpm-solver++"))
    assert torch.equal(noise, initial_noise(0, range(20), (1, 8, 8)))
    assert torch.equal(noise[4], torch.randn(1, 8, 8, generator=torch_stream(0, "initial noise", 4)))
    assert not torch.equal(noise, first_input(0, noise_seed=1))


def test_sampling_leaves_the_model_and_the_global_generator_as_they_were(
    unet_config: UNetConfig, noise_schedule: Any
) -> None:
    model = build_unet(unet_config.replace(dropout=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    done: list[int] = []
    first = sample_images(model.train(), settings(batch_size=8), noise_schedule, on_batch=done.append)
    assert model.training
    second = sample_images(model.eval(), settings(), noise_schedule)
    assert not model.training
    np.testing.assert_array_equal(first, second)  # without dropout in both
    assert done == [8, 16, 20]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_noise_levels_are_refused(model: UNet2DModel, noise_schedule: Any, sampler: str) -> None:
    with pytest.raises(ConfigError, match=r"num_inference_steps: expected at most the 50 .* found 51"):
        sample_images(model, settings(sampler, num_inference_steps=51), noise_schedule)
    assert len(sample_images(model, settings(sampler, num_inference_steps=50, n_samples=1), noise_schedule)) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_single_image_is_found_exactly(sampler: str, prediction_type: str, beta_schedule: str) -> None:
    """Where all training images are one grey level, every path ends there, whatever the number of steps."""
    values = {"num_train_timesteps": 100, "prediction_type": prediction_type, "beta_schedule": beta_schedule}
    schedule = NoiseScheduleConfig.parse(values, where="test")
    model = cast(UNet2DModel, KnownDenoiser(schedule, mean=-0.2, deviation=0.0))
    for n_steps in (2, 10):
        images = sample_images(model, settings(sampler, num_inference_steps=n_steps, n_samples=3), schedule)
        np.testing.assert_array_equal(images, round((1 - 0.2) * 127.5))


@pytest.mark.parametrize(("sampler", "n_steps", "accuracy"), [("ddim", 500, 0.5), ("dpm-solver++", 50, 1.5)])
def test_both_samplers_solve_the_probability_flow(sampler: str, n_steps: int, accuracy: float) -> None:
    """For normal data the flow maps noise linearly: (x_0 - mean) / deviation is x_T, standardised.

    Song et al. (2021), eq. 13, integrated in closed form. A solver of first order is off by 2.7 levels in 50 steps.
    """
    schedule = NoiseScheduleConfig(clip_sample=False)
    model = KnownDenoiser(schedule, mean=0.1, deviation=0.2)
    config = settings(sampler, num_inference_steps=n_steps, n_samples=50)
    images = sample_images(cast(UNet2DModel, model), config, schedule)
    expected = to_uint8(0.1 + 0.2 * initial_noise(0, range(50), (1, 4, 4)))
    assert np.abs(images.astype(float) - expected).mean() < accuracy


def ddim_twin(model: UNet2DModel, schedule: NoiseScheduleConfig, n_steps: int, images: torch.Tensor) -> torch.Tensor:
    """Song et al. (2021), eq. 12 with sigma 0, at every (T / n_steps)-th noise level from below."""
    n = schedule.num_train_timesteps
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, n, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    stride = n // n_steps
    for timestep in reversed(range(0, stride * n_steps, stride)):
        now = kept[timestep].float()
        after = kept[timestep - stride].float() if timestep >= stride else torch.tensor(1.0)
        prediction = model(images, timestep)[0]
        if schedule.prediction_type == "v_prediction":
            clean = now.sqrt() * images - (1 - now).sqrt() * prediction
            noise = now.sqrt() * prediction + (1 - now).sqrt() * images
        else:
            clean = (images - (1 - now).sqrt() * prediction) / now.sqrt()
            noise = prediction
        images = after.sqrt() * clean.clamp(-1, 1) + (1 - after).sqrt() * noise
    return images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n_steps", [3, 25])
def test_ddim_agrees_with_a_naive_loop(unet_config: UNetConfig, prediction_type: Any, n_steps: int) -> None:
    schedule = NoiseScheduleConfig(num_train_timesteps=50, beta_end=0.2, prediction_type=prediction_type)
    model = build_unet(unet_config, opt_seed=5).eval()
    images = sample_images(model, settings(num_inference_steps=n_steps), schedule)
    with torch.inference_mode():
        twin = ddim_twin(model, schedule, n_steps, initial_noise(0, range(20), (1, 8, 8)))
    assert np.abs(images.astype(int) - to_uint8(twin)).max() <= 1
    assert (images == to_uint8(twin)).mean() > 0.99


def test_all_grey_levels_survive_both_ways() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 8, 2)
    tensor = from_uint8(levels)
    assert tensor.shape == (2, 2, 8, 8)
    assert tensor.dtype == torch.float32
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(tensor), levels)
    assert tensor[1, 1, 0, 0].item() == pytest.approx(levels[1, 0, 0, 1] / 127.5 - 1, abs=1e-6)


def test_values_outside_are_clipped_and_the_nearest_level_taken() -> None:
    step = 2 / 255
    values = torch.tensor([-7.0, -1.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.4 * step, 1.0, 7.0])
    assert to_uint8(values.reshape(1, 1, 1, 7)).ravel().tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_reading_images_does_not_change_them(digit_images: Images) -> None:
    before = digit_images[:3].copy()
    from_uint8(digit_images[:3]).add_(5)
    np.testing.assert_array_equal(digit_images[:3], before)
