from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tribute.config import NoiseScheduleConfig, OptimizerConfig, PruneConfig, SampleConfig, TrainConfig, UNetConfig
from tribute.data.contributors import ContributorTable
from tribute.diffusion.sample import sample_images
from tribute.diffusion.train import CheckpointPolicy, Trainer
from tribute.errors import CoalitionError, ConfigError, MixedResultsError, NotImplementedYet
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from tribute.models.pruning import prune_unet
from tribute.types import Images
from tribute.unlearning.as_is import AsIs, mask_to_text
from tribute.unlearning.base import METHODS, PLANNED_METHODS, CoalitionModel, UnlearningMethod, check_method
from tribute.unlearning.gd import FineTuning
from tribute.unlearning.retrain import Retraining

N = 4
GRAND = np.ones(N, dtype=np.bool_)
EMPTY = np.zeros(N, dtype=np.bool_)
A = np.array([True, False, True, False])
B = np.array([False, True, True, True])
CONFIG = TrainConfig(n_steps=3, batch_size=8, optimizer=OptimizerConfig(lr=3e-3), ema_max_decay=0.6, opt_seed=1_000)

Weights = dict[str, npt.NDArray[np.float32]]


def weights(found: CoalitionModel) -> Weights:
    assert not found.model.training
    return {name: value.numpy().copy() for name, value in found.model.state_dict().items()}


def equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def contributors() -> ContributorTable:
    """Four contributors of 40 digits."""
    owners = np.random.Generator(np.random.PCG64(0)).integers(N, size=40, dtype=np.int32)
    return ContributorTable(tuple("abcd"), owners)


@pytest.fixture
def trainer(digit_images: Images, noise_schedule: NoiseScheduleConfig) -> Trainer:
    return Trainer(digit_images[:40], noise_schedule, device="cpu")


