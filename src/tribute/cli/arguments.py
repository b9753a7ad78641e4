"""Flags that several commands share, spelled as published."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tribute.cli.console import print_line
from tribute.config import (
    DataConfig,
    FeatureConfig,
    Preset,
    RuntimeConfig,
    StudyConfig,
    default_preset,
    load_preset,
    preset_names,
)
from tribute.data.registry import HUB_PREFIX, SOURCES, find_source
from tribute.errors import ConfigError
from tribute.games.removal import canonical_removal_dist

RemovalDist = Literal[
    "shapley", "datashapley", "shapley_complement", "datamodel", "uniform", "loo", "add_one_in", "empty"
]
Design = Literal["orthogonal", "paired", "stratified", "kernel", "permutation"]
Pruner = Literal["magnitude", "taylor", "random", "reinit", "diff-pruning"]


class Arguments(BaseModel):
    """Base of the flags of a command."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


SOURCE_FLAGS = (
    *("contributors", "data_dir", "max_examples"),
    *("contributor_column", "label_column", "image_column", "split"),
)
"""Flags that decide, with `--dataset`, who owns which example; the others say what becomes of the pixels."""

ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


class CommonArguments(Arguments):
    """Flags of every command that touches a model."""

    outdir: Path = Field(default=Path("results"), description="Folder below which models are written.")
    device: str | None = Field(default=None, description="cpu, cuda, ...; None chooses.")
    n_threads: int | None = Field(default=None, gt=0, description="CPU threads; None: PyTorch's choice.")
    dry_run: bool = Field(default=False, description="Print the resolved settings and stop.")


class SourceArguments(Arguments):
    """Flags that choose the training data."""

    dataset: str | None = Field(
        default=None,
        description="digits, cifar, cifar2, cifar100, cifar20, cifar20-superclass, mnist, celeba, artbench, folder, "
        "parquet, or hub:OWNER/NAME.",
    )
    contributors: str | None = Field(
        default=None,
        description="class (default): by class, or by the dataset's own column of owners; or vendors for digits.",
    )
    data_dir: Path | None = Field(
        default=None, description="Parquet file, folder of Parquet files, or folder of images."
    )
    max_examples: int | None = Field(default=None, gt=0, description="Use only the first rows of the dataset.")
    image_size: int | None = Field(default=None, gt=0, description="Height and width, pixels; None: the preset's.")
    resize: Literal["center_crop", "squash"] | None = Field(
        default=None, description="How images become square: center_crop (default) or squash."
    )
    contributor_column: str | None = Field(default=None, description="Column that names each example's owner.")
    label_column: str | None = Field(default=None, description="Column of the class; None: the dataset's.")
    image_column: str | None = Field(default=None, description="Column of the images; None: the dataset's.")
    split: str | None = Field(default=None, description="Part of the dataset; None: train.")
    preset: str | None = Field(default=None, description="Recipe by name (docs/cli.md#presets), or a .yaml file.")
    codec: str | None = Field(
        default=None,
        description="Autoencoder of a latent diffusion model: a diffusers folder, or a hub id; None: the preset's.",
    )

    def source(self, saved: dict[str, Any] | None = None) -> DataConfig:
        """The data that the flags mean; what a flag leaves open comes from a checkpoint, then from defaults."""
        flags = {name: getattr(self, name) for name in DataConfig.model_fields if getattr(self, name) is not None}
        values = {**(saved or {}), **flags}
        dataset = values.get("dataset")
        if dataset is None:
            raise ConfigError(f"--dataset: expected one of {', '.join(SOURCES)} or {HUB_PREFIX}OWNER/NAME; found none")
        find_source(dataset)
        return DataConfig.parse(values, where="data flags")

    def load_preset(self, dataset: str) -> Preset:
        """The preset of `--preset`, or the one named like the dataset."""
        name = self.preset or default_preset(dataset)
        if not name.endswith((".yaml", ".yml")) and name not in preset_names():
            raise ConfigError(f"--preset: expected one of {', '.join(preset_names())} or a .yaml file; found {name!r}")
        return load_preset(name)


