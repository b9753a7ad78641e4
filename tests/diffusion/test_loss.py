from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tribute.config import NoiseScheduleConfig
from tribute.diffusion.loss import denoising_loss, draw_timesteps, prediction_target
from tribute.models.build import build_noise_schedule
from tribute.seeding import torch_stream

T = 20


def draws(n_examples: int, n_batches: int, *, antithetic: bool) -> np.ndarray:
    streams = [torch_stream(0, "timesteps", n_examples, batch) for batch in range(n_batches)]
    return np.stack([draw_timesteps(n_examples, T, stream, antithetic=antithetic).numpy() for stream in streams])


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("n_examples", [1, 2, 7, 8])
def test_every_timestep_is_equally_likely_at_every_place(n_examples: int, antithetic: bool) -> None:
    timesteps = draws(n_examples, 2_000, antithetic=antithetic)
    assert timesteps.shape == (2_000, n_examples)
    assert timesteps.dtype == np.int64
    for place in range(n_examples):
        assert chisquare(np.bincount(timesteps[:, place], minlength=T)).pvalue > 1e-3


def test_antithetic_timesteps_come_in_pairs_that_sum_to_the_last() -> None:
    timesteps = draws(8, 50, antithetic=True)
    np.testing.assert_array_equal(timesteps[:, :4] + timesteps[:, 4:], T - 1)
    # An odd batch has one timestep without a partner.
    timesteps = draws(7, 50, antithetic=True)
    np.testing.assert_array_equal(timesteps[:, :3] + timesteps[:, 4:], T - 1)
    # The first half is drawn independently.
    assert abs(np.corrcoef(draws(8, 2_000, antithetic=True)[:, :2].T)[0, 1]) < 0.09
    assert abs(np.corrcoef(draws(8, 2_000, antithetic=False)[:, [0, 4]].T)[0, 1]) < 0.09


class Recorder(torch.nn.Module):
    """Predicts a constant, and remembers what it was shown."""

    def __init__(self, prediction: torch.Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.seen = sample, timestep
        return (self.prediction,)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_squared_error_of_what_should_be_predicted(prediction_type: str) -> None:
    """Ho et al. (2020), eq. 14; Salimans and Ho (2022), appendix D, for the velocity."""
    config = NoiseScheduleConfig.parse({"num_train_timesteps": T, "prediction_type": prediction_type}, where="test")
    schedule = build_noise_schedule(config)
    generator = torch.Generator().manual_seed(0)
    clean, noise, prediction = (torch.randn(5, 1, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 3, 7, 18, 19])
    betas = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    kept = torch.tensor([np.prod([1 - beta for beta in betas[: t + 1]]) for t in timesteps.tolist()])
    signal = kept.sqrt().float()[:, None, None, None]
    spread = (1 - kept).sqrt().float()[:, None, None, None]
    target = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * clean,
        "sample": clean,
    }[prediction_type]
    torch.testing.assert_close(prediction_target(schedule, clean, noise, timesteps), target, rtol=1e-4, atol=1e-5)
    model = Recorder(prediction)
    loss = denoising_loss(model, schedule, clean, noise, timesteps)
    torch.testing.assert_close(loss, (prediction - target).square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.seen[0], signal * clean + spread * noise, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.seen[1], timesteps)


def test_the_loss_is_taken_in_float32() -> None:
    schedule = build_noise_schedule(NoiseScheduleConfig())
    clean = torch.zeros(1, 1, 2, 2)
    loss = denoising_loss(Recorder(clean.bfloat16()), schedule, clean, clean + 1 / 3, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 / 9, rel=1e-6)
