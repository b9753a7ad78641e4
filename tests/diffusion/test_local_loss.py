"""Losses of single images: models whose loss is known, a naive twin, draws that nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tribute.config import NoiseScheduleConfig, UNetConfig
from tribute.diffusion.local_loss import elbo_weights, image_draws, image_losses, noise_of_prediction
from tribute.diffusion.loss import prediction_target
from tribute.errors import ConfigError
from tribute.models.build import build_noise_schedule, build_unet
from tribute.seeding import torch_stream

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SCHEDULE = NoiseScheduleConfig(num_train_timesteps=50, beta_start=1e-3, beta_end=0.2)
CLEAN = torch.rand((3, 1, 8, 8), generator=torch_stream(0, "clean")) * 2 - 1


class Known(torch.nn.Module):
    """Predicts from the noisy image and the level by a function that is given."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool, **labels: torch.Tensor) -> tuple:
        self.seen += labels.values()
        assert not self.training
        return (self.function(noisy, timesteps),)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_who_knows_the_image_loses_nothing(prediction_type: str) -> None:
    schedule = build_noise_schedule(SCHEDULE.replace(prediction_type=prediction_type))
    clean = CLEAN[:1]

    def perfect(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        scale = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - scale.sqrt() * clean) / (1 - scale).sqrt()
        return prediction_target(schedule, clean.expand_as(noise), noise, timesteps)

    losses = image_losses(Known(perfect), schedule, clean, n_noises=40, noise_seed=0)
    np.testing.assert_allclose(losses.simple, 0, atol=1e-9)
    np.testing.assert_allclose(losses.elbo, 0, atol=1e-7)


