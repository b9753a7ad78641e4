"""Structural pruning: a smaller network that keeps the important channels of a trained one.

Torch-Pruning (Fang et al. 2023, DepGraph) finds which channels hang together; the importance of
a channel comes from one of five pruners. The result is described by a *recipe* of plain JSON, the
width of every layer and the channels removed, from which the architecture is rebuilt without a
pickle and without Torch-Pruning.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tribute import pulse
from tribute.config import PruneConfig
from tribute.errors import CheckpointError, ConfigError
from tribute.models.build import count_parameters
from tribute.seeding import stream_seed

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

RECIPE_VERSION = 1
_N_GRADIENT_TIMESTEPS = 100
"""Noise levels whose gradients score the channels; the published code uses all 1,000 at ten times the cost."""


@dataclass(frozen=True)
class PruningResult:
    """What pruning did to a model.

    Attributes:
        recipe: JSON-able description of the pruned architecture, for `apply_recipe`.
        n_parameters: Before and after.
        n_macs: Multiply-accumulates of one forward pass of one image, before and after.
    """

    recipe: dict[str, Any]
    n_parameters: tuple[int, int]
    n_macs: tuple[int, int]

    def summary(self) -> dict[str, Any]:
        """The figures to print and store."""
        return {
            "n_parameters": {"before": self.n_parameters[0], "after": self.n_parameters[1]},
            "n_macs": {"before": self.n_macs[0], "after": self.n_macs[1]},
        }


def prune_unet(
    model: UNet2DModel,
    config: PruneConfig,
    *,
    loss_at: Callable[[int], torch.Tensor] | None = None,
    n_timesteps: int = 1000,
) -> PruningResult:
    """Prune a UNet in place.

    Args:
        model: Trained; ends pruned. `conv_out` keeps its width.
        config: `pruning_ratio` is the fraction of channels REMOVED per layer.
        loss_at: Mean loss of the model on fixed training images and noise at a timestep; its gradients
            score the channels for the pruners `taylor` and `diff-pruning`.
        n_timesteps: Number of noise levels that `loss_at` knows.

    References:
        Magnitude: Li et al. (2017). Taylor: Molchanov et al. (2019). diff-pruning: Fang et al. (2023),
        whose threshold ignores the noise levels at which the loss is small.
    """
    import torch_pruning as tp

    example = _example_inputs(model)
    n_parameters, n_macs = count_parameters(model), count_macs(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "pruner"))
        if config.pruner in ("taylor", "diff-pruning"):
            if loss_at is None:
                raise ConfigError(f"pruner {config.pruner} scores channels by gradients: expected loss_at, found None")
            _accumulate_gradients(model, config, loss_at, n_timesteps)
            importance = tp.importance.TaylorImportance(multivariable=config.pruner == "diff-pruning")
        elif config.pruner == "magnitude":
            importance = tp.importance.MagnitudeImportance()
        else:
            importance = tp.importance.RandomImportance()
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,  # pyright: ignore[reportArgumentType]  # a mapping of keyword inputs, as its documentation says
            importance=importance,
            iterative_steps=1,
            pruning_ratio=config.pruning_ratio,
            ignored_layers=[model.conv_out],
            num_heads=_num_heads(model),
            prune_head_dims=True,
        )
        if config.pruning_ratio > 0:
            pruner.step()
        _update_resamplers(model)
        if config.pruner == "reinit":
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
                    module.reset_parameters()
    model.zero_grad(set_to_none=True)
    removed = [[name, bool(is_out), [int(i) for i in idx]] for name, is_out, idx in pruner.pruning_history()]
    recipe = {
        "version": RECIPE_VERSION,
        "settings": config.model_dump(mode="json"),
        "widths": dict(_widths(model)),
        "removed_channels": removed,
    }
    return PruningResult(
        recipe=recipe,
        n_parameters=(n_parameters, count_parameters(model)),
        n_macs=(n_macs, count_macs(model)),
    )


def apply_recipe(model: UNet2DModel, recipe: dict[str, Any]) -> None:
    """Give a freshly built, unpruned UNet the widths of a recipe, in place; its weights become placeholders.

    Raises:
        CheckpointError: The recipe is of a newer version or names layers that the model lacks.
    """
    if recipe.get("version", 0) > RECIPE_VERSION:
        raise CheckpointError(
            f"pruning.json has version {recipe['version']}, this version reads up to {RECIPE_VERSION}; upgrade Tribute"
        )
    for name, width in recipe["widths"].items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"pruning.json names a layer that this architecture lacks: {name}") from error
        if isinstance(layer, nn.Conv2d):
            _resize_conv(layer, *width)
        elif isinstance(layer, nn.Linear):
            _resize_linear(layer, *width)
        elif isinstance(layer, nn.GroupNorm):
            _resize_group_norm(layer, *width)
        elif isinstance(layer, nn.Embedding):
            _resize_embedding(layer, *width)
    _update_resamplers(model)


def count_macs(model: UNet2DModel) -> int:
    """Multiply-accumulates of one forward pass of one image."""
    import torch_pruning as tp

    was_training = model.training
    with contextlib.redirect_stdout(io.StringIO()):  # it warns on stdout about keyword inputs
        macs = tp.utils.count_ops_and_params(model.eval(), _example_inputs(model))[0]
    model.train(was_training)
    return int(macs)


def _example_inputs(model: UNet2DModel) -> dict[str, torch.Tensor]:
    """One image and one timestep, on the model's device."""
    device = next(model.parameters()).device
    size = model.config["sample_size"]
    inputs = {
        "sample": torch.zeros(1, model.config["in_channels"], size, size, device=device),
        "timestep": torch.ones(1, dtype=torch.long, device=device),
    }
    if model.config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    return inputs


