"""Flags that several commands share, spelled as published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tribute.cli.console import print_line
from tribute.config import DataConfig, Preset, RuntimeConfig, load_preset, preset_names
from tribute.data.sources import SOURCES
from tribute.errors import ConfigError, NotImplementedYet
from tribute.games.removal import canonical_removal_dist

RemovalDist = Literal[
    "shapley", "datashapley", "shapley_complement", "datamodel", "uniform", "loo", "add_one_in", "empty"
]
Design = Literal["orthogonal", "paired", "stratified", "kernel", "permutation"]
Pruner = Literal["magnitude", "taylor", "random", "reinit", "diff-pruning"]


class Arguments(BaseModel):
    """Base of the flags of a command."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


class CommonArguments(Arguments):
    """Flags of every command that touches a model."""

    outdir: Path = Field(default=Path("results"), description="Folder below which models are written.")
    device: str | None = Field(default=None, description="cpu, cuda, ...; None chooses.")
    n_threads: int | None = Field(default=None, gt=0, description="CPU threads; None: PyTorch's choice.")
    dry_run: bool = Field(default=False, description="Print the resolved settings and stop.")


class DataArguments(CommonArguments):
    """Flags that choose the training data."""

    dataset: str | None = Field(default=None, description="digits or cifar.")
    contributors: str | None = Field(default=None, description="class (default), or vendors for digits.")
    data_dir: Path | None = Field(
        default=None, description="Parquet file or folder, for datasets that are not embedded."
    )
    max_examples: int | None = Field(default=None, gt=0, description="Use only the first rows of the dataset.")
    preset: str | None = Field(default=None, description="Recipe: digits, cifar, cifar-small, or a .yaml file.")

    def source(self, saved: dict[str, Any] | None = None) -> DataConfig:
        """The data that the flags mean; what a flag leaves open comes from a checkpoint, then from defaults."""
        flags = {
            name: getattr(self, name)
            for name in ("dataset", "contributors", "data_dir", "max_examples")
            if getattr(self, name) is not None
        }
        values = {**(saved or {}), **flags}
        dataset = values.get("dataset")
        if dataset is None:
            raise ConfigError(f"--dataset: expected one of {', '.join(SOURCES)}; found none")
        if dataset not in SOURCES:
            raise ConfigError(f"--dataset: expected one of {', '.join(SOURCES)}; found {dataset!r}")
        return DataConfig.parse(values, where="data flags")

    def load_preset(self, dataset: str) -> Preset:
        """The preset of `--preset`, or the one named like the dataset."""
        name = self.preset or dataset
        if not name.endswith((".yaml", ".yml")) and name not in preset_names():
            raise ConfigError(f"--preset: expected one of {', '.join(preset_names())} or a .yaml file; found {name!r}")
        return load_preset(name)


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
        default=None, description="Latents of a codec (not in this version)."
    )

    def refuse_what_is_missing(self) -> None:
        """Published flags that this version does not provide are errors, never ignored."""
        if self.precompute_stage is not None:
            raise NotImplementedYet(
                "--precompute_stage belongs to latent diffusion, which is not part of this version; leave it out"
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
