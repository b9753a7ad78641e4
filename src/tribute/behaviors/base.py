"""What a model behavior is, how one is found by name, and how several are measured in one feature pass."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tribute.behaviors.features import (
    FeatureExtractor,
    Features,
    check_images,
    content_hash,
    read_artifact,
    write_artifact,
)
from tribute.errors import BehaviorError, ConfigError, MixedResultsError
from tribute.seeding import numpy_stream
from tribute.types import Images

GLOBAL_BEHAVIORS = ("inception_score", "fid", "kid", "precision", "recall", "entropy")
"""The behaviors of all generated images together that `--model_behavior global` measures."""

Statistic = Mapping[str, npt.NDArray[Any]]
"""Named arrays that a behavior needs of the reference images."""


class ModelBehavior(Protocol):
    """A scalar that describes the images a model generates; raw, never negated.

    One file with such a class and one line in `_REGISTRY` (or a call of `register_behavior`) add a behavior.
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


class Reference:
    """Features of the real images, and what behaviors computed from them once.

    Attributes:
        features: Of the real images.
        extractor_fingerprint: Of the extractor that made them.
        fingerprint: SHA-256 of the extractor's fingerprint and the images.
    """

    def __init__(self, features: Features, *, extractor_fingerprint: str) -> None:
        self.features = features
        self.extractor_fingerprint = extractor_fingerprint
        self.fingerprint = content_hash(extractor_fingerprint, features.images)
        self._statistics: dict[str, dict[str, npt.NDArray[Any]]] = {}

    @classmethod
    def from_images(cls, images: Images, extractor: FeatureExtractor, batch_size: int = 512) -> Reference:
        """Extract the features of the real `images`."""
        return cls(extractor.extract(images, batch_size), extractor_fingerprint=extractor.fingerprint)

    def statistic(self, name: str, compute: Callable[[], Statistic]) -> Statistic:
        """Named arrays, computed on the first call; `name` states every setting that they depend on."""
        if name not in self._statistics:
            self._statistics[name] = {key: np.asarray(array) for key, array in compute().items()}
        return self._statistics[name]

    def rows(self, max_rows: int) -> npt.NDArray[np.intp]:
        """Indices of at most `max_rows` reference images: all, or a subset that is always the same."""
        n_images = len(self.features)
        if n_images <= max_rows:
            return np.arange(n_images)
        stream = numpy_stream(0, "behaviors/reference/rows", n_images, max_rows)
        return np.sort(stream.choice(n_images, max_rows, replace=False))

    def save(self, folder: Path) -> str:
        """Freeze features (without the images) and all statistics computed so far in a new folder.

        Returns:
            SHA-256 of what is frozen.

        Raises:
            BehaviorError: `folder` exists.
        """
        arrays = {"embeddings": self.features.embeddings}
        if self.features.probabilities is not None:
            arrays["probabilities"] = self.features.probabilities
        for name, statistic in self._statistics.items():
            arrays |= {f"{name}:{key}": array for key, array in statistic.items()}
        frozen = content_hash(*(part for name in sorted(arrays) for part in (name, arrays[name])))
        facts = {"fingerprint": self.fingerprint, "extractor": self.extractor_fingerprint, "frozen": frozen}
        if not write_artifact(folder, arrays, facts):
            raise BehaviorError(f"{folder} exists; a frozen reference is never overwritten. Choose another folder.")
        return frozen

    @classmethod
    def load(cls, folder: Path, images: Images) -> Reference:
        """Read what `save` froze; `images` are the real images that it was made of.

        Raises:
            BehaviorError: The folder is missing or damaged.
            MixedResultsError: It was made of other images.
        """
        arrays, facts = read_artifact(folder)
        if "embeddings" not in arrays:
            raise BehaviorError(f"{folder} is no frozen reference. Name a folder that Reference.save wrote.")
        embeddings, probabilities = arrays.pop("embeddings"), arrays.pop("probabilities", None)
        if len(embeddings) != len(images):
            found = f"{len(images)} images, frozen with {len(embeddings)}"
        else:
            reference = cls(Features(images, embeddings, probabilities), extractor_fingerprint=facts["extractor"])
            found = f"fingerprint {reference.fingerprint[:12]}, frozen with {facts['fingerprint'][:12]}"
            if reference.fingerprint == facts["fingerprint"]:
                for name, array in arrays.items():
                    statistic, _, key = name.rpartition(":")
                    reference._statistics.setdefault(statistic, {})[key] = array
                return reference
        raise MixedResultsError(
            f"The reference in {folder} was frozen for other real images: found {found}. "
            f"Give the same images in the same order, or another folder."
        )


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


