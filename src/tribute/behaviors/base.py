"""What a model behavior is, how one is found by name, and how several are measured in one feature pass."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol, TypeVar

import numpy as np

from tribute.behaviors.extractors import WITHOUT_CLASSES, extractor_names
from tribute.behaviors.features import FeatureExtractor, Features, check_images
from tribute.behaviors.reference import Reference, Statistic
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError, ConfigError, MixedResultsError
from tribute.types import Images

__all__ = [
    "DEFAULT_EXTRACTOR",
    "GLOBAL_BEHAVIORS",
    "CallableBehavior",
    "ModelBehavior",
    "Reference",
    "Statistic",
    "behavior_names",
    "behavior_variant",
    "check_behaviors",
    "check_enough_images",
    "extractor_of",
    "get_behavior",
    "measure_behaviors",
    "register_behavior",
    "uses_reference",
]

GLOBAL_BEHAVIORS = ("inception_score", "fid", "kid", "precision", "recall", "entropy")
"""The behaviors of all generated images together that `--model_behavior global` measures."""

DEFAULT_EXTRACTOR = "default"
"""Stands for whatever extractor a study chose for behaviors that name none."""


class ModelBehavior(Protocol):
    """A scalar that describes the images a model generates; raw, never negated.

    One file with such a class and one line in `_REGISTRY` (or a call of `register_behavior`) add a behavior.

    Five more members are optional. `extractor`, the name of the feature extractor it is defined for; without it, the
    study's. `uses_reference`, False if no real images are looked at. `uses_probabilities`, True if it needs an
    extractor that classifies. `frozen(reference)`, text that identifies what
    was chosen by looking at the real images; it ends the variant. `with_settings(features)`, which returns the
    behavior with what a `FeatureConfig` says of it.
    """

    @property
    def name(self) -> str:
        """Under which the value is stored."""
        ...

    @property
    def unit(self) -> str:
        """Unit of the value, e.g. `bits`; empty if it has none."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """The direction."""
        ...

    @property
    def min_images(self) -> int:
        """Fewest generated images for which the value is defined."""
        ...

    @property
    def variant(self) -> str:
        """The settings that make values comparable, e.g. `10 splits`."""
        ...

    @property
    def uses_features(self) -> bool:
        """Whether `measure` looks at more than the pixels."""
        ...

    def measure(self, generated: Features, reference: Reference) -> float:
        """The value for the generated images."""
        ...


@dataclass(frozen=True)
class CallableBehavior:
    """A user's function `images -> float` as a behavior.

    The function gets a copy of the generated images, `(n_images, height, width, channels)` uint8.
    """

    function: Callable[[Images], float]
    name: str
    higher_is_better: bool = True
    min_images: int = 1
    unit: str = ""
    uses_features: bool = False

    @property
    def variant(self) -> str:
        """A hash of the function's source, so that values of an edited function are told apart."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            return "user function"
        return f"user function {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def measure(self, generated: Features, reference: Reference) -> float:
        """Call the function.

        Raises:
            BehaviorError: It raises, or does not return a real number.
        """
        try:
            value = self.function(generated.images.copy())
        except Exception as error:  # whatever a user's function raises, the message names the function
            raise BehaviorError(
                f"Behavior {self.name!r} raised {type(error).__name__}: {error}. It is called with uint8 "
                f"images of shape {generated.images.shape} and must return a float. Correct the function."
            ) from error
        if not isinstance(value, Real) or isinstance(value, bool):
            raise BehaviorError(
                f"Behavior {self.name!r} must return a float; it returned {type(value).__name__} "
                f"{value!r:.60}. End the function with `return float(...)`."
            )
        return float(value)


@dataclass(frozen=True)
class SeenBy:
    """A behavior of the features of a certain extractor, whatever the study's is: `fid@clip`."""

    behavior: ModelBehavior
    extractor: str

    @property
    def name(self) -> str:
        return f"{self.behavior.name}@{self.extractor}"

    @property
    def unit(self) -> str:
        return self.behavior.unit

    @property
    def higher_is_better(self) -> bool:
        return self.behavior.higher_is_better

    @property
    def min_images(self) -> int:
        return self.behavior.min_images

    @property
    def variant(self) -> str:
        return self.behavior.variant

    @property
    def uses_features(self) -> bool:
        return self.behavior.uses_features

    @property
    def uses_reference(self) -> bool:
        return uses_reference(self.behavior)

    @property
    def uses_probabilities(self) -> bool:
        return uses_probabilities(self.behavior)

    def measure(self, generated: Features, reference: Reference) -> float:
        return self.behavior.measure(generated, reference)

    @property
    def frozen(self) -> Callable[[Reference], str] | None:
        return getattr(self.behavior, "frozen", None)

    def with_settings(self, features: FeatureConfig) -> SeenBy:
        configure = getattr(self.behavior, "with_settings", None)
        return self if configure is None else replace(self, behavior=configure(features))