class DataArguments(CommonArguments, SourceArguments):
    """Flags of every command that reads training data and touches a model."""


class RemovalArguments(Arguments):
    """Flags that choose a coalition."""

    removal_dist: RemovalDist | None = Field(
        default=None,
        description="Law of the coalition. None: everyone; shapley = datashapley; loo and add_one_in take the "
        "contributor from --removal_seed; empty: nobody.",
    )
    datamodel_alpha: float = Field(
        default=0.5, description="Fraction of contributors kept by --removal_dist datamodel."
    )
    removal_seed: int = Field(
        default=0, description="Which coalition of the law, or row of the design: the same seed, the same coalition."
    )
    design: Design | None = Field(
        default=None,
        description="Design that the coalition belongs to, for --removal_dist shapley. None: kernel, as published.",
    )

    def canonical_removal_dist(self) -> str | None:
        """The one name of the law, or of the design; `kernel` is the law itself.

        Raises:
            ConfigError: A design is asked for with a law that has none.
        """
        removal_dist = canonical_removal_dist(self.removal_dist)
        if self.design is None:
            return removal_dist
        if removal_dist not in (None, "shapley"):
            raise ConfigError(
                f"--design: expected --removal_dist shapley, which a design is for; found {removal_dist!r}. "
                "Leave --design out, or use --removal_dist shapley"
            )
        return "shapley" if self.design == "kernel" else self.design

    def removal(self) -> dict[str, Any]:
        """How the coalition is drawn, for records: what does not apply is None."""
        removal_dist = self.canonical_removal_dist()
        drawn = removal_dist not in (None, "empty")
        return {
            "removal_dist": removal_dist,
            "datamodel_alpha": self.datamodel_alpha if removal_dist == "datamodel" else None,
            "removal_seed": self.removal_seed if drawn else None,
        }


class FeatureArguments(Arguments):
    """Flags that choose the networks through which behaviors see images."""

    feature_extractor: str = Field(
        default="classifier", description="Of behaviors that name none: classifier, inception, vgg16, clip, blip."
    )
    feature_weights: tuple[str, ...] = Field(
        default=(), description="Weights from a file: inception=PATH, vgg16=PATH; PATH alone if only one is in use."
    )
    feature_models: tuple[str, ...] = Field(
        default=(), description="clip=MODEL, blip=MODEL: a local folder, or the id of a model on the hub."
    )
    feature_revisions: tuple[str, ...] = Field(
        default=(), description="clip=COMMIT, blip=COMMIT: for an id of your own on the hub."
    )
    feature_batch_size: int | None = Field(default=None, gt=0, description="Images per pass; None: the network's own.")
    max_reference: int | None = Field(default=None, gt=1, description="Real images to compare with; None: all.")
    aesthetic_head: Path | None = Field(default=None, description="Linear head of aesthetic_score, a file.")

    def features(self, behaviors: Sequence[str]) -> FeatureConfig:
        """The settings that the flags mean, for these behaviors."""
        used = {name.partition("@")[2] or self.feature_extractor for name in behaviors}
        return FeatureConfig.parse(
            {
                "extractor": self.feature_extractor,
                "weights": _by_extractor("--feature_weights", self.feature_weights, used & {"inception", "vgg16"}),
                "models": _by_extractor("--feature_models", self.feature_models),
                "revisions": _by_extractor("--feature_revisions", self.feature_revisions),
                "batch_size": self.feature_batch_size,
                "max_reference": self.max_reference,
                "aesthetic_head": self.aesthetic_head,
            },
            where="feature flags",
        )


def _by_extractor(flag: str, entries: Sequence[str], candidates: Collection[str] = ()) -> dict[str, str]:
    """`NAME=VALUE` entries as a mapping; a value alone belongs to the one candidate."""
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator and len(candidates) == 1:
            name, value = next(iter(candidates)), entry
        if not name or not value or name in found:
            raise ConfigError(
                f"{flag}: expected NAME=VALUE with each extractor once, such as inception=PATH; found {entry!r}"
            )
        found[name] = value
    return found


