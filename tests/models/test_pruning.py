from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from tribute.config import NoiseScheduleConfig, PruneConfig, PrunerName, UNetConfig, load_preset
from tribute.diffusion.loss import denoising_loss
from tribute.diffusion.sample import from_uint8
from tribute.errors import CheckpointError, ConfigError
from tribute.models.build import build_noise_schedule, build_unet, count_parameters
from tribute.models.checkpoint import build_model, load_checkpoint, save_checkpoint
from tribute.models.pruning import PruningResult, apply_recipe, count_macs, prune_unet
from tribute.types import Images

PRUNERS = get_args(PrunerName)
N_TIMESTEPS = 8

LossAt = Callable[[int], torch.Tensor]


@pytest.fixture(scope="module")
def make_loss(digit_images: Images) -> Callable[[nn.Module], LossAt]:
    """Mean loss of a model on fixed digits and noise, at one of 8 noise levels."""
    schedule = build_noise_schedule(NoiseScheduleConfig(num_train_timesteps=N_TIMESTEPS, beta_end=0.2))
    clean = from_uint8(digit_images[:4])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def make(model: nn.Module) -> LossAt:
        return lambda timestep: denoising_loss(model, schedule, clean, noise, torch.full((4,), timestep))

    return make


def probe(config: UNetConfig) -> torch.Tensor:
    shape = (3, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def outputs(model: UNet2DModel, config: UNetConfig) -> np.ndarray:
    return model.eval()(probe(config), torch.tensor([1, 5, 7]), return_dict=False)[0].numpy()


def prune(
    config: UNetConfig, make_loss: Callable[[nn.Module], LossAt], **settings: Any
) -> tuple[UNet2DModel, PruningResult]:
    model = build_unet(config, opt_seed=3).eval()
    result = prune_unet(model, PruneConfig(**settings), loss_at=make_loss(model), n_timesteps=N_TIMESTEPS)
    return model, result


def outputs_of_saved(folders: list[Path]) -> list[np.ndarray]:
    """Load saved models and run them; called in a process that never saw the models."""
    found = []
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        found.append(outputs(build_model(checkpoint), UNetConfig(**checkpoint.meta["unet"])))
    return found


@pytest.fixture(scope="module")
def configs(unet_config: UNetConfig) -> dict[str, UNetConfig]:
    return {"attention": unet_config, "digits": load_preset("digits").unet}


@pytest.fixture(scope="module")
def pruned(configs: dict[str, UNetConfig], make_loss: Any) -> dict[tuple[str, str], tuple[UNet2DModel, PruningResult]]:
    """Every pruner on two architectures."""
    return {
        (name, pruner): prune(config, make_loss, pruner=pruner, pruning_ratio=0.5)
        for name, config in configs.items()
        for pruner in PRUNERS
    }


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", ["attention", "digits"])
def test_pruned_networks_are_smaller_and_work(pruned: Any, configs: Any, name: str, pruner: str) -> None:
    model, result = pruned[name, pruner]
    full = build_unet(configs[name])
    assert result.n_parameters == (count_parameters(full), count_parameters(model))
    assert result.n_macs == (count_macs(full), count_macs(model))
    assert result.n_parameters[1] < 0.5 * result.n_parameters[0]
    assert result.n_macs[1] < 0.5 * result.n_macs[0]
    assert result.summary()["n_macs"] == {"before": result.n_macs[0], "after": result.n_macs[1]}
    found = outputs(model, configs[name])
    assert found.shape == tuple(probe(configs[name]).shape)
    assert np.isfinite(found).all()
    assert model.conv_out.out_channels == configs[name].out_channels
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert all(norm.num_channels % norm.num_groups == 0 for norm in norms)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pruned_networks_come_back_bit_for_bit_in_a_new_process(
    pruned: Any, configs: Any, tmp_path: Path, in_new_process: Callable[..., Any]
) -> None:
    folders = []
    for (name, pruner), (model, result) in pruned.items():
        meta = {"unet": configs[name].model_dump(mode="json")}
        folder = tmp_path / name / pruner
        weights = model.state_dict()
        save_checkpoint(folder, n_steps=0, unet=weights, ema=weights, meta=meta, pruning=result.recipe)
        folders.append(folder)
    for (key, (model, _)), found in zip(pruned.items(), in_new_process(outputs_of_saved, folders), strict=True):
        np.testing.assert_array_equal(found, outputs(model, configs[key[0]]), err_msg=str(key))


def test_a_pruned_network_can_be_trained(pruned: Any, configs: Any) -> None:
    """Every weight of the rebuilt network takes part in the prediction."""
    model = build_unet(configs["attention"])
    apply_recipe(model, pruned["attention", "magnitude"][1].recipe)
    model.load_state_dict(pruned["attention", "magnitude"][0].state_dict())
    model(probe(configs["attention"]), torch.tensor([1, 5, 7]))[0].square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("pruner", [pruner for pruner in PRUNERS if pruner != "reinit"])
def test_ratio_zero_changes_nothing(configs: Any, make_loss: Any, pruner: str) -> None:
    config = configs["attention"]
    model, result = prune(config, make_loss, pruner=pruner, pruning_ratio=0.0)
    before = build_unet(config, opt_seed=3)
    assert result.recipe["removed_channels"] == []
    assert result.n_parameters[0] == result.n_parameters[1]
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(outputs(model, config), outputs(before, config))


def test_the_ratio_is_the_fraction_removed(configs: Any, make_loss: Any) -> None:
    sizes = [
        prune(configs["digits"], make_loss, pruning_ratio=ratio)[1].n_parameters[1] for ratio in (0.0, 0.25, 0.5, 0.75)
    ]
    # A convolution between two pruned layers keeps (1 - ratio) ** 2 of its weights.
    for size, kept in zip(sizes, (1.0, 0.75, 0.5, 0.25), strict=True):
        assert size / sizes[0] == pytest.approx(kept**2, abs=0.1)


def weights(model: nn.Module) -> torch.Tensor:
    """All weights but those of norms, which start as ones and zeros."""
    return torch.cat(
        [p.detach().flatten() for name, p in model.named_parameters() if p.ndim > 1 and "norm" not in name]
    )


def test_reinit_removes_random_channels_and_keeps_no_weight(pruned: Any, configs: Any) -> None:
    reinit, reinit_result = pruned["attention", "reinit"]
    random, random_result = pruned["attention", "random"]
    assert reinit_result.recipe["removed_channels"] == random_result.recipe["removed_channels"]
    trained = weights(build_unet(configs["attention"], opt_seed=3))
    assert torch.isin(weights(random), trained).all()
    assert torch.isin(weights(reinit), trained).float().mean() < 0.02  # uniform draws of 24 bits coincide now and then
    assert all(parameter.square().sum() > 0 for name, parameter in reinit.named_parameters() if "weight" in name)


def test_the_random_pruner_follows_its_seed_and_leaves_the_global_generator_alone(configs: Any, make_loss: Any) -> None:
    def removed(seed: int) -> Any:
        return prune(configs["digits"], make_loss, pruner="random", seed=seed)[1].recipe["removed_channels"]

    before = torch.get_rng_state()
    first = removed(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert removed(0) == first
    assert removed(1) != first


def test_magnitude_removes_the_channels_that_are_small(configs: Any) -> None:
    """Planted: the inner channels of one residual block shrunk to nothing, at the same places of both norm groups."""
    config = configs["digits"]  # 16 channels in 2 groups
    model = build_unet(config, opt_seed=3)
    small = [0, 3, 6, 7, 8, 11, 14, 15]
    block: Any = model.get_submodule("down_blocks.0.resnets.0")
    with torch.no_grad():
        for layer in (block.conv1, block.time_emb_proj, block.norm2):
            layer.weight[small] *= 1e-6
        block.conv2.weight[:, small] *= 1e-6
    result = prune_unet(model, PruneConfig(pruning_ratio=0.5))
    removed = [idx for name, _, idx in result.recipe["removed_channels"] if name == "down_blocks.0.resnets.0.conv1"]
    assert sorted(removed[0]) == small


def gradients(model: nn.Module, loss_at: LossAt, timesteps: range) -> None:
    for timestep in timesteps:
        loss_at(timestep).backward()


def count_calls(loss_at: LossAt, timesteps: list[int]) -> LossAt:
    def counted(timestep: int) -> torch.Tensor:
        timesteps.append(timestep)
        return loss_at(timestep)

    return counted


def test_diff_pruning_without_threshold_scores_by_all_noise_levels(configs: Any, make_loss: Any) -> None:
    """The naive twin: Torch-Pruning's own multivariable Taylor importance on gradients of every level."""
    import torch_pruning as tp

    config = configs["digits"]
    pruned_model, _ = prune(config, make_loss, pruner="diff-pruning", thr=0.0, pruning_ratio=0.5)
    twin = build_unet(config, opt_seed=3).eval()
    gradients(twin, make_loss(twin), range(N_TIMESTEPS))
    attention: Any = twin.get_submodule("mid_block.attentions.0")
    tp.pruner.MagnitudePruner(
        twin,
        {"sample": torch.zeros(1, 1, 8, 8), "timestep": torch.ones(1, dtype=torch.long)},  # pyright: ignore[reportArgumentType]
        importance=tp.importance.TaylorImportance(multivariable=True),
        pruning_ratio=0.5,
        ignored_layers=[twin.conv_out],
        num_heads={getattr(attention, name): attention.heads for name in ("to_q", "to_k", "to_v")},
        prune_head_dims=True,
    ).step()
    found, expected = pruned_model.state_dict(), twin.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_threshold_of_diff_pruning_ends_the_sum_of_gradients(configs: Any, make_loss: Any) -> None:
    """Fang et al. (2023): noise levels whose loss is below thr times the largest are left out."""
    config = configs["digits"]
    losses = [make_loss(build_unet(config, opt_seed=3).eval())(t).item() for t in range(N_TIMESTEPS)]
    # An untrained network errs equally everywhere; scale the losses so that they fall with the noise level.
    scales = [2.0**-t / loss for t, loss in enumerate(losses)]

    def run(pruner: PrunerName, thr: float, loss_scales: list[float]) -> tuple[list[int], Any]:
        model = build_unet(config, opt_seed=3).eval()
        loss, timesteps = make_loss(model), []
        scaled = count_calls(lambda timestep: loss(timestep) * loss_scales[timestep], timesteps)
        result = prune_unet(model, PruneConfig(pruner=pruner, thr=thr), loss_at=scaled, n_timesteps=N_TIMESTEPS)
        return timesteps, result.recipe["removed_channels"]

    everything, all_levels = run("diff-pruning", 0.0, scales)
    assert everything == list(range(N_TIMESTEPS))
    stopped, few_levels = run("diff-pruning", 0.2, scales)
    assert stopped == [0, 1, 2, 3]  # 1, 1/2, 1/4, and 1/8 < 0.2 ends it
    assert few_levels == run("diff-pruning", 0.0, [*scales[:3], *[0.0] * 5])[1]
    assert few_levels != all_levels
    assert run("taylor", 0.2, scales)[0] == everything  # only diff-pruning has a threshold
    assert run("diff-pruning", 1.0, scales)[0] == [0, 1]  # the largest loss itself always counts


@pytest.mark.parametrize("pruner", ["taylor", "diff-pruning"])
def test_scores_by_gradients_need_a_loss(configs: Any, pruner: PrunerName) -> None:
    with pytest.raises(ConfigError, match=rf"{pruner}.*expected loss_at, found None"):
        prune_unet(build_unet(configs["attention"]), PruneConfig(pruner=pruner))


def test_the_sum_over_noise_levels_is_thinned_to_a_hundred(configs: Any) -> None:
    model = build_unet(configs["attention"])
    timesteps: list[int] = []

    def loss_at(timestep: int) -> torch.Tensor:
        timesteps.append(timestep)
        return sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))

    prune_unet(model, PruneConfig(pruner="taylor"), loss_at=loss_at, n_timesteps=1000)
    assert timesteps == list(range(0, 1000, 10))


def test_a_recipe_of_another_architecture_is_refused(pruned: Any, configs: Any) -> None:
    recipe = pruned["attention", "magnitude"][1].recipe
    with pytest.raises(CheckpointError, match=r"names a layer that this architecture lacks: nowhere\.conv"):
        apply_recipe(build_unet(configs["attention"]), {**recipe, "widths": {"nowhere.conv": [3, 3]}})
    with pytest.raises(CheckpointError, match="attentions"):
        apply_recipe(build_unet(configs["digits"]), recipe)
    with pytest.raises(CheckpointError, match=r"version 99.*upgrade"):
        apply_recipe(build_unet(configs["attention"]), {**recipe, "version": 99})


def test_cifar_small_can_be_pruned() -> None:
    config = load_preset("cifar-small").unet
    model = build_unet(config)
    result = prune_unet(model, PruneConfig(pruning_ratio=0.3))
    assert result.n_macs[0] == pytest.approx(0.38e9, rel=0.05)  # 0.76 GFLOP
    assert result.n_parameters[1] < 0.6 * result.n_parameters[0]
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32), 5)[0].shape == (1, 3, 32, 32)
