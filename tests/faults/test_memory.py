"""Memory that does not suffice: batches are halved where that changes nothing, and refused where it does."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import SilentListener

from tribute.behaviors.classifier import ClassifierExtractor
from tribute.behaviors.classifier_networks import Architecture
from tribute.behaviors.extractors.network import NetworkExtractor
from tribute.config import NoiseScheduleConfig, RuntimeConfig, SampleConfig, StudyConfig, TrainConfig, UNetConfig
from tribute.diffusion import train as train_module
from tribute.diffusion.local_loss import image_losses, losses_batch
from tribute.diffusion.sample import MIN_BATCH, sample_images, sampling_batch
from tribute.diffusion.train import Trainer
from tribute.errors import OutOfMemory
from tribute.memory import FittingBatch, is_out_of_memory
from tribute.models.build import build_noise_schedule, build_unet
from tribute.store.records import Store
from tribute.study.run import run_study
from tribute.types import Images

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)
SHORTAGES = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU_ALLOCATOR)]


def limit(model: torch.nn.Module, n_most: int, shortage: BaseException) -> list[int]:
    """Let a network refuse more than so many images at once; returns the batches that it was given."""
    given: list[int] = []

    def refuse(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        given.append(len(inputs[0]))
        if len(inputs[0]) > n_most:
            raise type(shortage)(*shortage.args)

    model.register_forward_pre_hook(refuse)
    return given


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about memory."""
    return [record.getMessage() for record in caplog.records if record.name == "tribute.memory"]


def test_a_real_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    with pytest.raises(MemoryError) as found_by_numpy:
        np.empty(1 << 60, dtype=np.uint8)
    assert is_out_of_memory(found_by_numpy.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["device", "machine"])
