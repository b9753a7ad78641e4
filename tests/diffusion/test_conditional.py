"""Class-conditional networks: which labels are asked for, guidance, dropped labels, and that labels are learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from tribute.config import NoiseScheduleConfig, OptimizerConfig, SampleConfig, TrainConfig, UNetConfig
from tribute.diffusion import train as train_module
from tribute.diffusion.examples import PixelExamples
from tribute.diffusion.loss import predict
from tribute.diffusion.sample import draw_labels, guided_prediction, sample_images
from tribute.diffusion.train import Trainer
from tribute.errors import ConfigError
from tribute.models.build import build_unet, null_label
from tribute.types import Images

N_LABELS = 3


@pytest.fixture(scope="module")
def conditional(unet_config: UNetConfig) -> UNetConfig:
    """Three labels, and a class for none."""
    return unet_config.replace(num_class_embeds=N_LABELS + 1)


@pytest.fixture(scope="module")
def model(conditional: UNetConfig) -> UNet2DModel:
    return build_unet(conditional, opt_seed=5).eval()


@pytest.fixture
def labelled(digit_images: Images) -> PixelExamples:
    """64 digits with labels in turn, of which the last never occurs."""
    return PixelExamples(digit_images[:64], np.arange(64) % (N_LABELS - 1), N_LABELS)


def counts(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


# Which labels generated images have


@pytest.mark.parametrize("label_counts", [counts(1, 1), counts(5, 0, 3, 12), counts(0, 7, 0), counts(178, 182, 177)])
def test_labels_come_in_the_proportions_of_the_counts(label_counts: npt.NDArray[np.int64]) -> None:
    for n_images in (100, 1000):
        drawn = np.bincount(draw_labels(label_counts, range(n_images)), minlength=len(label_counts))
        expected = n_images * label_counts / label_counts.sum()
        assert np.abs(drawn - expected).max() <= 4  # independent draws would be off by 16 of 1,000
        assert not drawn[label_counts == 0].any()


def test_the_label_of_an_image_does_not_depend_on_the_batch() -> None:
    label_counts = counts(5, 2, 3)
    whole = draw_labels(label_counts, range(50))
    np.testing.assert_array_equal(draw_labels(label_counts, [17, 3, 49, 3]), whole[[17, 3, 49, 3]])
    np.testing.assert_array_equal(draw_labels(label_counts, range(20, 30)), whole[20:30])


def test_labels_differ_between_coalitions_only_as_their_proportions_do() -> None:
    images = range(1000)
    np.testing.assert_array_equal(draw_labels(counts(5, 2, 3), images), draw_labels(counts(50, 20, 30), images))
    differ = draw_labels(counts(50, 50), images) != draw_labels(counts(60, 40), images)
    assert differ.mean() == pytest.approx(0.1, abs=0.004)


# Guidance


def predictions(model: UNet2DModel, scales: tuple[float, ...]) -> list[torch.Tensor]:
    noisy = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        labels = torch.tensor([0, 1, 2, 1])
        return [guided_prediction(model, noisy, torch.tensor(7), labels, scale) for scale in scales]


def test_guidance_goes_from_the_unconditional_prediction_through_the_conditional_one(model: UNet2DModel) -> None:
    """Ho and Salimans (2022), eq. 6: linear in the scale; 0 is unconditional, 1 plainly conditional."""
    noisy = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        labelled = predict(model, noisy, torch.tensor(7), torch.tensor([0, 1, 2, 1]))
        unlabelled = predict(model, noisy, torch.tensor(7), torch.full((4,), N_LABELS))
    at_0, at_1, at_3, nearly_1 = predictions(model, (0.0, 1.0, 3.0, 1.0 + 1e-9))
    torch.testing.assert_close(at_0, unlabelled, rtol=1e-5, atol=1e-6)
    assert torch.equal(at_1, labelled)
    torch.testing.assert_close(at_1, nearly_1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at_3, unlabelled + 3 * (labelled - unlabelled), rtol=1e-5, atol=1e-5)
    assert (labelled - unlabelled).abs().max() > 0.01


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_conditional_image_does_not_depend_on_the_batch(
    model: UNet2DModel, noise_schedule: NoiseScheduleConfig, scale: float
) -> None:
    def sample(batch_size: int, image_idx: list[int] | None = None) -> Images:
        config = SampleConfig(n_samples=20, num_inference_steps=3, batch_size=batch_size, guidance_scale=scale)
        return sample_images(model, config, noise_schedule, label_counts=counts(5, 2, 3), image_idx=image_idx)

    images = sample(20)
    for batch_size in (1, 7, 19):
        np.testing.assert_array_equal(sample(batch_size), images)
    np.testing.assert_array_equal(sample(2, [7, 3, 19]), images[[7, 3, 19]])


def test_each_image_is_made_for_its_label(model: UNet2DModel, noise_schedule: NoiseScheduleConfig) -> None:
    config = SampleConfig(n_samples=20, num_inference_steps=3)
    mixed = sample_images(model, config, noise_schedule, label_counts=counts(5, 2, 3))
    labels = draw_labels(counts(5, 2, 3), range(20))
    for label in range(N_LABELS):
        only = sample_images(model, config, noise_schedule, label_counts=np.eye(N_LABELS, dtype=np.int64)[label])
        np.testing.assert_array_equal(mixed[labels == label], only[labels == label])
        assert (mixed[labels != label] != only[labels != label]).any()


def test_an_unconditional_network_is_not_asked_for_labels(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig
) -> None:
    model, config = build_unet(unet_config), SampleConfig(n_samples=2, num_inference_steps=2)
    np.testing.assert_array_equal(
        sample_images(model, config, noise_schedule, label_counts=counts(5, 2)),
        sample_images(model, config, noise_schedule),
    )


@pytest.mark.parametrize(
    ("n_classes", "label_counts", "scale", "expected"),
    [
        (None, counts(5, 2), 2.0, "guidance_scale.*found an unconditional one"),
        (4, None, 1.0, "label_counts"),
        (2, counts(5, 2, 3), 1.0, r"num_class_embeds: expected at least the 3 labels of the data, found 2"),
        (3, counts(5, 2, 3), 2.0, r"guidance_scale: .*expected unet\.num_class_embeds 4.*found 3"),
    ],
)
def test_what_a_network_cannot_be_asked_for(
    n_classes: int | None,
    label_counts: npt.NDArray[np.int64] | None,
    scale: float,
    expected: str,
    unet_config: UNetConfig,
    noise_schedule: NoiseScheduleConfig,
) -> None:
    model = build_unet(unet_config.replace(num_class_embeds=n_classes))
    config = SampleConfig(n_samples=2, num_inference_steps=2, guidance_scale=scale)
    with pytest.raises(ConfigError, match=expected):
        sample_images(model, config, noise_schedule, label_counts=label_counts)


def test_the_class_for_no_label_is_the_last_one_beyond_the_labels() -> None:
    assert [null_label(n, 10) for n in (10, 11, 1001)] == [None, 10, 1000]


# Training


def losses_seen(
    labelled: PixelExamples,
    noise_schedule: NoiseScheduleConfig,
    unet: UNetConfig,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> list[dict[str, torch.Tensor]]:
    """What every batch of a short run was trained on."""
    seen: list[dict[str, torch.Tensor]] = []
    original = train_module.denoising_loss

    def spy(model: Any, schedule: Any, clean: Any, noise: Any, timesteps: Any, labels: Any) -> torch.Tensor:
        seen.append({"clean": clean, "noise": noise, "timesteps": timesteps, "labels": labels})
        return original(model, schedule, clean, noise, timesteps, labels)

    monkeypatch.setattr(train_module, "denoising_loss", spy)
    trainer = Trainer(labelled, noise_schedule, device="cpu")
    config = TrainConfig(n_steps=6, batch_size=16, opt_seed=3, **changes)
    trainer.train(build_unet(unet), np.arange(len(labelled)), config)
    monkeypatch.undo()
    return seen


def test_examples_are_trained_with_their_labels(
    labelled: PixelExamples,
    noise_schedule: NoiseScheduleConfig,
    conditional: UNetConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = {image.tobytes(): label for image, label in zip(labelled.images, labelled.labels, strict=True)}  # pyright: ignore[reportArgumentType]
    for batch in losses_seen(labelled, noise_schedule, conditional, monkeypatch):
        shown = ((batch["clean"] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert [images[image.tobytes()] for image in shown] == batch["labels"].tolist()


def test_dropped_labels_become_the_class_for_none_and_change_no_other_draw(
    labelled: PixelExamples,
    noise_schedule: NoiseScheduleConfig,
    conditional: UNetConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = losses_seen(labelled, noise_schedule, conditional, monkeypatch)
    dropped = losses_seen(labelled, noise_schedule, conditional, monkeypatch, label_dropout=0.4)
    for left, right in zip(plain, dropped, strict=True):
        for name in ("clean", "noise", "timesteps"):
            assert torch.equal(left[name], right[name])
        kept = right["labels"] != N_LABELS
        assert torch.equal(left["labels"][kept], right["labels"][kept])
        assert 0 < int(kept.sum()) < 16


def test_labels_are_dropped_as_often_as_asked_and_anew_in_each_batch(
    noise_schedule: NoiseScheduleConfig, labelled: PixelExamples, model: UNet2DModel
) -> None:
    trainer = Trainer(labelled, noise_schedule, device="cpu")
    config, labels = TrainConfig(label_dropout=0.15), torch.zeros(20_000, dtype=torch.long)
    first, second = (trainer._dropped(model, labels, config, number) for number in (0, 1))
    assert first is not None and second is not None
    for found in (first, second):
        share = float((found == N_LABELS).float().mean())
        assert share == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 20_000) ** 0.5)
    assert not torch.equal(first, second)
    again = trainer._dropped(model, labels, config, 0)
    assert again is not None and torch.equal(again, first)


@pytest.mark.parametrize(
    ("n_classes", "dropout", "expected"),
    [
        (2, 0.0, r"num_class_embeds: expected at least the 3 labels of the data, found 2"),
        (3, 0.1, r"label_dropout: .*expected unet\.num_class_embeds 4, one more than labels, found 3"),
    ],
)
def test_labels_count_although_the_last_has_no_example(
    n_classes: int,
    dropout: float,
    expected: str,
    labelled: PixelExamples,
    noise_schedule: NoiseScheduleConfig,
    unet_config: UNetConfig,
) -> None:
    trainer = Trainer(labelled, noise_schedule, device="cpu")
    config = TrainConfig(n_steps=1, batch_size=4, label_dropout=dropout)
    with pytest.raises(ConfigError, match=expected):
        trainer.train(build_unet(unet_config.replace(num_class_embeds=n_classes)), np.arange(8), config)


def test_a_conditional_network_needs_labels(
    digit_images: Images, noise_schedule: NoiseScheduleConfig, conditional: UNetConfig
) -> None:
    trainer = Trainer(digit_images, noise_schedule, device="cpu")
    with pytest.raises(ConfigError, match="labelled examples"):
        trainer.train(build_unet(conditional), np.arange(8), TrainConfig(n_steps=1, batch_size=4))


def test_bright_and_dark_digits_are_learned_and_asked_for_by_label(
    digit_images: Images, unet_config: UNetConfig
) -> None:
    """Ink on white (mean grey 177 of 255) under label 1, chalk on black (mean 78) under label 0."""
    images = np.concatenate([digit_images[:300], 255 - digit_images[:300]])
    labels = np.repeat(np.array([0, 1], dtype=np.int64), 300)
    schedule = NoiseScheduleConfig(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    schedule = schedule.replace(prediction_type="v_prediction")
    unet = unet_config.replace(
        num_class_embeds=3,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    trainer = Trainer(PixelExamples(images, labels), schedule, device="cpu")
    config = TrainConfig(
        n_steps=200,
        batch_size=32,
        optimizer=OptimizerConfig(lr=5e-3, lr_schedule="cosine"),
        ema_max_decay=0.95,
        label_dropout=0.2,
    )
    model = build_unet(unet)
    model.load_state_dict(trainer.train(model, np.arange(600), config).ema)

    def brightness(label: int, scale: float) -> float:
        sampling = SampleConfig(n_samples=32, num_inference_steps=10, guidance_scale=scale)
        return float(sample_images(model, sampling, schedule, label_counts=np.eye(2, dtype=np.int64)[label]).mean())

    assert brightness(0, 1.0) < 105
    assert brightness(1, 1.0) > 150
    apart = [brightness(1, scale) - brightness(0, scale) for scale in (0.0, 1.0, 2.0)]
    assert apart[0] == 0
    assert apart[1] > 60
    assert apart[2] > 40
