"""Coalition models compared with a full model: the same seeds, the same labels, generated once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import SilentListener

from tribute.config import LocalConfig, NoiseScheduleConfig, SampleConfig, StudyConfig, UNetConfig
from tribute.diffusion.sample import from_uint8, sample_images, to_uint8
from tribute.errors import ConfigError, MixedResultsError
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from tribute.store.records import Store
from tribute.study.local import FullModelComparison
from tribute.study.run import run_study
from tribute.study.worker import Worker

LABEL_COUNTS = np.array([3, 1, 0, 5])
SAMPLING = SampleConfig(n_samples=5, sampler="dpm-solver++", num_inference_steps=3, batch_size=4)
LOCAL = LocalConfig(n_samples=5, n_noises=3)

Save = Callable[..., Checkpoint]


@pytest.fixture
def save(tmp_path: Path, unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig) -> Save:
    """A checkpoint of random weights; keyword arguments change the architecture or what `config.json` says."""

    def make(*, seed: int = 1, unet: dict[str, Any] | None = None, **meta: Any) -> Checkpoint:
        config = unet_config.replace(**(unet or {}))
        weights = build_unet(config, opt_seed=seed).state_dict()
        facts = {"unet": config.model_dump(mode="json"), "noise_schedule": noise_schedule.model_dump(mode="json")}
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        return load_checkpoint(save_checkpoint(folder, n_steps=1, unet=weights, ema=weights, meta=facts | meta))

    return make


def comparison(full: Checkpoint, noise_schedule: NoiseScheduleConfig, **changes: Any) -> FullModelComparison:
    settings: dict[str, Any] = {"names": ["local"], "sampling": SAMPLING, "config": LOCAL}
    return FullModelComparison(
        full,
        noise_schedule=noise_schedule,
        label_counts=LABEL_COUNTS,
        **({"image_size": full.meta["unet"]["sample_size"]} | settings | changes),
    )


def test_images_at_hand_are_used_and_missing_ones_are_generated(
    save: Save, noise_schedule: NoiseScheduleConfig
) -> None:
    compared = comparison(save(), noise_schedule)
    model = build_model(save(seed=2))
    more = sample_images(model, SAMPLING.replace(n_samples=9), noise_schedule)
    values = compared.measure(model, more)
    assert values == compared.measure(model, more[:2])
    assert values["avg_mse"] > 0
    assert list(values) == list(compared.definitions())
    assert compared.measure(build_model(compared.full), compared.reference.images)["avg_ssim"] == 1


def test_labels_are_those_of_the_full_model_whatever_the_coalition_has(
    save: Save, noise_schedule: NoiseScheduleConfig
) -> None:
    full = save(unet={"num_class_embeds": 4})
    compared = comparison(full, noise_schedule)
    model = build_model(full)
    only_one_label = sample_images(model, SAMPLING, noise_schedule, label_counts=np.array([0, 0, 1, 0]))
    assert np.any(only_one_label != compared.reference.images)
    values = compared.measure(model, only_one_label)
    assert values["avg_mse"] == 0
    assert values["avg_total_loss"] > 0


def test_latents_are_kept_beside_the_images_that_they_decode_to(
    save: Save, noise_schedule: NoiseScheduleConfig
) -> None:
    """A decoder that only changes the sign: the loss must be that of the latents."""
    full = save()
    pixels = comparison(full, noise_schedule)
    latents = comparison(full, noise_schedule, decode=torch.neg)
    np.testing.assert_array_equal(to_uint8(-latents.reference.clean), latents.reference.images)
    np.testing.assert_allclose(latents.reference.clean.clamp(-1, 1), pixels.reference.clean, atol=1 / 255)
    torch.testing.assert_close(from_uint8(pixels.reference.images), pixels.reference.clean)
    model = build_model(save(seed=2))
    few = pixels.reference.images[:0]
    in_pixels, in_latents = pixels.measure(model, few), latents.measure(model, few)
    np.testing.assert_allclose(in_latents["avg_mse"], in_pixels["avg_mse"], rtol=0.1)


def test_networks_run_only_for_what_is_asked_for(
    save: Save, noise_schedule: NoiseScheduleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(save(seed=2))
    compared = comparison(save(), noise_schedule, names=["generated_image_4_nrmse"])
    monkeypatch.setattr("tribute.study.local.image_losses", None)
    images = sample_images(model, SAMPLING, noise_schedule)
    assert list(compared.measure(model, images)) == ["generated_image_4_nrmse"]
    monkeypatch.setattr("tribute.study.local.sample_images", None)
    compared.measure(model, images)  # the full model's images are there already


def test_variants_tell_apart_what_cannot_be_compared(save: Save, noise_schedule: NoiseScheduleConfig) -> None:
    full = save()

    def variant(name: str, **changes: Any) -> str:
        return comparison(changes.pop("full", full), noise_schedule, names=[name], **changes).definitions()[name][
            "variant"
        ]

    single, average, loss = "generated_image_0_ssim", "avg_ssim", "generated_image_0_diffusion_loss"
    fewer, noises = LocalConfig(n_samples=3, n_noises=3), LocalConfig(n_samples=5, n_noises=4)
    assert variant(single) == variant(single, config=fewer) == variant(single, config=noises)
    assert variant(average) != variant(average, config=fewer)
    assert variant(loss) == variant(loss, config=fewer) != variant(loss, config=noises)
    assert variant(single) == variant(single, sampling=SAMPLING.replace(n_samples=50, batch_size=1))
    for changed in (
        {"noise_seed": 1},
        {"num_inference_steps": 2},
        {"sampler": "ddim"},
        {"use_ema": False},
        {"mixed_precision": "bf16"},
    ):
        assert variant(single) != variant(single, sampling=SAMPLING.replace(**changed))
    assert variant(single) != variant(single, full=save(seed=3))


def test_settings_do_not_depend_on_how_behaviors_were_asked_for(
    save: Save, noise_schedule: NoiseScheduleConfig
) -> None:
    full = save()

    def settings(*names: str, n_noises: int = 3) -> dict[str, Any]:
        config = LOCAL.replace(n_noises=n_noises)
        return comparison(full, noise_schedule, names=names, config=config).settings()

    assert (
        settings("avg_mse", "avg_ssim") == settings("avg_ssim", "avg_mse") == settings("avg_mse", "avg_ssim", "avg_mse")
    )
    assert settings("avg_mse") != settings("avg_mse", "avg_ssim")
    assert settings("avg_mse") == settings("avg_mse", n_noises=4)
    assert settings("avg_total_loss") != settings("avg_total_loss", n_noises=4)


def test_what_is_not_defined_is_left_out_of_local_and_refused_by_name(
    save: Save, noise_schedule: NoiseScheduleConfig
) -> None:
    ends_in_noise = noise_schedule.replace(rescale_betas_zero_snr=True)
    full = save(noise_schedule=ends_in_noise.model_dump(mode="json"))
    names = comparison(full, ends_in_noise).definitions()
    assert "avg_total_loss" in names and not any("elbo" in name for name in names)
    with pytest.raises(ConfigError, match=r"avg_elbo_loss: .* noise alone"):
        comparison(full, ends_in_noise, names=["avg_elbo_loss"])
    small = comparison(save(), noise_schedule, image_size=6).definitions()
    assert "avg_mse" in small and not any("ssim" in name for name in small)
    with pytest.raises(ConfigError, match=r"generated_image_0_ssim: .*7x7 pixels, found images of 6"):
        comparison(save(), noise_schedule, image_size=6, names=["generated_image_0_ssim"])


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"coalition": "110"}, r"coalition 110.*everybody"),
        ({"noise_schedule": {"num_train_timesteps": 77}}, "noise schedule"),
    ],
)
def test_a_model_that_is_not_the_full_one_is_refused(
    save: Save, noise_schedule: NoiseScheduleConfig, meta: dict[str, Any], message: str
) -> None:
    with pytest.raises(MixedResultsError, match=message):
        comparison(save(**meta), noise_schedule)


def test_a_study_fits_averages_and_stores_every_image(make_study: Callable[..., StudyConfig]) -> None:
    config = make_study(
        behaviors=["ink_behaviors:brightness", "local"],
        local={"n_samples": 3, "n_noises": 2},
        fit={"n_coalitions": 12, "n_end_points": 1},
        test={"n_coalitions": 4, "opt_seeds": [1]},
    )
    result = run_study(config, SilentListener())
    averages = ["avg_mse", "avg_nrmse", "avg_ssim", "avg_total_loss", "avg_elbo_loss"]
    assert [item.name for item in result.behaviors] == ["ink_behaviors:brightness", *averages]
    with Store.open(config.db_url, create=False) as store:
        found = store.find(statuses=("finished",))
        assert {len(item.behaviors) for item in found} == {1 + 5 * 4}
        full = {item.spec.settings["behaviors"]["local"]["full_model"] for item in found}
        assert len(full) == 1, "fit and test coalitions are compared with one model"
        grand = store.read(behavior_name="avg_mse", role="grand").behaviors
        empty = store.read(behavior_name="avg_mse", role="empty").behaviors
    assert grand.shape == empty.shape == (1,)
    again = SilentListener()
    run_study(config, again)
    assert again.n_evaluations == 0


def test_a_worker_says_what_local_behaviors_need(make_study: Callable[..., StudyConfig], save: Save) -> None:
    config = make_study()
    preset = config.load_preset()
    worker = Worker(config.data, preset, behaviors=["avg_mse"])
    method = worker.as_is(save())
    with pytest.raises(ConfigError, match=r"avg_mse.*compare_with"):
        worker.value_function(method, SAMPLING)
    facts = {
        "noise_schedule": preset.noise_schedule.model_dump(mode="json"),
        "data": {"fingerprint": worker.data.fingerprint},
    }
    full = save(**facts)
    with pytest.raises(MixedResultsError, match="other data"):
        worker.compare_with(save(**{**facts, "data": {"fingerprint": "other"}}), SAMPLING, LOCAL)
    with pytest.raises(MixedResultsError, match="another codec"):
        worker.compare_with(save(**facts, codec={"path": "p", "fingerprint": "other"}), SAMPLING, LOCAL)
    with pytest.raises(MixedResultsError, match=r"1 channels of 16x16, .* 1 of 8x8"):
        worker.compare_with(save(**facts, unet={"sample_size": 16}), SAMPLING, LOCAL)
    sampling = worker.compare_with(full, SAMPLING.replace(n_samples=1000), LOCAL)
    assert sampling.n_samples == 5, "no behavior describes all images together"
    worker.value_function(method, sampling)
    with pytest.raises(ConfigError, match="compare_with"):
        worker.value_function(method, SAMPLING.replace(noise_seed=9))