@pytest.fixture(scope="module")
def sparse(unet_config: UNetConfig, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A pruned model whose moving average is not its weights."""
    model, average = build_unet(unet_config, opt_seed=1), build_unet(unet_config, opt_seed=2)
    recipe = prune_unet(model, PruneConfig(pruning_ratio=0.5)).recipe
    prune_unet(average, PruneConfig(pruning_ratio=0.5))
    path = save_checkpoint(
        tmp_path_factory.mktemp("sparse"),
        n_steps=5,
        unet=model.state_dict(),
        ema=average.state_dict(),
        meta={"unet": unet_config.model_dump(mode="json"), "coalition": mask_to_text(A), "seconds_train": 2.5},
        pruning=recipe,
    )
    return load_checkpoint(path)


@pytest.fixture
def make(
    trainer: Trainer, contributors: ContributorTable, sparse: Checkpoint, unet_config: UNetConfig
) -> Callable[..., UnlearningMethod]:
    def make(name: str, **options: Any) -> UnlearningMethod:
        if name == "gd":
            return FineTuning(trainer, contributors, sparse, CONFIG, **options)
        return Retraining(trainer, contributors, unet_config, CONFIG, **options)

    return make


def sample(found: CoalitionModel, noise_schedule: NoiseScheduleConfig) -> Images:
    return sample_images(found.model, SampleConfig(n_samples=4, num_inference_steps=2), noise_schedule)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_coalitions_does_not_matter(make: Any, noise_schedule: Any, name: str) -> None:
    def obtain(method: UnlearningMethod, order: list[npt.NDArray[np.bool_]]) -> dict[str, tuple[Weights, Images]]:
        found = {}
        for mask in order:
            model = method.obtain(mask, opt_seed=3)
            found[mask_to_text(mask)] = weights(model), sample(model, noise_schedule)
        return found

    forwards = obtain(make(name), [A, EMPTY, B, GRAND])
    backwards = obtain(make(name), [GRAND, B, A, EMPTY])
    for mask in (A, B, EMPTY, GRAND):
        text = mask_to_text(mask)
        assert equal(forwards[text][0], backwards[text][0])
        np.testing.assert_array_equal(forwards[text][1], backwards[text][1])
        alone = make(name).obtain(mask, opt_seed=3)
        assert equal(weights(alone), forwards[text][0])
    assert not equal(forwards[mask_to_text(A)][0], forwards[mask_to_text(B)][0])


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_order_of_coalitions_does_not_matter_in_bf16(
    digit_images: Images, contributors: ContributorTable, sparse: Checkpoint, noise_schedule: NoiseScheduleConfig
) -> None:
    trainer = Trainer(digit_images[:40], noise_schedule, mixed_precision="bf16", device="cpu")
    method = FineTuning(trainer, contributors, sparse, CONFIG.replace(mixed_precision="bf16"))
    images = [sample(method.obtain(mask, opt_seed=3), noise_schedule) for mask in (EMPTY, A, EMPTY, A)]
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[3])


@pytest.mark.parametrize("name", METHODS)
def test_only_the_training_seed_of_the_call_counts(make: Any, name: str) -> None:
    method = make(name)
    first = weights(method.obtain(A, opt_seed=3))
    torch.manual_seed(5)
    assert equal(weights(method.obtain(A, opt_seed=3)), first)
    for mask in (A, EMPTY):
        assert not equal(weights(method.obtain(mask, opt_seed=3)), weights(method.obtain(mask, opt_seed=4)))


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("mask", [A, GRAND], ids=["A", "grand"])
def test_fine_tuning_is_training_from_the_sparse_model_on_the_coalitions_examples(
    make: Any,
    trainer: Trainer,
    contributors: ContributorTable,
    sparse: Checkpoint,
    mask: npt.NDArray[np.bool_],
    use_ema: bool,
) -> None:
    found = make("gd", use_ema=use_ema).obtain(mask, opt_seed=3)
    twin = build_model(sparse, use_ema=use_ema)
    rows = np.flatnonzero([mask[owner] for owner in contributors.contributor_of_example])
    result = trainer.train(twin, rows, CONFIG.replace(opt_seed=3))
    expected = result.ema if use_ema else twin.state_dict()
    assert equal(weights(found), {name: value.detach().numpy() for name, value in expected.items()})
    assert found.n_steps == CONFIG.n_steps
    assert found.seconds_train > 0


@pytest.mark.parametrize("use_ema", [True, False])
def test_retraining_is_training_a_new_network_on_the_coalitions_examples(
    make: Any, trainer: Trainer, contributors: ContributorTable, unet_config: UNetConfig, use_ema: bool
) -> None:
    found = make("retrain", use_ema=use_ema).obtain(B, opt_seed=3)
    twin = build_unet(unet_config, opt_seed=3)
    result = trainer.train(twin, contributors.examples_of(B), CONFIG.replace(opt_seed=3))
    expected = result.ema if use_ema else twin.state_dict()
    assert equal(weights(found), {name: value.detach().numpy() for name, value in expected.items()})


def test_no_steps_give_the_sparse_model(trainer: Trainer, contributors: ContributorTable, sparse: Checkpoint) -> None:
    method = FineTuning(trainer, contributors, sparse, CONFIG.replace(n_steps=0))
    expected = {name: value.numpy() for name, value in sparse.ema.items()}
    assert equal(weights(method.obtain(A, opt_seed=3)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_nobody_gets_the_untrained_network(make: Any, sparse: Checkpoint, unet_config: UNetConfig, name: str) -> None:
    found = make(name).obtain(EMPTY, opt_seed=3)
    assert (found.n_steps, found.seconds_train) == (0, 0.0)
    untrained = weights(found)
    if name == "retrain":
        expected = build_unet(unet_config, opt_seed=3).state_dict()
        assert equal(untrained, {key: value.numpy() for key, value in expected.items()})
    else:
        assert {key: value.shape for key, value in untrained.items()} == {
            key: tuple(value.shape) for key, value in sparse.ema.items()
        }
        trained = np.concatenate([v.numpy().ravel() for v in sparse.ema.values() if v.ndim > 1])
        fresh = np.concatenate([v.ravel() for v in untrained.values() if v.ndim > 1])
        assert np.isin(fresh, trained).mean() < 0.02


def test_a_coalition_of_other_contributors_is_refused(make: Any) -> None:
    for name in METHODS:
        with pytest.raises(CoalitionError, match=r"shape \(4,\)"):
            make(name).obtain(np.ones(5, dtype=np.bool_), opt_seed=3)


def test_a_coalitions_model_can_be_saved_and_resumed(
    trainer: Trainer, contributors: ContributorTable, sparse: Checkpoint, tmp_path: Path, make: Any
) -> None:
    policy = CheckpointPolicy(tmp_path, sparse.meta, ckpt_freq=1, pruning=sparse.pruning)
    method = FineTuning(trainer, contributors, sparse, CONFIG, checkpoints=policy)
    first = weights(method.obtain(A, opt_seed=3))
    assert equal(first, weights(make("gd").obtain(A, opt_seed=3)))
    assert equal(first, weights(method.obtain(A, opt_seed=3)))
    saved = AsIs(load_checkpoint(tmp_path)).obtain(A, opt_seed=0)
    assert equal(weights(saved), first)
    with pytest.raises(MixedResultsError, match=r"opt_seed: saved 3, asked 4"):
        method.obtain(A, opt_seed=4)


def test_a_trained_model_is_measured_as_it_is(sparse: Checkpoint) -> None:
    average = {name: value.numpy() for name, value in sparse.ema.items()}
    raw = {name: value.numpy() for name, value in sparse.unet.items()}
    method = AsIs(sparse)
    found = method.obtain(A, opt_seed=3)
    assert equal(weights(found), average)
    assert (found.n_steps, found.seconds_train) == (5, 2.5)
    assert equal(weights(AsIs(sparse, use_ema=False).obtain(A, opt_seed=3)), raw)
    untrained = method.obtain(EMPTY, opt_seed=3)
    assert not equal(weights(untrained), average)
    assert equal(weights(method.obtain(EMPTY, opt_seed=3)), weights(untrained))
    assert equal(weights(method.obtain(A, opt_seed=4)), average)  # whatever was asked before


def test_a_model_of_another_coalition_is_refused(sparse: Checkpoint) -> None:
    for other in (B, GRAND, A[:3]):
        with pytest.raises(MixedResultsError, match=rf"coalition 1010,.*ask for {mask_to_text(other)}.*--removal_seed"):
            AsIs(sparse).obtain(other, opt_seed=3)


def test_methods_are_known_by_name(make: Any) -> None:
    for name in METHODS:
        assert check_method(name) == name == make(name).name
    assert AsIs.name == "retrain"
    for name in PLANNED_METHODS:
        with pytest.raises(NotImplementedYet, match=rf"--method {name} .*use one of gd, retrain"):
            check_method(name)
    with pytest.raises(ConfigError, match=r"--method: expected one of gd, retrain, ga, lora, iu; found 'sgd'"):
        check_method("sgd")