def test_who_predicts_no_noise_loses_its_variance() -> None:
    schedule = build_noise_schedule(SCHEDULE)
    losses = image_losses(Known(lambda noisy, _: torch.zeros_like(noisy)), schedule, CLEAN, n_noises=100, noise_seed=0)
    np.testing.assert_allclose(losses.simple, 1, atol=0.1)  # 6,400 squares of variance 2: 4 standard errors are 0.07
    np.testing.assert_allclose(losses.elbo, elbo_weights(schedule).sum(), rtol=0.2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_noise_is_recovered_from_any_kind_of_prediction(prediction_type: str) -> None:
    schedule = build_noise_schedule(SCHEDULE.replace(prediction_type=prediction_type))
    timesteps = torch.tensor([0, 7, 49])
    noise = torch.randn(CLEAN.shape, generator=torch_stream(0, "noise"))
    noisy = schedule.add_noise(CLEAN, noise, timesteps)  # pyright: ignore[reportArgumentType]
    target = prediction_target(schedule, CLEAN, noise, timesteps)
    torch.testing.assert_close(noise_of_prediction(schedule, target, noisy, timesteps), noise, rtol=0, atol=2e-5)


def test_weights_are_those_of_a_naive_loop() -> None:
    """Ho et al. (2020), eq. 12, with sigma_t^2 = beta_t."""
    schedule = build_noise_schedule(SCHEDULE)
    kept, expected = 1.0, []
    for beta in np.linspace(1e-3, 0.2, 50):
        alpha = 1 - beta
        kept *= alpha
        expected.append(beta**2 / (2 * beta * alpha * (1 - kept)))
    np.testing.assert_allclose(elbo_weights(schedule), expected, rtol=1e-5)
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        assert torch.isfinite(elbo_weights(build_noise_schedule(NoiseScheduleConfig(beta_schedule=name)))).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_losses_are_those_of_a_naive_twin(prediction_type: str, unet_config: UNetConfig) -> None:
    schedule = build_noise_schedule(SCHEDULE.replace(prediction_type=prediction_type))
    model = build_unet(unet_config, opt_seed=1).eval()
    losses = image_losses(model, schedule, CLEAN, n_noises=7, noise_seed=3)
    weights = elbo_weights(schedule).numpy()
    for i in range(3):
        squares, weighted = [], []
        for j in range(7):
            stream = torch_stream(3, "local loss", i, j)
            t = int((j + float(torch.rand((), generator=stream, dtype=torch.float64))) / 7 * 50)
            noise = torch.randn((1, 8, 8), generator=stream)
            kept = float(schedule.alphas_cumprod[t])
            noisy = kept**0.5 * CLEAN[i] + (1 - kept) ** 0.5 * noise
            with torch.no_grad():
                predicted = model(noisy[None], torch.tensor([t])).sample[0]
            if prediction_type == "v_prediction":
                predicted = kept**0.5 * predicted + (1 - kept) ** 0.5 * noisy
            elif prediction_type == "sample":
                predicted = (noisy - kept**0.5 * predicted) / (1 - kept) ** 0.5
            squares.append(float((predicted - noise).square().mean()))
            weighted.append(weights[t] * squares[-1])
        np.testing.assert_allclose(losses.simple[i], np.mean(squares), rtol=2e-4)
        np.testing.assert_allclose(losses.elbo[i], 50 * np.mean(weighted), rtol=2e-4)


def test_losses_depend_on_nothing_but_model_image_and_seed(unet_config: UNetConfig) -> None:
    schedule = build_noise_schedule(SCHEDULE)
    model = build_unet(unet_config, opt_seed=1).train()
    before = torch.random.get_rng_state()
    found = image_losses(model, schedule, CLEAN, n_noises=5, noise_seed=0)
    assert model.training, "its mode is restored"
    assert torch.equal(before, torch.random.get_rng_state())
    for batch_size in (1, 4, 1000):
        again = image_losses(model, schedule, CLEAN, n_noises=5, noise_seed=0, batch_size=batch_size)
        np.testing.assert_allclose(again.simple, found.simple, rtol=1e-5)
        np.testing.assert_allclose(again.elbo, found.elbo, rtol=1e-5)
    filled = image_losses(model, schedule, CLEAN, n_noises=5, noise_seed=0, batch_size=4, fill_up=True)
    np.testing.assert_allclose(filled.elbo, found.elbo, rtol=1e-5)
    first = image_losses(model, schedule, CLEAN[:1], n_noises=5, noise_seed=0)
    np.testing.assert_allclose(first.simple, found.simple[:1], rtol=1e-5)
    other_seed = image_losses(model, schedule, CLEAN, n_noises=5, noise_seed=1)
    assert np.all(other_seed.simple != found.simple)


def test_the_levels_of_an_image_are_spread_and_all_levels_are_equally_likely() -> None:
    n_images, n_noises, n_levels = 400, 5, 20
    image_idx, draw_idx = np.repeat(np.arange(n_images), n_noises), np.tile(np.arange(n_noises), n_images)
    timesteps, noise = image_draws(image_idx, draw_idx, n_noises, n_levels, 0, torch.zeros((n_images, 1, 2, 2)))
    strata = timesteps.numpy().reshape(n_images, n_noises) // (n_levels // n_noises)
    np.testing.assert_array_equal(strata, np.tile(np.arange(n_noises), (n_images, 1)))
    counts = np.bincount(timesteps.numpy(), minlength=n_levels)
    assert np.abs(counts - 100).max() < 5 * np.sqrt(75)
    assert len(np.unique(noise.flatten(1).numpy(), axis=0)) == n_images * n_noises


def test_a_conditional_model_is_given_the_labels_of_the_images() -> None:
    model = Known(lambda noisy, _: noisy)
    labels = torch.tensor([4, 0, 2])
    image_losses(model, build_noise_schedule(SCHEDULE), CLEAN, n_noises=2, noise_seed=0, labels=labels, batch_size=4)
    assert torch.cat(model.seen).tolist() == [4, 4, 0, 0, 2, 2]


def test_no_noise_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"n_noises.*found 0"):
        image_losses(Known(lambda noisy, _: noisy), build_noise_schedule(SCHEDULE), CLEAN, n_noises=0, noise_seed=0)


def test_a_compiled_network_sees_batches_of_one_size(unet_config: UNetConfig) -> None:
    sizes: list[int] = []
    model = build_unet(unet_config, opt_seed=1)
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    image_losses(model, build_noise_schedule(SCHEDULE), CLEAN[:1], n_noises=5, noise_seed=0, batch_size=4, fill_up=True)
    assert sizes == [4, 4]
