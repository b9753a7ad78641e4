"""Training of the in-domain classifier: the held-out part, augmentation, the loop, and the score."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from tribute import pulse
from tribute.behaviors.classifier_networks import BATCH_IMAGES, Architecture, ClassifierRecipe, forward
from tribute.behaviors.features import features_batch
from tribute.data.tensors import gather
from tribute.seeding import numpy_stream, stream_seed, torch_stream
from tribute.types import Images

if TYPE_CHECKING:
    import torch
    from torch import nn

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 20.0
_N_WHITENING_IMAGES = 5_000
_BIAS_STEP = 64


def train_classifier(
    images: Images, labels: npt.NDArray[np.int64], seed: int, device: str, recipe: ClassifierRecipe
) -> tuple[Architecture, dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Train on all but the held-out part; returns architecture, weights, and the score on that part."""
    import torch
    from torch.nn import functional

    held_out = held_out_mask(labels, recipe.held_out_share, seed)
    train_rows = np.flatnonzero(~held_out)
    mean, sd = pixel_moments(images, train_rows)
    n_classes = int(labels.max()) + 1
    height, width, channels = images.shape[1:]
    architecture = Architecture(
        (height, width, channels), n_classes, recipe.embedding_width, mean, sd, recipe.stage_widths
    )
    with _forked_initialisation(stream_seed(seed, "behaviors/classifier/weights")):
        network = architecture.build().to(device).train()
    if recipe.stage_widths:
        _whiten(network, architecture, images, train_rows, seed)
        _pass_through(network)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = _build_optimizer(network, recipe)

    n_steps, batch_size = recipe.n_steps(len(train_rows)), min(recipe.batch_size, len(train_rows))
    n_batches, n_warm_up = len(train_rows) // batch_size, max(1, n_steps // 5)
    half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.bfloat16 and fast_bfloat16(device))
    progress = _Progress(n_steps)
    order = np.empty(0, np.int64)
    for step in range(n_steps):
        pulse.beat()
        epoch, batch_idx = divmod(step, n_batches)
        if batch_idx == 0:
            order = numpy_stream(seed, "behaviors/classifier/order", epoch).permutation(train_rows)
        rows = np.sort(order[batch_idx * batch_size : (batch_idx + 1) * batch_size])
        pixels = augment(architecture.pixels(gather(images, rows), device), seed, step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min((step + 1) / n_warm_up, (n_steps - step) / (n_steps - n_warm_up + 1))
        with half:
            logits = network["head"](network["trunk"](pixels))
        targets = torch.from_numpy(labels[rows]).to(device)
        loss = functional.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.report(step + 1)

    network.eval()
    held_rows = np.flatnonzero(held_out)
    _, probabilities = forward(network, architecture, gather(images, held_rows), device, features_batch(BATCH_IMAGES))
    accuracy = float((probabilities.argmax(axis=1) == labels[held_rows]).mean())
    _log.info(
        "Classifier trained in %d steps, %.0f s: accuracy %.4f on %d held out",
        *(n_steps, progress.elapsed(), accuracy, len(held_rows)),
    )
    _warn_if_poor(accuracy, n_classes)
    weights = {name: value.detach().cpu().contiguous().numpy() for name, value in network.state_dict().items()}
    return architecture, weights, {"held_out_accuracy": accuracy, "n_held_out": len(held_rows)}


def _build_optimizer(network: nn.ModuleDict, recipe: ClassifierRecipe) -> torch.optim.Optimizer:
    """AdamW, or stochastic gradient descent with large steps for the biases of normalisation, whose scale is fixed.

    References:
        Jordan (2024), "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.4, for the step of the biases.
    """
    import torch
    from torch import nn

    def group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
        return {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}

    lr, decay = recipe.learning_rate, recipe.weight_decay
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not recipe.momentum:
        return torch.optim.AdamW([group(trained, lr, decay)], betas=(0.9, recipe.beta2))
    biases = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.requires_grad_(False)
            biases.append(layer.bias)
    known = {id(bias) for bias in biases}
    others = [parameter for parameter in trained if parameter.requires_grad and id(parameter) not in known]
    groups = [group(biases, _BIAS_STEP * lr, decay / _BIAS_STEP), group(others, lr, decay)]
    return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True)


