"""Feature extractors by name: who makes them, and what they need. Nothing heavy is imported before one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from tribute.behaviors.features import FeatureExtractor
from tribute.config import FeatureConfig
from tribute.errors import ConfigError

ExtractorFactory = Callable[[FeatureConfig, str], FeatureExtractor]
"""Makes an extractor from the settings, on a torch device."""

CLASSIFIER = "classifier"
"""The in-domain classifier: not made here, as it is trained on the dataset."""

WITHOUT_CLASSES = frozenset({"vgg16", "clip", "blip"})
"""Those that give embeddings only, no class probabilities."""

_SETTINGS = {"weights": ("inception", "vgg16"), "models": ("clip", "blip"), "revisions": ("clip", "blip")}
"""What can be set of which extractor; of registered ones, everything."""

_REGISTRY: dict[str, str | ExtractorFactory] = {
    "inception": "tribute.behaviors.extractors.fidelity:load_inception",
    "vgg16": "tribute.behaviors.extractors.fidelity:load_vgg16",
    "clip": "tribute.behaviors.extractors.hugging_face:load_clip",
    "blip": "tribute.behaviors.extractors.hugging_face:load_blip",
}


def extractor_names() -> list[str]:
    """Names that may stand after the @ of a behavior."""
    return sorted([CLASSIFIER, *_REGISTRY])


def register_extractor(name: str, factory: str | ExtractorFactory) -> None:
    """Make a feature extractor known by name, for behaviors such as `fid@NAME`.

    Args:
        name: New, and without `@`, `:` and commas.
        factory: Makes it; a string `module:factory` is imported on first use.

    Raises:
        ConfigError: The name is taken or has a sign that separates names.
    """
    if name in (*extractor_names(), "default", "") or set("@:,") & set(name):
        raise ConfigError(
            f"An extractor's name must be new and without @, : and commas; found {name!r}. "
            f"Taken are {', '.join(extractor_names())}."
        )
    _REGISTRY[name] = factory


def check_settings(features: FeatureConfig) -> None:
    """Refuse an extractor that is unknown, or settings that none would read.

    Raises:
        ConfigError: The message names the setting and what may stand there.
    """
    if features.extractor not in extractor_names():
        raise ConfigError(
            f"features.extractor: expected one of {', '.join(extractor_names())}; found {features.extractor!r}"
        )
    registered = _REGISTRY.keys() - {name for names in _SETTINGS.values() for name in names}
    for setting, names in _SETTINGS.items():
        known = sorted({*names, *registered})
        if wrong := sorted(getattr(features, setting).keys() - set(known)):
            raise ConfigError(f"features.{setting}: expected extractors {', '.join(known)}; found {', '.join(wrong)}")


def load_extractor(name: str, features: FeatureConfig, device: str = "cpu") -> FeatureExtractor:
    """Load a pretrained extractor.

    Args:
        name: One of `extractor_names` but the classifier, which `train_or_load_classifier` makes.
        features: Where its weights are.
        device: Any torch device.

    Raises:
        ConfigError: The name is unknown, or a setting does not fit it.
        BehaviorError: A package or the weights are missing; the message says what to install or to give.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"Unknown feature extractor {name!r}. Known are {', '.join(extractor_names())}.")
    factory = _REGISTRY[name]
    if isinstance(factory, str):
        module_name, _, attribute = factory.partition(":")
        factory = getattr(import_module(module_name), attribute)
    return factory(features, device)
