"""Settings of every stage, as data.

One pydantic model per stage. Unknown keys are errors, values are checked where they enter,
every model writes itself as YAML that reads back to an equal model, and `fingerprint()`
identifies it. A preset (`presets/*.yaml`) is a complete recipe for one dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from tribute.errors import ConfigError

MixedPrecision = Literal["no", "fp16", "bf16"]
PrunerName = Literal["magnitude", "taylor", "random", "reinit", "diff-pruning"]
SamplerName = Literal["ddim", "dpm-solver++"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of all settings: frozen, strict about unknown keys, identifiable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Validate `values`; the error names each wrong key and where it was found."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain_validation(error)}") from error

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read settings from a YAML file."""
        return cls.parse(read_yaml(path), where=str(path))

    def to_yaml(self) -> str:
        """The settings as YAML that `from_yaml` reads back to an equal model."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of the settings."""
        return fingerprint(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).parse({**self.model_dump(), **changes}, where=type(self).__name__)


class UNetConfig(Config):
    """Architecture of a diffusers `UNet2DModel`; defaults are those of the published CIFAR model."""

    sample_size: int = Field(default=32, gt=0, description="Height and width of the input, pixels.")
    in_channels: int = Field(default=3, gt=0, description="Channels of an image.")
    out_channels: int = Field(default=3, gt=0, description="Channels of the prediction.")
    block_out_channels: tuple[int, ...] = Field(default=(128, 256, 256, 256), description="Channels per resolution.")
    layers_per_block: int = Field(default=2, gt=0, description="Residual layers per resolution.")
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    attention_head_dim: int | None = Field(default=None, description="Channels per attention head; None: one head.")
    norm_num_groups: int = Field(default=32, gt=0, description="Groups of every GroupNorm.")
    norm_eps: float = Field(default=1e-6, gt=0, description="Epsilon of every GroupNorm.")
    downsample_padding: int = Field(default=0, ge=0, description="Padding of the strided convolutions.")
    flip_sin_to_cos: bool = Field(default=False, description="Order of the time embedding.")
    freq_shift: int = Field(default=1, description="Frequency shift of the time embedding.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability in residual layers.")
    num_class_embeds: int | None = Field(
        default=None,
        gt=0,
        description="Classes of a conditional network, one more than labels to guide it; None: none.",
    )
    add_attention: bool = Field(default=True, description="Attention in the middle block.")


class NoiseScheduleConfig(Config):
    """Forward process; defaults as published (Ho et al. 2020)."""

    num_train_timesteps: int = Field(default=1000, gt=1, description="Number of noise levels.")
    beta_start: float = Field(default=1e-4, gt=0, description="Variance of the first step.")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="Variance of the last step.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    clip_sample: bool = Field(default=True, description="Clip the predicted image to [-1, 1] while sampling.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"


class OptimizerConfig(Config):
    """Optimizer and learning-rate schedule; defaults as published for CIFAR."""

    name: Literal["Adam", "AdamW"] = "Adam"
    lr: float = Field(default=1e-4, gt=0, description="Learning rate.")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="Shape after the warm-up.")
    n_warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")


class TrainConfig(Config):
    """One run of the training loop: full, retrained, sparse and coalition models differ only in this."""

    n_steps: int = Field(default=20_000, ge=0, description="Optimizer updates.")
    batch_size: int = Field(default=128, gt=0, description="Examples per forward pass, over all processes.")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Forward passes per optimizer update.")
    optimizer: OptimizerConfig = OptimizerConfig()
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this L2 norm.")
    ema_max_decay: float = Field(default=0.9999, ge=0, lt=1, description="Largest decay of the moving average.")
    ema_inv_gamma: float = Field(default=1.0, gt=0, description="Decay at step k: 1 - (1 + k / inv_gamma) ** -power.")
    ema_power: float = Field(default=0.75, gt=0, description="See ema_inv_gamma.")
    antithetic_timesteps: bool = Field(default=True, description="Draw timesteps in pairs t, T - 1 - t.")
    random_flip: bool = Field(default=False, description="Flip each image of a batch with probability 1/2.")
    label_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of examples trained without their label, for guidance."
    )
    mixed_precision: MixedPrecision = "no"
    opt_seed: int = Field(default=42, ge=0, description="Root seed of initialisation, data order and noise.")

    @property
    def examples_per_step(self) -> int:
        """Examples per optimizer update."""
        return self.batch_size * self.gradient_accumulation_steps