class PublishedTrainingArguments(Arguments):
    """Training flags of the published commands."""

    opt_seed: int = Field(default=42, ge=0, description="Seed of initialisation, data order and training noise.")
    keep_all_ckpts: bool = Field(default=False, description="Keep every checkpoint instead of the last.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(default=None, description="None: the preset's.")
    gradient_accumulation_steps: int | None = Field(default=None, gt=0, description="None: the preset's.")
    use_8bit_optimizer: bool = Field(
        default=False, description="Keep the optimizer's state in 8 bits (needs tribute[8bit])."
    )
    precompute_stage: Literal["save", "reuse"] | None = Field(
        default=None,
        description="Latents of the training images. save: encode them and stop; reuse: take them from the cache and "
        "never encode; None: encode what is missing.",
    )

    def check_precompute_stage(self, preset: Preset) -> None:
        """Refuse the flag where there is nothing to encode.

        Raises:
            ConfigError: The preset has no codec.
        """
        if self.precompute_stage is not None and preset.codec is None:
            raise ConfigError(
                f"--precompute_stage {self.precompute_stage}: expected a preset of latent diffusion, found one of "
                f"pixels ({preset.dataset}); leave it out, or choose a --preset with a codec, e.g. celeba"
            )


class RuntimeArguments(Arguments):
    """Flags that change how a result is computed, and not the result."""

    compile: bool = Field(default=False, description="Compile the network (torch.compile), once per process.")
    channels_last: bool = Field(default=False, description="Keep activations as (n, height, width, channels).")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again for the backward pass instead of keeping them."
    )

    def runtime(self, base: RuntimeConfig | None = None) -> RuntimeConfig:
        """How networks compute: as `base` says, and as the flags that are on say."""
        names = ("compile", "channels_last", "gradient_checkpointing")
        return (base or RuntimeConfig()).replace(**{name: True for name in names if getattr(self, name)})


def source_options(dataset: str | None, arguments: Arguments) -> dict[str, Any] | None:
    """What the flags of a command without models say of the training data; None without `--dataset`.

    Raises:
        ConfigError: Flags describe a dataset that is not named.
    """
    given = {name: value for name in SOURCE_FLAGS if (value := getattr(arguments, name)) is not None}
    if dataset is not None:
        return {"dataset": dataset, **given}
    if given:
        raise ConfigError(
            f"{', '.join(f'--{name}' for name in given)}: expected --dataset, which they describe; found none. Name "
            "it, or leave them out: without a dataset lines hold indices of contributors"
        )
    return None


def parse(arguments_class: type[ArgumentsT], argv: Sequence[str], *, prog: str, description: str) -> ArgumentsT:
    """Parse flags; a wrong one ends the process with status 2 and a message that names it."""
    return tyro.cli(
        arguments_class,
        args=list(argv),
        prog=prog,
        description=description,
        use_underscores=True,
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def read_study(path: Path, outdir: Path | None, *, compare: bool = True, **changes: Any) -> StudyConfig:
    """The study of a YAML file or of a run folder, with what flags change; flags that are None change nothing.

    Args:
        path: The file or the folder.
        outdir: Folder of run folders; None: the study's.
        compare: Refuse settings that are not those in the run folder, of which the command is about to speak.
        changes: Other settings by name.

    Raises:
        ConfigError: It is neither, or a flag does not suit.
        MixedResultsError: The run folder has results of other settings.
    """
    if path.is_dir():
        if outdir is not None:
            raise ConfigError(f"--outdir: {path} is a run folder already; leave --outdir out")
        from tribute.study.upkeep import study_of_run_dir

        config = study_of_run_dir(path)
    else:
        config = StudyConfig.from_yaml(path)
    changes = {name: value for name, value in {"outdir": outdir, **changes}.items() if value is not None}
    config = config.replace(**changes) if changes else config
    if compare:
        from tribute.study.run_folder import check_same_study

        check_same_study(config)
    return config


def print_settings(settings: dict[str, Any]) -> None:
    """The resolved settings as YAML."""
    print_line(yaml.safe_dump(_plain(settings), sort_keys=False).rstrip())


def _plain(value: Any) -> Any:
    """Values that YAML can write."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