def _pass_through(network: nn.ModuleDict) -> None:
    """Let each 3x3 convolution begin by handing its inputs on; only its further channels keep their random weights.

    Whitened pixels then reach the head at once, and fewer passes are needed (Jordan 2024).
    """
    from torch import nn

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            nn.init.dirac_(layer.weight.data[: layer.in_channels])


def _warn_if_poor(accuracy: float, n_classes: int) -> None:
    """Log a warning if `accuracy` is less than half way from chance to 1."""
    if accuracy < (1 + 1 / n_classes) / 2:
        _log.warning(
            "The classifier labels only %.1f %% of the images held out rightly (%d classes). Behaviors that rest on it "
            "say little: use more images, or another feature extractor.",
            *(100 * accuracy, n_classes),
        )


class _Progress:
    """Says now and then how long the training still takes."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self._start = self._reported = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.monotonic() - self._start

    def report(self, n_done: int) -> None:
        """Log a line if the last one is some time ago."""
        if time.monotonic() - self._reported < _SECONDS_BETWEEN_REPORTS:
            return
        self._reported = time.monotonic()
        left = self.elapsed() * (self.n_steps - n_done) / n_done
        _log.info("Classifier: step %d of %d, about %.0f s left", n_done, self.n_steps, left)


def fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 in hardware; elsewhere it is emulated, and slower than float32."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so perhaps gone in some version
    return device == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def _whiten(
    network: nn.ModuleDict, architecture: Architecture, images: Images, rows: npt.NDArray[np.intp], seed: int
) -> None:
    """Set and freeze the first convolution: patches of real images times it are uncorrelated, of variance 1.

    Each component occurs with both signs, as the activation that follows keeps one only.
    """
    import torch
    from torch import nn

    layers = list(network["trunk"].children())
    first = next(idx for idx, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
    convolution = cast("nn.Conv2d", layers[first])
    drawn = numpy_stream(seed, "behaviors/classifier/whitening").permutation(rows)[:_N_WHITENING_IMAGES]
    with torch.no_grad():
        pixels = architecture.pixels(gather(images, np.sort(drawn)), "cpu").double()
        for layer in layers[:first]:
            pixels = layer(pixels)
        patches = pixels.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(-1, *convolution.weight.shape[1:])
        convolution.weight.copy_(torch.cat([filters, -filters]))
        cast("torch.Tensor", convolution.bias).zero_()
    convolution.weight.requires_grad_(False)


def held_out_mask(labels: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """`(n_images,)`; True for `share` of each class, at least one image and never all."""
    held_out = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n_held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
        stream = numpy_stream(seed, "behaviors/classifier/held_out", int(label))
        held_out[stream.permutation(rows)[:n_held_out]] = True
    return held_out


def pixel_moments(images: Images, rows: npt.NDArray[np.intp]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over `rows`, read in blocks."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for block in np.array_split(rows, len(rows) // 1024 + 1):
        pixels = gather(images, block)
        for channel in range(images.shape[3]):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ np.arange(256.0)
    variance = (shares * (np.arange(256.0) - mean[:, None]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, 1.0)).tolist())


def augment(pixels: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Shift each image by up to an eighth of its size, repeating its edge; mirror half of the colour images.

    One channel usually means writing or scans, which have a handedness.
    """
    import torch
    from torch.nn import functional

    n_images, n_channels, height, width = pixels.shape
    stream = torch_stream(seed, "behaviors/classifier/augmentation", step)
    reach = (height // 8, width // 8)
    padded = functional.pad(pixels, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    top, left = (torch.randint(2 * r + 1, (n_images, 1), generator=stream) for r in reach)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (b, h), (b, w)
    if n_channels == 3:
        mirrored = torch.rand(n_images, 1, generator=stream) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n_images)[:, None, None]
    shifted = padded[image, :, rows[:, :, None], columns[:, None, :]]  # (b, h, w, c)
    return shifted.permute(0, 3, 1, 2).contiguous()


@contextlib.contextmanager
def _forked_initialisation(seed: int) -> Iterator[None]:
    """Seed the initialisation of layers, which takes no generator; the global state is restored after."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also reseed every GPU
        yield