class PruneConfig(Config):
    """Structural pruning of a trained model."""

    pruning_ratio: float = Field(default=0.3, ge=0, lt=1, description="Fraction of channels REMOVED per layer.")
    pruner: PrunerName = "magnitude"
    thr: float = Field(default=0.05, ge=0, le=1, description="diff-pruning: stop at loss below thr times the largest.")
    batch_size: int = Field(default=64, gt=0, description="Images for gradient-based importance.")
    seed: int = Field(default=0, ge=0, description="Root seed of the random pruner and of the noise for gradients.")


class SampleConfig(Config):
    """How images are generated for measuring behaviors."""

    n_samples: int = Field(default=10_240, gt=0, description="Generated images; the published number is 10,240.")
    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(default=100, gt=0, description="Denoising steps; the published number is 100.")
    batch_size: int = Field(default=128, gt=0, description="Images per forward pass; never changes the result.")
    use_ema: bool = Field(default=True, description="Sample from the moving average of the weights.")
    noise_seed: int = Field(default=0, ge=0, description="Root seed of the initial noise, the same for every model.")
    guidance_scale: float = Field(
        default=1.0, ge=0, description="Of classifier-free guidance, for conditional networks; 1: none."
    )


class Preset(Config):
    """A complete recipe for one dataset."""

    dataset: str
    unet: UNetConfig
    noise_schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    training: dict[str, TrainConfig] = Field(description="Per method: retrain, prune_fine_tune, gd.")
    ckpt_freq: dict[str, PositiveInt] = Field(default_factory=dict, description="Steps between checkpoints.")
    sampling: SampleConfig = SampleConfig()

    def train_config(self, method: str, **changes: Any) -> TrainConfig:
        """The training settings of a method, with every `changes` that is not None applied."""
        if method not in self.training:
            raise ConfigError(f"expected a method of this preset: {', '.join(self.training)}; found {method!r}")
        base = self.training[method]
        optimizer = {k: changes.pop(k) for k in ("lr",) if changes.get(k) is not None}
        changes.pop("lr", None)
        kept = {key: value for key, value in changes.items() if value is not None}
        if optimizer:
            kept["optimizer"] = {**base.optimizer.model_dump(), **optimizer}
        return base.replace(**kept) if kept else base


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    folder = resources.files("tribute") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """Read a preset that comes with the library, by name, or one from a `.yaml` file."""
    if name.endswith((".yaml", ".yml")):
        return Preset.from_yaml(Path(name))
    if name not in preset_names():
        raise ConfigError(
            f"unknown preset {name!r}; expected one of {', '.join(preset_names())}, or a path to a .yaml file"
        )
    text = (resources.files("tribute") / "presets" / f"{name}.yaml").read_text()
    return Preset.parse(yaml.safe_load(text), where=f"preset {name}")


class DataConfig(Config):
    """Which training data, and how it is divided among contributors."""

    dataset: str = "digits"
    contributors: str = "class"
    data_dir: Path | None = None
    max_examples: int | None = Field(default=None, gt=0)


class StudyModelConfig(Config):
    """Steps of one training stage; what is None comes from the preset."""

    n_steps: int | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)


class FitCoalitionsConfig(Config):
    """Coalitions that attributions are fitted to."""

    n_coalitions: int = Field(default=100, gt=0)
    removal_dist: Literal["shapley", "datamodel", "uniform"] = "shapley"
    datamodel_alpha: float = Field(default=0.5, gt=0, lt=1)
    first_removal_seed: int = Field(default=0, ge=0)
    design: Literal["orthogonal", "paired", "stratified", "kernel", "permutation"] = Field(
        default="orthogonal", description="shapley: which coalitions, and in what order (`games.designs`)."
    )
    until_interval: float | None = Field(
        default=None,
        gt=0,
        description="Stop when the 95 % interval of everybody, for every behavior, is at most this share of "
        "|v(grand) - v(empty)| to either side; n_coalitions is then the most. None: measure them all.",
    )
    leave_one_out: bool = Field(default=False, description="Also measure the leave-one-out coalitions.")
    n_end_points: int = Field(default=2, gt=0, description="Measurements of v(empty) and of v(grand).")

    @property
    def design_name(self) -> str:
        """How coalitions are chosen, as the estimators know it: a design, or another removal distribution."""
        return self.design if self.removal_dist == "shapley" else self.removal_dist

    @property
    def drawn_from(self) -> str:
        """The removal distribution that evaluations record: `design_name`, but `shapley` for `kernel`."""
        return "shapley" if self.design_name == "kernel" else self.design_name