_REGISTRY: dict[str, str | Callable[[], ModelBehavior]] = {
    "inception_score": "tribute.behaviors.inception:InceptionScore",
    "fid": "tribute.behaviors.inception:FrechetDistance",
    "kid": "tribute.behaviors.inception:KernelDistance",
    "precision": "tribute.behaviors.precision_recall:Precision",
    "recall": "tribute.behaviors.precision_recall:Recall",
    "entropy": "tribute.behaviors.diversity:ClusterEntropy",
    "diversity": "tribute.behaviors.diversity:published_diversity",
    "vendi": "tribute.behaviors.diversity:VendiScore",
    "aesthetic_score": "tribute.behaviors.aesthetic:AestheticScore",
}
_FAMILIES: dict[str, tuple[re.Pattern[str], str]] = {
    "inception_score_N": (re.compile(r"inception_score_([1-9]\d*)"), "tribute.behaviors.inception:InceptionScore"),
    "aesthetic_score_pNN": (re.compile(r"aesthetic_score_p(\d+)"), "tribute.behaviors.aesthetic:AestheticScore"),
}
"""Behaviors with a whole number in their names, which their class takes as its first argument."""

_ALIASES = {"is": "inception_score", "fid_value": "fid", "diversity_score": "entropy"}


def behavior_names() -> list[str]:
    """Names that `get_behavior` knows, without aliases."""
    return sorted(_REGISTRY)


def register_behavior(name: str, factory: str | Callable[[], ModelBehavior], *, aliases: Sequence[str] = ()) -> None:
    """Make a behavior known by name.

    Args:
        name: As in `ModelBehavior.name`.
        factory: Makes the behavior; a string `module:factory` is imported on first use.
        aliases: Further names that `get_behavior` accepts.

    Raises:
        ConfigError: A name is taken, or has a colon or an @.
    """
    for new in (name, *aliases):
        if ":" in new or "@" in new or new in _REGISTRY or new in _ALIASES:
            raise ConfigError(
                f"A behavior's name must be new and without : and @; found {new!r}. "
                f"Taken are {', '.join(sorted([*_REGISTRY, *_ALIASES]))}."
            )
    _REGISTRY[name] = factory
    _ALIASES.update(dict.fromkeys(aliases, name))


def get_behavior(
    name: str, *, higher_is_better: bool | None = None, features: FeatureConfig | None = None
) -> ModelBehavior:
    """Find a behavior by its name or alias, or make one of a user's function.

    Args:
        name: A known name, `fid@clip` for a known behavior of the features of a certain extractor, or
            `module:function`, `module:function:higher` or `module:function:lower` for any importable function of
            images. Without a direction, higher is better.
        higher_is_better: The direction of a user's function, if `name` does not say it.
        features: Settings for behaviors that need a file of their own.

    Raises:
        ConfigError: The name is unknown, or a direction is not one or contradicts the other.
        BehaviorError: The user's function cannot be imported or is not callable, or a file is missing.
    """
    if ":" in name:
        return _user_behavior(name, higher_is_better)
    known, _, extractor = name.partition("@")
    behavior = _known_behavior(_ALIASES.get(known, known))
    if behavior is None:
        raise ConfigError(
            f"Unknown behavior {known!r}. Known are {', '.join(sorted([*_REGISTRY, *_FAMILIES, *_ALIASES]))}; "
            f"or give a function of your own as module:function."
        )
    if "@" in name:
        if extractor not in extractor_names() or not behavior.uses_features:
            raise ConfigError(
                f"Behavior {name!r}: expected one of the feature extractors {', '.join(extractor_names())} after the "
                f"@ of a behavior that uses features; found {extractor!r}. Correct it, or leave it out for the "
                "study's own."
            )
        behavior = SeenBy(behavior, extractor)
    if higher_is_better not in (None, behavior.higher_is_better):
        raise ConfigError(
            f"Behavior {name!r} has a fixed direction, {_direction(behavior.higher_is_better)} is better; "
            f"found {_direction(not behavior.higher_is_better)}. Leave the direction out."
        )
    configure = getattr(behavior, "with_settings", None)
    return behavior if configure is None or features is None else configure(features)


