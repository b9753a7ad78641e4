"""Training, pruning and sampling in the latent space of a codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel

from tribute.config import DataConfig, Preset, PruneConfig
from tribute.data.tensors import TrainingData
from tribute.diffusion.examples import LatentExamples
from tribute.diffusion.sample import from_uint8, sample_images
from tribute.errors import CheckpointError, ConfigError, DataError, MixedResultsError
from tribute.models import codec as codec_module
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import adopt_model
from tribute.seeding import torch_stream
from tribute.study import latents as study_latents
from tribute.study.compatibility import check_same_data
from tribute.study.stages import Saving, prune_model, train_model
from tribute.study.worker import Worker

MakePreset = Callable[..., Preset]
MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(photo_data: TrainingData, latent_preset: MakePreset) -> MakeWorker:
    def make(codec: str = "vq", *, preset: dict[str, Any] | None = None, **options: Any) -> Worker:
        return Worker(DataConfig(), latent_preset(codec, **(preset or {})), data=photo_data, device="cpu", **options)

    return make


def train(worker: Worker, folder: Path, n_steps: int = 6, **changes: Any) -> Checkpoint:
    config = worker.preset.train_config("retrain", n_steps=n_steps, **changes)
    everyone = np.ones(worker.data.contributors.n_contributors, dtype=np.bool_)
    return train_model(worker, config, Saving(folder, 2, keep_all=True), method="retrain", coalition_mask=everyone)


def equal(left: Checkpoint, right: Checkpoint) -> bool:
    return all(torch.equal(value, right.ema[name]) for name, value in left.ema.items())


# Examples


def test_examples_are_the_scaled_latents_in_the_order_asked_for(
    codecs: dict[str, Path], make_worker: MakeWorker
) -> None:
    worker = make_worker()
    rows = np.array([17, 3, 3, 39])
    reference = VQModel.from_pretrained(codecs["vq"] / "vqvae").eval()
    with torch.no_grad():
        expected = 0.5 * reference.encode(from_uint8(worker.data.images[rows])).latents
    examples = worker.trainer.examples
    torch.testing.assert_close(examples.batch(rows, torch_stream(0, "any")), expected, rtol=0, atol=1e-6)
    assert len(examples) == 40 and not examples.can_flip
    np.testing.assert_array_equal(examples.labels, worker.data.labels)


def test_posterior_draws_depend_on_the_stream_alone_and_have_its_moments() -> None:
    mean, log_variance = torch.full((2, 1, 40, 40), 3.0), torch.full((2, 1, 40, 40), 2 * np.log(0.5))
    examples = LatentExamples(torch.cat([mean, log_variance], dim=1).float().numpy(), has_posterior=True)
    rows = np.array([1, 0, 1])
    drawn = examples.batch(rows, torch_stream(5, "posterior", 1))
    assert torch.equal(drawn, examples.batch(rows, torch_stream(5, "posterior", 1)))
    assert not torch.equal(drawn, examples.batch(rows, torch_stream(5, "posterior", 2)))
    assert not torch.equal(drawn[0], drawn[2])  # the same example, used twice
    assert drawn.shape == (3, 1, 40, 40)
    assert abs(float(drawn.mean()) - 3.0) < 0.03 and abs(float(drawn.std()) - 0.5) < 0.02


def test_training_on_a_posterior_draws_anew_at_every_step(make_worker: MakeWorker) -> None:
    examples = make_worker("kl").trainer.examples
    assert isinstance(examples, LatentExamples) and examples.has_posterior
    batches = [examples.batch(np.arange(4), torch_stream(42, "latent posterior", step)) for step in (0, 1)]
    assert batches[0].shape == (4, 3, 8, 8) and not torch.equal(*batches)


# Training


@pytest.mark.parametrize("codec", ["vq", "kl"])
def test_training_on_latents_resumes_exactly(tmp_path: Path, make_worker: MakeWorker, codec: str) -> None:
    undisturbed = train(make_worker(codec), tmp_path / "undisturbed")
    train(make_worker(codec), tmp_path / "stopped", n_steps=4)
    assert equal(train(make_worker(codec), tmp_path / "stopped"), undisturbed)


def test_reuse_trains_without_the_codec(
    tmp_path: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(make_worker(), tmp_path / "with the codec")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the codec was loaded")

    monkeypatch.setattr(study_latents, "load_codec", refuse)
    assert equal(train(make_worker(reuse_latents=True), tmp_path / "from the cache"), expected)
    assert equal(train(make_worker(), tmp_path / "found there"), expected)
    with pytest.raises(AssertionError, match="the codec was loaded"):  # the trap works
        make_worker("vq2")


def test_reuse_needs_no_file_of_the_codec(tmp_path: Path, photo_data: TrainingData, latent_preset: MakePreset) -> None:
    preset = latent_preset()
    expected = train(Worker(DataConfig(), preset, data=photo_data, device="cpu"), tmp_path / "expected")
    folder, aside = Path(preset.codec.path), tmp_path / "aside"  # type: ignore[union-attr]
    folder.rename(aside)
    try:
        worker = Worker(DataConfig(), preset, data=photo_data, device="cpu", reuse_latents=True)
        assert equal(train(worker, tmp_path / "reused"), expected)
        with pytest.raises(CheckpointError, match="--codec"):
            Worker(DataConfig(), preset, data=photo_data, device="cpu")
    finally:
        aside.rename(folder)


def test_reuse_refuses_the_latents_of_another_codec(make_worker: MakeWorker) -> None:
    with pytest.raises(DataError, match="--precompute_stage save"):
        make_worker("vq", reuse_latents=True)
    make_worker("vq2")
    with pytest.raises(MixedResultsError, match=r"codec fingerprint: cached '.*', asked '"):
        make_worker("vq", reuse_latents=True)


def test_flips_of_latents_are_refused(tmp_path: Path, make_worker: MakeWorker) -> None:
    with pytest.raises(ConfigError, match="random_flip"):
        train(make_worker(), tmp_path, random_flip=True)


def test_images_and_latents_must_fit_the_network(make_worker: MakeWorker, latent_preset: MakePreset) -> None:
    unet = latent_preset().unet.model_dump()
    with pytest.raises(DataError, match=r"expects images of 32x32 pixels .* found 16x16"):
        make_worker(preset={"unet": {**unet, "sample_size": 16}})
    with pytest.raises(ConfigError, match=r"3 channels .* takes 4 channels"):
        make_worker(preset={"unet": {**unet, "in_channels": 4}})


# Models


def test_a_model_remembers_its_codec_and_refuses_another(tmp_path: Path, make_worker: MakeWorker) -> None:
    full = train(make_worker(), tmp_path)
    assert full.meta["codec"]["fingerprint"] == make_worker().codec_identity()["codec"]
    check_same_data(full, make_worker())
    other = make_worker("vq2")
    with pytest.raises(MixedResultsError, match=r"another codec: saved .*vq .* asked for .*vq2 .*--codec"):
        check_same_data(full, other)
    with pytest.raises(MixedResultsError, match="codec: saved"):
        train(other, tmp_path)


def test_a_recipe_for_a_model_of_ours_has_its_codec(
    tmp_path: Path, make_worker: MakeWorker, latent_preset: MakePreset
) -> None:
    full = train(make_worker(), tmp_path)
    assert adopt_model(latent_preset("kl"), full) == latent_preset()
    pixels = latent_preset().replace(codec=None)
    assert adopt_model(pixels, full) == latent_preset()


def test_another_place_of_the_codec_brings_its_own_scaling(latent_preset: MakePreset) -> None:
    preset = latent_preset()
    preset = preset.replace(codec={**dict(preset.codec or {}), "scaling_factor": 1.0})
    moved = preset.with_codec("elsewhere").codec
    assert moved is not None and (moved.path, moved.scaling_factor, moved.factor) == ("elsewhere", None, 2)
    assert preset.codec is not None and preset.with_codec(preset.codec.path) == preset


def test_samplers_that_clip_latents_are_refused(latent_preset: MakePreset) -> None:
    schedule = latent_preset().noise_schedule
    for name in ("clip_sample", "thresholding"):
        with pytest.raises(ConfigError, match=rf"{name}.* expected false with a codec"):
            latent_preset(noise_schedule=schedule.replace(**{name: True}).model_dump())


def test_pruning_measures_importance_on_latents(tmp_path: Path, make_worker: MakeWorker) -> None:
    worker = make_worker("kl")
    full = train(worker, tmp_path / "full")
    prune = {"pruning_ratio": 0.3, "pruner": "taylor", "batch_size": 8}

    pruned, result = prune_model(worker, full, PruneConfig.parse(prune, where="test"), tmp_path / "pruned")
    assert result is not None and pruned.meta["codec"] == full.meta["codec"]


def test_sampling_decodes_in_batches_that_change_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert worker.latent_space is not None
    model = build_unet(worker.preset.unet, opt_seed=3)
    decode = worker.latent_space.decode
    images = sample_images(model, worker.preset.sampling, worker.preset.noise_schedule, decode=decode)
    assert images.shape == (6, 16, 16, 3) and images.std() > 1
    worker.latent_space.codec = codec_module.load_codec(worker.latent_space.files, batch_size=1)
    sampling = worker.preset.sampling.replace(batch_size=4)
    by_one = sample_images(model, sampling, worker.preset.noise_schedule, decode=decode)
    assert np.abs(images.astype(int) - by_one).max() <= 1  # float32 rounding may move a pixel by one grey level


def test_decoding_refuses_a_codec_that_did_not_make_the_latents(
    make_worker: MakeWorker, codecs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    assert worker.latent_space is not None
    files = codec_module.find_codec(worker.latent_space.config.replace(path=str(codecs["vq2"])))
    monkeypatch.setitem(worker.latent_space.__dict__, "files", files)
    with pytest.raises(MixedResultsError, match="made with another codec"):
        worker.latent_space.decode(torch.zeros(1, 3, 8, 8))


def test_an_evaluation_is_of_its_codec(make_worker: MakeWorker) -> None:
    identities = []
    for codec in ("vq", "vq2"):
        worker = make_worker(codec)
        identities.append(worker.settings(worker.preset.sampling, train=None, start="x")["codec"])
    assert len(set(identities)) == 2


def test_value_functions_measure_images_not_latents(make_worker: MakeWorker) -> None:
    worker = make_worker(behaviors=[])
    method = worker.retraining(worker.preset.train_config("retrain", n_steps=1))
    evaluation = worker.value_function(method, worker.preset.sampling)(np.array([True, False]), opt_seed=1)
    assert evaluation.images.shape == (6, 16, 16, 3)
    assert evaluation.images.dtype == np.uint8