class TestCoalitionsConfig(Config):
    """Held-out coalitions whose models are retrained from scratch, for the LDS."""

    __test__ = False  # not a pytest class

    n_coalitions: int = Field(default=40, ge=0)
    datamodel_alpha: float = Field(default=0.5, gt=0, lt=1)
    opt_seeds: tuple[int, ...] = Field(default=(42, 43, 44), description="Training seeds.")
    first_removal_seed: int = Field(default=0, ge=0)


class LocalConfig(Config):
    """How much local behaviors look at; defaults as published."""

    n_samples: int = Field(default=100, gt=0, description="Images of the full model that are compared.")
    n_noises: int = Field(default=50, gt=0, description="Noise levels for the diffusion loss of each image.")


class StudyConfig(Config):
    """A whole study: what `tribute run STUDY.yaml` reads."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dataset: str = "digits"
    contributors: str = "class"
    preset: str | None = Field(default=None, description="None: the preset named like the dataset.")
    data_dir: Path | None = None
    max_examples: int | None = Field(default=None, gt=0)
    outdir: Path = Path("runs")
    db: str | None = Field(default=None, description="Store; None: results.db in the run folder.")
    opt_seed: int = Field(default=42, ge=0, description="Root seed of the full, sparse and coalition models.")
    full_model: StudyModelConfig = StudyModelConfig()
    prune: PruneConfig = PruneConfig()
    sparse_model: StudyModelConfig = StudyModelConfig()
    gd: StudyModelConfig = StudyModelConfig()
    retrained_model: StudyModelConfig = StudyModelConfig()
    sampling: dict[str, Any] = Field(default_factory=dict, description="Changes to the preset's sampling.")
    behaviors: tuple[str, ...] = ("fid", "inception_score")
    local: LocalConfig = LocalConfig()
    fit: FitCoalitionsConfig = FitCoalitionsConfig()
    test: TestCoalitionsConfig = TestCoalitionsConfig()
    estimator: Literal["auto", "gp", "size_adjusted", "ridge", "least_squares", "unbiased", "permutation"] = Field(
        default="auto", description="Of Shapley values (`games.shapley.SHAPLEY_ESTIMATORS`)."
    )
    n_threads: int | None = Field(default=None, gt=0, description="Threads of the worker; None: PyTorch's choice.")
    ckpt_freq: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _needs_behaviors(self) -> Self:
        if not self.behaviors:
            raise ValueError("behaviors: expected at least one model behavior, found none")
        return self

    @property
    def data(self) -> DataConfig:
        return DataConfig(**{name: getattr(self, name) for name in DataConfig.model_fields})

    @property
    def run_dir(self) -> Path:
        return self.outdir / self.name

    @property
    def db_url(self) -> str:
        return self.db or str(self.run_dir / "results.db")

    def load_preset(self) -> Preset:
        """The preset of the study, with the study's sampling settings applied."""
        preset = load_preset(self.preset or self.dataset)
        return preset.replace(sampling={**preset.sampling.model_dump(), **self.sampling})


def canonical_json(values: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(values: Any) -> str:
    """SHA-256 over the canonical JSON of `values`."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, safely; the error says what is wrong with the file."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no settings at {path}; expected a YAML file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def explain_validation(error: ValidationError) -> str:
    """One line per wrong setting: its path, what was found, what is expected."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"]) or "(settings)"
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown setting; remove it or correct its spelling")
        else:
            lines.append(f"{path}: {item['msg']} (found {item['input']!r})")
    return "; ".join(lines)