def _known_behavior(name: str) -> ModelBehavior | None:
    if name in _REGISTRY:
        factory = _REGISTRY[name]
        return (_import_attribute(factory) if isinstance(factory, str) else factory)()
    for pattern, location in _FAMILIES.values():
        if match := pattern.fullmatch(name):
            return _import_attribute(location)(int(match[1]))
    return None


def _user_behavior(name: str, higher_is_better: bool | None) -> CallableBehavior:
    """`module:function[:higher|lower]` as a behavior."""
    module_name, function_name, *direction = name.split(":")
    if len(direction) > 1 or (direction and direction[0] not in ("higher", "lower")):
        raise ConfigError(
            f"A behavior of your own is module:function, module:function:higher or module:function:lower; "
            f"found {name!r}."
        )
    if direction:
        stated = direction[0] == "higher"
        if higher_is_better not in (None, stated):
            raise ConfigError(
                f"Behavior {name!r} says {direction[0]} is better, but higher_is_better is "
                f"{higher_is_better}. State the direction once."
            )
        higher_is_better = stated
    function = _import_attribute(f"{module_name}:{function_name}")
    return CallableBehavior(function, f"{module_name}:{function_name}", higher_is_better is not False)


def _import_attribute(location: str) -> Callable[..., Any]:
    """The callable at `module:attribute`."""
    module_name, _, attribute = location.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the module, which can raise anything
        raise BehaviorError(
            f"Behavior {location!r}: module {module_name!r} cannot be imported ({type(error).__name__}: "
            f"{error}). Check the spelling, and that its folder is on PYTHONPATH."
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise BehaviorError(
            f"Behavior {location!r}: module {module_name!r} ({getattr(module, '__file__', 'built in')}) has "
            f"no {attribute!r}. Check the spelling."
        ) from error
    if not callable(found):
        raise BehaviorError(
            f"Behavior {location!r} must be a function of images; found {type(found).__name__}. Name a function."
        )
    return found


def _direction(higher_is_better: bool) -> str:
    return "higher" if higher_is_better else "lower"


def extractor_of(behavior: ModelBehavior) -> str:
    """Name of the extractor whose features `behavior` looks at; `DEFAULT_EXTRACTOR` if it names none."""
    return getattr(behavior, "extractor", None) or DEFAULT_EXTRACTOR


def uses_reference(behavior: ModelBehavior) -> bool:
    """Whether `behavior` compares with features of real images."""
    return behavior.uses_features and getattr(behavior, "uses_reference", True)


def uses_probabilities(behavior: ModelBehavior) -> bool:
    """Whether `behavior` needs an extractor that classifies."""
    return behavior.uses_features and getattr(behavior, "uses_probabilities", False)


def check_behaviors(behaviors: Sequence[ModelBehavior], *, default_extractor: str | None = None) -> None:
    """Refuse behaviors that cannot be measured together, or not through their extractors.

    Args:
        behaviors: To be measured.
        default_extractor: Extractor of those that name none; None leaves that open.

    Raises:
        ConfigError: Two have one name, or one needs class probabilities that its extractor does not give.
    """
    names = [behavior.name for behavior in behaviors]
    if len(set(names)) < len(names):
        raise ConfigError(f"Each behavior is measured once; found {', '.join(names)}. Remove the repeated ones.")
    for behavior in behaviors:
        name = extractor_of(behavior)
        name = default_extractor if name == DEFAULT_EXTRACTOR else name
        if uses_probabilities(behavior) and name in WITHOUT_CLASSES:
            raise ConfigError(
                f"Behavior {behavior.name!r} needs class probabilities; the feature extractor {name!r} has none. "
                "Choose one that classifies, as in inception_score@inception, or another behavior."
            )


def check_enough_images(behaviors: Sequence[ModelBehavior], n_images: int) -> None:
    """Refuse fewer images than a behavior needs.

    Raises:
        BehaviorError: There are fewer.
    """
    for behavior in behaviors:
        if n_images < behavior.min_images:
            raise BehaviorError(
                f"Behavior {behavior.name!r} ({behavior.variant}) needs at least {behavior.min_images} "
                f"images; found {n_images}. Generate more images, or leave this behavior out."
            )


def behavior_variant(
    behavior: ModelBehavior, extractor: FeatureExtractor | None, reference: Reference | None = None
) -> str:
    """What makes values of `behavior` comparable, to be stored with them.

    That is: the extractor, the start of its hash, how it prepares images; the behavior's settings; and what the
    behavior froze of the `reference`, if it is given and the behavior freezes anything.
    """
    if not behavior.uses_features or extractor is None:
        return behavior.variant
    preparation = getattr(extractor, "preparation", "")
    seen_by = f"{extractor.name} {extractor.fingerprint[:12]}" + (f", {preparation}" if preparation else "")
    freeze = getattr(behavior, "frozen", None)
    frozen = "" if freeze is None or reference is None else freeze(reference)
    return "; ".join(part for part in (seen_by, behavior.variant, frozen) if part)


def measure_behaviors(
    images: Images,
    behaviors: Sequence[ModelBehavior],
    *,
    extractor: FeatureExtractor | Mapping[str, FeatureExtractor] | None = None,
    reference: Reference | Mapping[str, Reference] | None = None,
) -> dict[str, float]:
    """Measure all `behaviors` of the generated `images`, with one feature pass per extractor.

    Args:
        images: `(n_images, height, width, channels)`.
        behaviors: With different names.
        extractor: One for all behaviors that name none or name this one; or several by name, where `default` serves
            behaviors that name none. Not needed if no behavior uses features.
        reference: Real images as seen by the same extractor, or by each of several; not needed of an extractor whose
            behaviors compare with nothing.

    Returns:
        Raw values by behavior name, in the given order.

    Raises:
        BehaviorError: There are fewer images than a behavior needs (found before the pass), or a value is not
            finite.
        ConfigError: Two behaviors have one name, or an extractor or a reference is missing.
        MixedResultsError: A reference was made by another extractor.
    """
    check_images(images)
    check_behaviors(behaviors)
    check_enough_images(behaviors, len(images))
    extractors = _by_name(extractor)
    references = _by_name(reference, names=extractors)
    _check_what_is_needed(behaviors, extractors, references)

    seen: dict[str, Features] = {}  # by fingerprint: two names of one network are one pass
    values = {}
    for behavior in behaviors:
        if not behavior.uses_features:
            generated, real = Features(images, np.empty((len(images), 0), np.float32)), Reference.empty(images)
        else:
            found = extractors[extractor_of(behavior)]
            if found.fingerprint not in seen:
                seen[found.fingerprint] = found.extract(images)
            generated = seen[found.fingerprint]
            real = references[extractor_of(behavior)] if uses_reference(behavior) else Reference.empty(images)
        value = behavior.measure(generated, real)
        if not math.isfinite(value):
            raise BehaviorError(
                f"Behavior {behavior.name!r} must be a finite number; found {value} for {len(images)} "
                "images. Look at the images: a model that diverged draws constant or saturated ones."
            )
        values[behavior.name] = value
    return values


_Given = TypeVar("_Given", FeatureExtractor, Reference)


def _by_name(given: _Given | Mapping[str, _Given] | None, names: Mapping[str, Any] | None = None) -> dict[str, _Given]:
    """What is given, by extractor name; a single extractor has its own name and `default`, a reference all `names`."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if names is None:
        names = dict.fromkeys((DEFAULT_EXTRACTOR, getattr(given, "name", DEFAULT_EXTRACTOR)))
    return dict.fromkeys(names or (DEFAULT_EXTRACTOR,), given)


def _check_what_is_needed(
    behaviors: Sequence[ModelBehavior],
    extractors: Mapping[str, FeatureExtractor],
    references: Mapping[str, Reference],
) -> None:
    """Every behavior has its extractor, and where it compares a reference made by it; nothing was extracted yet."""
    for behavior in behaviors:
        if not behavior.uses_features:
            continue
        name = extractor_of(behavior)
        if name not in extractors:
            raise ConfigError(
                f"Behavior {behavior.name!r} needs the feature extractor {name!r}; found "
                f"{', '.join(extractors) or 'no extractor'}. Pass it, or measure only what needs none."
            )
        if not uses_reference(behavior):
            continue
        if name not in references:
            raise ConfigError(
                f"Behavior {behavior.name!r} compares with real images as seen by {name!r}; found "
                f"{', '.join(references) or 'no reference'}. Pass Reference.from_images(images, extractor)."
            )
        made_by, asked = references[name].extractor_fingerprint, extractors[name].fingerprint
        if made_by != asked:
            raise MixedResultsError(
                f"Generated and real images must be seen by one extractor; found {extractors[name].name} "
                f"{asked[:12]} and a reference made by {made_by[:12]}. "
                f"Make the reference again with Reference.from_images."
            )
