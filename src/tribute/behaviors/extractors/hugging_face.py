"""CLIP and BLIP image encoders in the Hugging Face format, through transformers.

Images are prepared here, in torch: the processors of transformers would import torchvision where it is installed and
Pillow where it is not, and give different pixels. Weights are read from safetensors only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribute.behaviors.extractors.network import NetworkExtractor
from tribute.behaviors.extractors.weights import brief
from tribute.behaviors.features import content_hash
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError, ConfigError

if TYPE_CHECKING:
    import torch

_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_SD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (Radford et al. 2021); BLIP uses the same."""


_PUBLISHED = {
    "clip": ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),
    "blip": ("Salesforce/blip-vqa-base", "787b3d35d57e49572baabd22884b3d5a05acf072"),
}
"""Models of the hub, at the commits that hold their safetensors."""


def load_clip(features: FeatureConfig, device: str) -> NetworkExtractor:
    """`clip`: the projected image embedding of a CLIP model, by default ViT-L/14 with width 768.

    Images are scaled so that the shorter side fits, and cropped in the middle.

    Raises:
        ConfigError: A model of the hub is named without a commit.
        BehaviorError: transformers or the weights are missing, pickled or incomplete.
    """
    network, fingerprint = _load("clip", "CLIPVisionModelWithProjection", features, device)
    size = int(network.config.image_size)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return network(pixel_values=_normalised(_resized(pixels, size, crop=True))).image_embeds, None

    preparation = f"antialiased bicubic and centre crop to {size}x{size}"
    return NetworkExtractor("clip", fingerprint, preparation, forward, features.batch_size or 32, device)


def load_blip(features: FeatureConfig, device: str) -> NetworkExtractor:
    """`blip`: the pooled output of the image encoder of a BLIP model, by default that for visual questions.

    Images are scaled to the size of the network, whatever their shape.

    Raises:
        ConfigError: A model of the hub is named without a commit.
        BehaviorError: transformers or the weights are missing, pickled or incomplete.
    """
    network, fingerprint = _load("blip", "BlipVisionModel", features, device)
    size = int(network.config.image_size)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return network(pixel_values=_normalised(_resized(pixels, size, crop=False))).pooler_output, None

    preparation = f"antialiased bicubic to {size}x{size}"
    return NetworkExtractor("blip", fingerprint, preparation, forward, features.batch_size or 16, device)


def _resized(pixels: torch.Tensor, size: int, *, crop: bool) -> torch.Tensor:
    """`(b, 3, size, size)` float, whole numbers 0 to 255 as Pillow's resizing gives them."""
    from torch.nn import functional

    height, width = pixels.shape[2:]
    if crop:
        scale = size / min(height, width)
        target = (max(size, int(height * scale)), max(size, int(width * scale)))
    else:
        target = (size, size)
    resized = functional.interpolate(pixels.float(), target, mode="bicubic", antialias=True)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return resized[:, :, top : top + size, left : left + size].clamp(0, 255).round()


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    import torch

    mean, sd = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (_PIXEL_MEAN, _PIXEL_SD))
    return (pixels / 255 - mean) / sd


def _load(name: str, class_name: str, features: FeatureConfig, device: str) -> tuple[Any, str]:
    """The image encoder inside a model, in float32, and the SHA-256 of its weights.

    The hash is that of the encoder's tensors: a model with or without its text encoder is one extractor.
    """
    import torch

    network_class = _network_class(name, class_name)
    model, revision = _source(name, features)
    hint = f"--feature_models {name}=FOLDER, or features: {{models: {{{name}: FOLDER}}}} in a study"
    try:
        with _quiet():
            network, report = network_class.from_pretrained(
                model,
                revision=revision or "main",
                local_files_only=revision is None,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                # BLIP's encoder by itself has no prefix before its weights, inside another model it has.
                key_mapping={r"^vision_model\.": ""} if name == "blip" else None,
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{model}, revision {revision}, from the hub" if revision else f"folder {model}"
        raise BehaviorError(
            f"The extractor {name!r} cannot be loaded: {where} ({brief(error)}). Expected a "
            "model as save_pretrained writes it, with model.safetensors, for weights are never unpickled. Without "
            f"network, fetch the model elsewhere and name its folder: {hint}."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BehaviorError(
            f"The extractor {name!r}: {model} lacks {len(missing)} weights of the image encoder, such as {missing[0]}; "
            f"they would be random. Name a whole model of this kind: {hint}."
        )
    network.to(device).eval().requires_grad_(False)
    weights = {key: tensor.cpu().numpy() for key, tensor in sorted(network.state_dict().items())}
    return network, content_hash(name, *(part for item in weights.items() for part in item))


def _source(name: str, features: FeatureConfig) -> tuple[str, str | None]:
    """A folder and None, or the id of a model on the hub and its commit."""
    published, published_revision = _PUBLISHED[name]
    model, revision = features.models.get(name, published), features.revisions.get(name)
    if Path(model).is_dir():
        return model, None
    if model == published:
        revision = revision or published_revision
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConfigError(
            f"The extractor {name!r}: expected a folder, or a model of the hub with the 40 digits of a commit, so that "
            f"its weights stay the same; found model {model!r} with revision {revision!r}. Name a folder that exists, "
            f"or add --feature_revisions {name}=COMMIT."
        )
    return model, revision


def _network_class(name: str, class_name: str) -> Any:
    try:
        return getattr(import_module("transformers"), class_name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise BehaviorError(
            f"The extractor {name!r} needs transformers 5 or newer ({brief(error)}). Install it: "
            "pip install 'tribute[clip]'."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and the table of weights that are not used, such as those of the text encoder."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