_REGISTRY: dict[str, str | Callable[[], ModelBehavior]] = {
    "inception_score": "tribute.behaviors.inception:InceptionScore",
    "fid": "tribute.behaviors.inception:FrechetDistance",
    "kid": "tribute.behaviors.inception:KernelDistance",
    "precision": "tribute.behaviors.precision_recall:Precision",
    "recall": "tribute.behaviors.precision_recall:Recall",
    "entropy": "tribute.behaviors.diversity:ClusterEntropy",
}
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
        ConfigError: A name is taken or has a colon.
    """
    for new in (name, *aliases):
        if ":" in new or new in _REGISTRY or new in _ALIASES:
            raise ConfigError(
                f"A behavior's name must be new and without a colon; found {new!r}. "
                f"Taken are {', '.join(sorted([*_REGISTRY, *_ALIASES]))}."
            )
    _REGISTRY[name] = factory
    _ALIASES.update(dict.fromkeys(aliases, name))


def get_behavior(name: str, *, higher_is_better: bool | None = None) -> ModelBehavior:
    """Find a behavior by its name or alias, or make one of a user's function.

    Args:
        name: A known name, or `module:function`, `module:function:higher` or `module:function:lower` for any
            importable function of images. Without a direction, higher is better.
        higher_is_better: The direction of a user's function, if `name` does not say it.

    Raises:
        ConfigError: The name is unknown, or a direction is not one or contradicts the other.
        BehaviorError: The user's function cannot be imported or is not callable.
    """
    if ":" in name:
        return _user_behavior(name, higher_is_better)
    known = _ALIASES.get(name, name)
    if known not in _REGISTRY:
        raise ConfigError(
            f"Unknown behavior {name!r}. Known are {', '.join(sorted([*_REGISTRY, *_ALIASES]))}; "
            f"or give a function of your own as module:function."
        )
    factory = _REGISTRY[known]
    behavior: ModelBehavior = (_import_attribute(factory) if isinstance(factory, str) else factory)()
    if higher_is_better not in (None, behavior.higher_is_better):
        raise ConfigError(
            f"Behavior {name!r} has a fixed direction, {_direction(behavior.higher_is_better)} is better; "
            f"found {_direction(not behavior.higher_is_better)}. Leave the direction out."
        )
    return behavior


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


def behavior_variant(behavior: ModelBehavior, extractor: FeatureExtractor | None) -> str:
    """What makes values of `behavior` comparable, to be stored with them: extractor, its hash, settings."""
    if not behavior.uses_features or extractor is None:
        return behavior.variant
    return f"{extractor.name} {extractor.fingerprint[:12]}; {behavior.variant}"


def measure_behaviors(
    images: Images,
    behaviors: Sequence[ModelBehavior],
    *,
    extractor: FeatureExtractor | None = None,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Measure all `behaviors` of the generated `images` in one feature pass.

    Args:
        images: `(n_images, height, width, channels)`.
        behaviors: With different names.
        extractor: Not needed if no behavior uses features.
        reference: Real images, of the same extractor.

    Returns:
        Raw values by behavior name, in the given order.

    Raises:
        BehaviorError: There are fewer images than a behavior needs (found before the pass), or a value is not
            finite.
        ConfigError: Two behaviors have one name, or the extractor or the reference is missing.
        MixedResultsError: The reference was made by another extractor.
    """
    check_images(images)
    names = [behavior.name for behavior in behaviors]
    if len(set(names)) < len(names):
        raise ConfigError(f"Each behavior is measured once; found {', '.join(names)}. Remove the repeated ones.")
    for behavior in behaviors:
        if len(images) < behavior.min_images:
            raise BehaviorError(
                f"Behavior {behavior.name!r} ({behavior.variant}) needs at least {behavior.min_images} "
                f"images; found {len(images)}. Generate more images, or leave this behavior out."
            )
    generated, reference = _features(images, behaviors, extractor, reference)
    values = {}
    for behavior in behaviors:
        value = behavior.measure(generated, reference)
        if not math.isfinite(value):
            raise BehaviorError(
                f"Behavior {behavior.name!r} must be a finite number; found {value} for {len(images)} "
                "images. Look at the images: a model that diverged draws constant or saturated ones."
            )
        values[behavior.name] = value
    return values


def _features(
    images: Images,
    behaviors: Sequence[ModelBehavior],
    extractor: FeatureExtractor | None,
    reference: Reference | None,
) -> tuple[Features, Reference]:
    """Features of the generated images, and their reference; both without embeddings if none are used."""
    needy = [behavior.name for behavior in behaviors if behavior.uses_features]
    if not needy:
        empty = Features(images, np.empty((len(images), 0), np.float32))
        return empty, reference or Reference(Features(images[:0], empty.embeddings[:0]), extractor_fingerprint="")
    if extractor is None or reference is None:
        raise ConfigError(
            f"Behaviors {', '.join(needy)} need a feature extractor and the features of real images; found "
            f"{'no extractor' if extractor is None else 'no reference'}. Pass both, or only functions of "
            "images."
        )
    if extractor.fingerprint != reference.extractor_fingerprint:
        raise MixedResultsError(
            f"Generated and real images must be seen by one extractor; found {extractor.name} "
            f"{extractor.fingerprint[:12]} and a reference made by {reference.extractor_fingerprint[:12]}. "
            f"Make the reference again with Reference.from_images."
        )
    return extractor.extract(images), reference
