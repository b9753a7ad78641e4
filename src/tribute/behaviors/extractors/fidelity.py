"""The networks of published scores, from torch-fidelity: InceptionV3 as ported from TensorFlow, and VGG16.

torch-fidelity (the extra `tribute[fidelity]`) supplies architecture and preparation, and imports torchvision, which
must be built for the installed torch. So it is imported here and nowhere else, when one of its networks is asked for.
It would unpickle weights; they are read here, safely, and handed to it from memory.
"""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribute.behaviors.extractors.network import NetworkExtractor
from tribute.behaviors.extractors.weights import brief, read_weights
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError
from tribute.files import sha256_of_file

if TYPE_CHECKING:
    import torch

_MODULES = {"inception": "feature_extractor_inceptionv3", "vgg16": "feature_extractor_vgg16"}

_DOWNLOADS = {
    "inception": (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "vgg16": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
}
"""Where weights come from if no file is given, and how their SHA-256 begins."""

_INSTALL = (
    "Install torch-fidelity with the torchvision that the release notes of torchvision pair with torch {torch}, from "
    "the index that torch came from (both CPU builds, or both for one CUDA version): "
    "pip install 'tribute[fidelity]' torchvision==VERSION; with torch 2.14.1 VERSION is 0.29.1"
)


def load_inception(features: FeatureConfig, device: str) -> NetworkExtractor:
    """`inception`: 2,048 pooled activations, and probabilities of 1,008 classes.

    As in TensorFlow's Inception Score, the classes' logits are without their bias.

    Raises:
        BehaviorError: A package or the weights are missing, or do not fit.
    """
    from torch.nn import functional

    network, sha256 = _load("inception", "FeatureExtractorInceptionV3", ["2048", "logits_unbiased"], features, device)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, logits = network(pixels)
        return pooled, functional.softmax(logits, dim=1)

    preparation = "TensorFlow 1 bilinear to 299x299"
    return NetworkExtractor("inception", sha256, preparation, forward, features.batch_size or 64, device)


def load_vgg16(features: FeatureConfig, device: str) -> NetworkExtractor:
    """`vgg16`: 4,096 activations of the second hidden dense layer, as published with improved precision and recall.

    Raises:
        BehaviorError: A package or the weights are missing, or do not fit.
    """
    network, sha256 = _load("vgg16", "FeatureExtractorVGG16", ["fc2_relu"], features, device)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return network(pixels)[0], None

    preparation = "TensorFlow 1 bilinear to 224x224"
    return NetworkExtractor("vgg16", sha256, preparation, forward, features.batch_size or 64, device)


def _load(
    name: str, class_name: str, layers: list[str], features: FeatureConfig, device: str
) -> tuple[torch.nn.Module, str]:
    """The network of torch-fidelity with weights from a file, and the SHA-256 of that file."""
    import torch

    network_class = _network_class(name, class_name)
    path = features.weights.get(name) or _downloaded(name)
    in_memory = io.BytesIO()
    torch.save(read_weights(path), in_memory)
    in_memory.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # the network draws initial weights before it loads these
            network = network_class(name, layers, feature_extractor_weights_path=in_memory)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise BehaviorError(
            f"The weights {path} do not fit the network {name!r} of torch-fidelity ({brief(error)}). Give the file "
            f"from {_DOWNLOADS[name][0]}."
        ) from error
    return network.to(device).eval().requires_grad_(False), sha256_of_file(path)


def _network_class(name: str, class_name: str) -> Any:
    """A class of torch-fidelity, whose import imports torchvision."""
    import torch

    try:
        module = import_module(f"torch_fidelity.{_MODULES[name]}")
        return getattr(module, class_name)
    except Exception as error:  # a torchvision that is built for another torch raises RuntimeError, OSError or others
        raise BehaviorError(
            f"The extractor {name!r} needs torch-fidelity 0.4 or newer and torchvision, which cannot be imported here "
            f"({brief(error)}). {_INSTALL.format(torch=torch.__version__)}."
        ) from error


def _downloaded(name: str) -> Path:
    """The published weights in PyTorch's own cache of downloads."""
    import torch

    url, hash_start = _DOWNLOADS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_start, progress=False)
        except (OSError, RuntimeError) as error:
            raise BehaviorError(
                f"The weights of {name!r} are not at hand and could not be downloaded ({brief(error)}). Fetch {url} "
                f"on a machine with network, and give the file: --feature_weights {name}=PATH, or "
                f"features: {{weights: {{{name}: PATH}}}} in a study."
            ) from error
    if not (found := sha256_of_file(path)).startswith(hash_start):
        raise BehaviorError(
            f"{path} should have a SHA-256 that begins with {hash_start}; found {found[:12]}. Remove it, and it is "
            "downloaded again."
        )
    return path