def _num_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Heads of every attention projection: without them a pruned width may not divide by the heads."""
    from diffusers.models.attention_processor import Attention

    return {
        layer: module.heads
        for module in model.modules()
        if isinstance(module, Attention)
        for layer in (module.to_q, module.to_k, module.to_v)
        if layer is not None
    }


def _update_resamplers(model: nn.Module) -> None:
    """Resamplers check their input against `channels` in the forward pass."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    for module in model.modules():
        if isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels = module.conv.in_channels
            module.out_channels = module.conv.out_channels


def _accumulate_gradients(
    model: nn.Module, config: PruneConfig, loss_at: Callable[[int], torch.Tensor], n_timesteps: int
) -> None:
    """Sum loss gradients over noise levels, from little noise (large loss) to much."""
    model.zero_grad()
    largest_loss = 0.0
    for timestep in range(0, n_timesteps, max(1, n_timesteps // _N_GRADIENT_TIMESTEPS)):
        pulse.beat()
        loss = loss_at(timestep)
        largest_loss = max(largest_loss, loss.item())
        if config.pruner == "diff-pruning" and loss.item() < largest_loss * config.thr:
            break
        loss.backward()


def _widths(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Name and widths of every layer that pruning can change."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            yield name, [layer.in_channels, layer.out_channels]
        elif isinstance(layer, nn.Linear):
            yield name, [layer.in_features, layer.out_features]
        elif isinstance(layer, nn.GroupNorm):
            yield name, [layer.num_groups, layer.num_channels]
        elif isinstance(layer, nn.Embedding):
            yield name, [layer.num_embeddings, layer.embedding_dim]


def _resize_conv(layer: nn.Conv2d, n_in: int, n_out: int) -> None:
    layer.in_channels, layer.out_channels = n_in, n_out
    layer.weight = nn.Parameter(torch.zeros(n_out, n_in, *layer.kernel_size))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(n_out))


def _resize_linear(layer: nn.Linear, n_in: int, n_out: int) -> None:
    layer.in_features, layer.out_features = n_in, n_out
    layer.weight = nn.Parameter(torch.zeros(n_out, n_in))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(n_out))


def _resize_group_norm(layer: nn.GroupNorm, n_groups: int, n_channels: int) -> None:
    layer.num_groups, layer.num_channels = n_groups, n_channels
    layer.weight = nn.Parameter(torch.ones(n_channels))
    layer.bias = nn.Parameter(torch.zeros(n_channels))


def _resize_embedding(layer: nn.Embedding, n_rows: int, width: int) -> None:
    layer.num_embeddings, layer.embedding_dim = n_rows, width
    layer.weight = nn.Parameter(torch.zeros(n_rows, width))