@pytest.mark.parametrize("n_most", [32, 16])
def test_fewer_images_at_once_are_the_same_images(
    unet_config: UNetConfig,
    noise_schedule: NoiseScheduleConfig,
    n_most: int,
    shortage: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = SampleConfig(n_samples=70, sampler="ddim", num_inference_steps=3, batch_size=64)
    expected = sample_images(build_unet(unet_config, opt_seed=1), config, noise_schedule)
    model = build_unet(unet_config, opt_seed=1).train()
    given = limit(model, n_most, shortage)
    batch = sampling_batch(64)
    with caplog.at_level(logging.WARNING):
        images = sample_images(model, config, noise_schedule, batch=batch)
    np.testing.assert_array_equal(images, expected)
    assert model.training
    assert batch.size == n_most
    assert warnings(caplog) == [
        f"generating images: 64 at once do not fit into memory, {n_most} do; results stay the same, but for rounding"
    ]
    given.clear()
    np.testing.assert_array_equal(sample_images(model, config, noise_schedule, batch=batch), expected)
    assert max(given) == n_most and len(warnings(caplog)) == 1  # remembered, and said once


def test_below_the_smallest_exact_batch_images_are_generated_all_the_same(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = SampleConfig(n_samples=20, sampler="ddim", num_inference_steps=3, batch_size=20)
    expected = sample_images(build_unet(unet_config, opt_seed=1), config, noise_schedule)
    model = build_unet(unet_config, opt_seed=1)
    given = limit(model, 1, SHORTAGES[0])
    images = sample_images(model, config, noise_schedule)
    assert list(dict.fromkeys(given)) == [20, MIN_BATCH, 8, 4, 2, 1]
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert "20 at once do not fit into memory, 1 do" in warnings(caplog)[0]


def test_a_compiled_network_is_compiled_for_the_smaller_batch_alone(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig
) -> None:
    config = SampleConfig(n_samples=70, sampler="ddim", num_inference_steps=2, batch_size=64)
    expected = sample_images(build_unet(unet_config, opt_seed=1), config, noise_schedule)
    model = build_unet(unet_config, opt_seed=1)
    batch = sampling_batch(64)
    shapes: list[int] = []
    model.compile = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue]
    forward = model.forward

    def limited(images: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        shapes.append(len(images))
        if len(images) > 32:
            raise SHORTAGES[0]
        return forward(images, *arguments, **options)

    model.forward = limited  # pyright: ignore[reportAttributeAccessIssue]
    images = sample_images(model, config, noise_schedule, batch=batch, runtime=RuntimeConfig(compile=True))
    np.testing.assert_array_equal(images, expected)
    assert set(shapes) == {64, 32}  # the last 6 are filled up to 32


def test_not_even_one_is_an_error_that_says_what_helps(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig
) -> None:
    model = build_unet(unet_config, opt_seed=1)
    limit(model, 0, SHORTAGES[0])
    with pytest.raises(OutOfMemory, match=r"generating images: not even one .*CUDA out of memory.*more memory"):
        sample_images(model, SampleConfig(n_samples=20, num_inference_steps=2), noise_schedule)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig
) -> None:
    model = build_unet(unet_config, opt_seed=1)
    given = limit(model, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        sample_images(model, SampleConfig(n_samples=20, num_inference_steps=2), noise_schedule)
    assert len(given) == 1


def test_what_the_failed_work_held_is_free_before_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(items: range) -> int:
        assert all(tensor() is None for tensor in held)
        mine = torch.zeros(len(items))
        held.append(weakref.ref(mine))
        if len(items) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return len(items)

    gc.disable()  # not by luck
    try:
        assert FittingBatch(16, "work", setting="").map(5, work) == [2, 2, 1]
    finally:
        gc.enable()
    assert len(held) == 4


def test_denoising_losses_stay_the_same(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig, digit_images: Images
) -> None:
    from tribute.diffusion.sample import from_uint8

    clean = from_uint8(digit_images[:8])
    options: dict[str, Any] = {"n_noises": 8, "noise_seed": 3}
    schedule = build_noise_schedule(noise_schedule)
    expected = image_losses(build_unet(unet_config, opt_seed=1), schedule, clean, **options, batch_size=64)
    model = build_unet(unet_config, opt_seed=1)
    limit(model, 20, SHORTAGES[1])
    batch = losses_batch(64)
    found = image_losses(model, schedule, clean, **options, batch=batch)
    np.testing.assert_allclose(found.simple, expected.simple, rtol=1e-6)
    assert batch.size == 16


def test_features_stay_the_same(digit_images: Images, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        sizes.append(len(pixels))
        if len(pixels) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels.float().mean(dim=(2, 3)), None

    def extractor(forward: Callable[..., Any]) -> NetworkExtractor:
        return NetworkExtractor("clip", "0", "none", forward, 64, "cpu")

    limited = extractor(forward)
    expected = extractor(lambda pixels: (pixels.float().mean(dim=(2, 3)), None)).extract(digit_images[:50])
    np.testing.assert_array_equal(limited.extract(digit_images[:50]).embeddings, expected.embeddings)
    assert "features of images: 50 at once" in warnings(caplog)[0]
    sizes.clear()
    limited.extract(digit_images[:50])
    assert max(sizes) <= 10


def test_the_classifier_looks_at_fewer_images_at_once(digit_images: Images) -> None:
    architecture = Architecture((8, 8, 1), 10, 16, (80.0,), (90.0,))
    torch.manual_seed(0)
    weights = {name: value.numpy() for name, value in architecture.build().state_dict().items()}
    facts: dict[str, Any] = {"held_out_accuracy": 1.0, "n_held_out": 1, "device": "cpu"}

    def classifier() -> ClassifierExtractor:
        return ClassifierExtractor(architecture, weights, label_names=list("0123456789"), **facts)

    expected, limited = classifier().extract(digit_images[:200]), classifier()
    given = limit(limited._network["trunk"], 60, SHORTAGES[1])
    found = limited.extract(digit_images[:200])
    assert found.probabilities is not None and expected.probabilities is not None
    np.testing.assert_allclose(found.embeddings, expected.embeddings, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)
    assert given == [200, 100, 50, 50, 50, 50]


def test_training_is_refused_with_what_helps_and_the_same_trainer_goes_on(
    unet_config: UNetConfig, noise_schedule: NoiseScheduleConfig, digit_images: Images
) -> None:
    """Halving the batch would change every draw of noise, and with them the result."""
    trainer = Trainer(digit_images[:32], noise_schedule, device="cpu")
    config = TrainConfig(n_steps=2, batch_size=8)
    rows = np.arange(32)
    expected = trainer.train(build_unet(unet_config, opt_seed=1), rows, config)
    model = build_unet(unet_config, opt_seed=1)
    hook = model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(OutOfMemory, match=r"gradient_checkpointing.*batch_size \(8\).*steps \(1\).*8bit") as found:
        trainer.train(model, rows, config)
    assert found.value.__cause__ is None and found.value.__context__ is None  # which would keep the step's tensors
    hook.remove()
    again = trainer.train(model, rows, config)
    assert all(torch.equal(again.ema[name], expected.ema[name]) for name in expected.ema)


def test_a_study_measures_the_same_with_less_memory(
    make_study: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The behavior `digest` is a hash of all images."""
    changes: dict[str, Any] = {"sampling": {"n_samples": 40, "batch_size": 40}}

    def values(config: StudyConfig) -> list[tuple[float, ...]]:
        with Store.open(config.db_url, create=False) as store:
            found = store.find(statuses=("finished",))
        return [tuple(item.behaviors.values()) for item in found]

    plenty = make_study(name="plenty", **changes)
    run_study(plenty, SilentListener())
    import tribute.diffusion.sample as sample

    predict = sample.guided_prediction
    sizes: list[int] = []

    def limited(model: Any, images: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(model, images, *arguments)

    monkeypatch.setattr(sample, "guided_prediction", limited)
    little = make_study(name="little", **changes)
    run_study(little, SilentListener())
    assert values(little) == values(plenty)
    assert sizes.count(40) == 1  # of 14 coalitions only the first one tried
    assert len(warnings(caplog)) == 1


def test_a_full_model_that_does_not_fit_stops_the_study(
    make_study: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(CPU_ALLOCATOR)

    monkeypatch.setattr(train_module, "denoising_loss", refuse)
    with pytest.raises(OutOfMemory, match=r"does not fit into memory .*gradient_checkpointing"):
        run_study(make_study(), SilentListener())
