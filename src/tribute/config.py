"""Settings of every stage, as data.

One pydantic model per stage. Unknown keys are errors, values are checked where they enter,
every model writes itself as YAML that reads back to an equal model, and `fingerprint()`
identifies it. A preset (`presets/*.yaml`) is a complete recipe for one dataset.
"""

from __future__ import annotations

import hashlib
import json
import re
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
OptimizerName = Literal["Adam", "AdamW", "Adam8bit", "AdamW8bit"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Variance = Annotated[float, Field(ge=0, le=1)]


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
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout probability in residual layers. With it the result depends on the number of processes.",
    )
    num_class_embeds: int | None = Field(
        default=None,
        gt=0,
        description="Classes of a conditional network, one more than labels to guide it; None: none.",
    )
    add_attention: bool = Field(default=True, description="Attention in the middle block.")
    center_input_sample: bool = Field(default=False, description="Map the input from [0, 1] to [-1, 1] first.")
    time_embedding_type: Literal["positional", "learned"] = "positional"
    time_embedding_dim: int | None = Field(
        default=None, gt=0, description="Width of the time embedding; None: four times the first block's channels."
    )
    num_train_timesteps: int | None = Field(default=None, gt=0, description="Rows of a learned time embedding.")
    mid_block_type: str | None = Field(default="UNetMidBlock2D", description="None: no middle block.")
    mid_block_scale_factor: float = Field(default=1.0, gt=0, description="The middle block's output is divided by it.")
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    act_fn: str = Field(default="silu", description="Activation of the residual layers.")
    attn_norm_num_groups: int | None = Field(
        default=None, gt=0, description="Groups of the middle attention's GroupNorm; None: norm_num_groups."
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"


class NoiseScheduleConfig(Config):
    """Forward process; defaults as published (Ho et al. 2020)."""

    num_train_timesteps: int = Field(default=1000, gt=1, description="Number of noise levels.")
    beta_start: float = Field(default=1e-4, gt=0, description="Variance of the first step.")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="Variance of the last step.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    clip_sample: bool = Field(default=True, description="Clip the predicted image to [-1, 1] while sampling.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    trained_betas: tuple[Variance, ...] | None = Field(
        default=None, description="Variance of every step; beta_start, beta_end and beta_schedule then do not count."
    )
    rescale_betas_zero_snr: bool = Field(default=False, description="The last noise level is noise alone.")
    clip_sample_range: float = Field(default=1.0, gt=0, description="clip_sample clips to this and its negative.")
    thresholding: bool = Field(default=False, description="Dynamic thresholding of the predicted image.")
    dynamic_thresholding_ratio: float = Field(default=0.995, gt=0, le=1, description="Its quantile.")
    sample_max_value: float = Field(default=1.0, gt=0, description="Its largest threshold.")
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        default=None, description="Noise levels visited while sampling; None: leading for ddim, trailing for others."
    )
    steps_offset: int = Field(default=0, ge=0, description="Added to the noise levels of leading.")
    set_alpha_to_one: bool = Field(default=True, description="ddim: the last step ends without noise.")

    @model_validator(mode="after")
    def _has_a_variance_for_every_step(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas: expected one for each of {self.num_train_timesteps} steps, "
                f"found {len(self.trained_betas)}"
            )
        return self


class OptimizerConfig(Config):
    """Optimizer and learning-rate schedule; defaults as published for CIFAR."""

    name: OptimizerName = Field(default="Adam", description="The 8-bit ones keep quantised state (tribute[8bit]).")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate.")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="Shape after the warm-up.")
    n_warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")

    @property
    def is_8bit(self) -> bool:
        """Whether the optimizer's state is quantised to 8 bits."""
        return self.name.endswith("8bit")


class RuntimeConfig(Config):
    """How the same result is computed: faster, or in less memory.

    Nothing here changes a result by more than floating-point rounding (docs/performance.md has the tolerances), so it
    is recorded with a result and is no part of its identity: a run may be resumed with other values.
    """

    compile: bool = Field(default=False, description="Compile the network (torch.compile), once per process.")
    compile_backend: str = Field(default="inductor", description="Of torch.compile.")
    channels_last: bool = Field(default=False, description="Keep activations as (n, height, width, channels).")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again for the backward pass instead of keeping them."
    )


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
    mixed_precision: MixedPrecision = Field(default="no", description="Of the network's predictions.")


class FeatureConfig(Config):
    """Networks through which behaviors see images, and where their weights are.

    `extractor` and `max_reference` are part of the identity of an evaluation. The others are not: that holds hashes of
    the weights themselves, so a file may move.
    """

    extractor: str = Field(default="classifier", description="Of behaviors that name none: `fid`, not `fid@clip`.")
    weights: dict[str, Path] = Field(
        default_factory=dict, description="By extractor (inception, vgg16): a file. Others are downloaded."
    )
    models: dict[str, str] = Field(
        default_factory=dict, description="By extractor (clip, blip): a local folder, or the id of a model on the hub."
    )
    revisions: dict[str, str] = Field(
        default_factory=dict, description="By extractor (clip, blip): the commit of a model on the hub."
    )
    aesthetic_head: Path | None = Field(default=None, description="Linear head of aesthetic_score, a file.")
    batch_size: int | None = Field(
        default=None, gt=0, description="Images per pass of these networks; None: their own."
    )
    max_reference: int | None = Field(
        default=None, gt=1, description="Real images to compare with, a fixed draw; None: all of them."
    )


class CodecConfig(Config):
    """The frozen autoencoder of a latent diffusion model: a diffusers `VQModel` or `AutoencoderKL`."""

    path: str = Field(min_length=1, description="A folder in the diffusers format, or a hub id OWNER/NAME.")
    subfolder: str | None = Field(
        default=None, description="Where in it; None: vqvae, vae or the folder itself, whichever has a config.json."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; None: its main branch.")
    scaling_factor: float | None = Field(
        default=None,
        gt=0,
        description="Latents are multiplied by it; None: what the codec's config.json says, or else 1 for a VQModel "
        "and 0.18215 for an AutoencoderKL.",
    )
    factor: int = Field(default=4, gt=0, description="Side of an image over the side of its latent.")
    image_channels: Literal[1, 3] = Field(default=3, description="Channels of an image.")
    batch_size: int = Field(
        default=8, gt=0, description="Images per pass of the codec; bounds its memory, never changes a result."
    )


class Preset(Config):
    """A complete recipe for one dataset."""

    dataset: str
    unet: UNetConfig
    codec: CodecConfig | None = Field(default=None, description="Of latent diffusion; None: the model is of pixels.")
    noise_schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    training: dict[str, TrainConfig] = Field(description="Per method: retrain, prune_fine_tune, gd.")
    ckpt_freq: dict[str, PositiveInt] = Field(default_factory=dict, description="Steps between checkpoints.")
    sampling: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _leaves_latents_as_they_are(self) -> Self:
        schedule = self.noise_schedule
        if self.codec is not None and (schedule.clip_sample or schedule.thresholding):
            raise ValueError(
                "noise_schedule.clip_sample and thresholding: expected false with a codec, since latents leave "
                f"[-1, 1]; found {schedule.clip_sample} and {schedule.thresholding}"
            )
        return self

    @property
    def image_size(self) -> int:
        """Height and width of the images that the recipe is for, pixels."""
        return self.unet.sample_size * (1 if self.codec is None else self.codec.factor)

    @property
    def image_channels(self) -> int:
        """Channels of those images: 3 for RGB, 1 for grey."""
        return self.unet.in_channels if self.codec is None else self.codec.image_channels

    def with_codec(self, path: str | None) -> Preset:
        """The same with the codec at another place; None, and the place where it is, change nothing.

        Sub-folder, revision and scaling factor go with the place: the other codec has its own.

        Raises:
            ConfigError: The preset has no codec.
        """
        if path is None:
            return self
        if self.codec is None:
            raise ConfigError(
                f"--codec {path}: expected a preset of latent diffusion, found one of pixels ({self.dataset}); leave "
                "--codec out, or give a --preset file with codec settings"
            )
        if path == self.codec.path:
            return self
        of_that_place = {"subfolder": None, "revision": None, "scaling_factor": None}
        return self.replace(codec={**self.codec.model_dump(), **of_that_place, "path": path})

    def train_config(self, method: str, **changes: Any) -> TrainConfig:
        """The training settings of a method, with every `changes` that is not None applied.

        Args:
            method: One of `training`.
            changes: Fields of `TrainConfig`; also `lr`, and `use_8bit_optimizer`, which takes the 8-bit form of the
                method's optimizer where it is true.
        """
        if method not in self.training:
            raise ConfigError(f"expected a method of this preset: {', '.join(self.training)}; found {method!r}")
        base = self.training[method]
        optimizer = {k: changes.pop(k) for k in ("lr",) if changes.get(k) is not None}
        changes.pop("lr", None)
        if changes.pop("use_8bit_optimizer", False):
            optimizer["name"] = f"{base.optimizer.name.removesuffix('8bit')}8bit"
        kept = {key: value for key, value in changes.items() if value is not None}
        if optimizer:
            kept["optimizer"] = {**base.optimizer.model_dump(), **optimizer}
        return base.replace(**kept) if kept else base


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    folder = resources.files("tribute") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


_PRESET_OF_DATASET = {"cifar2": "cifar20", "cifar100": "cifar", "cifar20-superclass": "cifar20"}


def default_preset(dataset: str) -> str:
    """Name of the preset that is used where none is asked for: usually that of the dataset."""
    return _PRESET_OF_DATASET.get(dataset, dataset)


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
    image_size: int | None = Field(default=None, gt=0, description="Height and width, pixels; None: the preset's.")
    resize: Literal["center_crop", "squash"] = Field(default="center_crop", description="How images become square.")
    contributor_column: str | None = Field(default=None, description="Column that names each example's owner.")
    label_column: str | None = Field(default=None, description="Column of the class; None: the dataset's.")
    image_column: str | None = Field(default=None, description="Column of the images; None: the dataset's.")
    split: str = Field(default="train", description="Which part: of a hub dataset, or the start of shards' names.")


class StudyModelConfig(Config):
    """Steps of one training stage; what is None comes from the preset."""

    n_steps: int | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, gt=0)
    gradient_accumulation_steps: int | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)


class FullModelConfig(StudyModelConfig):
    """The full model: trained, or loaded."""

    load: str | None = Field(
        default=None,
        description="Start from this trained model: a checkpoint, a diffusers folder or a hub id. None: train one.",
    )

    @model_validator(mode="after")
    def _is_trained_or_loaded(self) -> Self:
        given = [name for name in StudyModelConfig.model_fields if getattr(self, name) is not None]
        if self.load is not None and given:
            raise ValueError(f"a model that is loaded is not trained: give load, or {', '.join(given)}")
        return self


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


class ExecutionConfig(Config):
    """Who measures the coalitions of a study. It never changes a result."""

    executor: Literal["serial", "ray"] = Field(
        default="serial", description="One warm process, or workers of Ray (tribute[cluster])."
    )
    workers: int = Field(default=1, gt=0, description="ray: warm workers.")
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="ray: share of a GPU that each worker takes; None: one where there is one."
    )
    address: str | None = Field(
        default=None, description="ray: a cluster, e.g. ray://head:10001 or auto; None: start one on this machine."
    )
    stall_seconds: float = Field(
        default=1800.0, gt=0, description="A worker that makes no step for so long hangs, and is replaced."
    )


class PilotConfig(Config):
    """The few coalitions that `tribute pilot` both retrains and fine-tunes."""

    n_coalitions: int = Field(default=8, ge=3, description="The first test coalitions of the study.")


class PicturesConfig(Config):
    """Generated images that `tribute run` keeps, to be looked at: of everybody, and without the top contributors."""

    n_images: int = Field(default=64, ge=0, description="Images per picture; 0: no pictures.")


class StudyConfig(Config):
    """A whole study: what `tribute run STUDY.yaml` reads."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dataset: str = "digits"
    contributors: str = "class"
    preset: str | None = Field(default=None, description="None: the dataset's.")
    codec: str | None = Field(default=None, description="Place of the codec; None: the preset's.")
    data_dir: Path | None = None
    max_examples: int | None = Field(default=None, gt=0)
    image_size: int | None = Field(default=None, gt=0, description="Height and width, pixels; None: the preset's.")
    resize: Literal["center_crop", "squash"] = Field(default="center_crop", description="How images become square.")
    contributor_column: str | None = Field(default=None, description="Column that names each example's owner.")
    label_column: str | None = Field(default=None, description="Column of the class; None: the dataset's.")
    image_column: str | None = Field(default=None, description="Column of the images; None: the dataset's.")
    split: str = Field(default="train", description="Which part: of a hub dataset, or the start of shards' names.")
    outdir: Path = Path("runs")
    db: str | None = Field(default=None, description="Store; None: results.db in the run folder.")
    opt_seed: int = Field(default=42, ge=0, description="Root seed of the full, sparse and coalition models.")
    full_model: FullModelConfig = FullModelConfig()
    prune: PruneConfig = PruneConfig()
    sparse_model: StudyModelConfig = StudyModelConfig()
    gd: StudyModelConfig = StudyModelConfig()
    retrained_model: StudyModelConfig = StudyModelConfig()
    mixed_precision: MixedPrecision | None = Field(default=None, description="Of all training; None: the preset's.")
    use_8bit_optimizer: bool = Field(default=False, description="Train with the 8-bit form of the preset's optimizers.")
    runtime: RuntimeConfig = RuntimeConfig()
    sampling: dict[str, Any] = Field(default_factory=dict, description="Changes to the preset's sampling.")
    behaviors: tuple[str, ...] = ("fid", "inception_score")
    features: FeatureConfig = FeatureConfig()
    local: LocalConfig = LocalConfig()
    fit: FitCoalitionsConfig = FitCoalitionsConfig()
    test: TestCoalitionsConfig = TestCoalitionsConfig()
    estimator: Literal["auto", "gp", "size_adjusted", "ridge", "least_squares", "unbiased", "permutation"] = Field(
        default="auto", description="Of Shapley values (`games.shapley.SHAPLEY_ESTIMATORS`)."
    )
    pilot: PilotConfig = PilotConfig()
    pictures: PicturesConfig = PicturesConfig()
    execution: ExecutionConfig = ExecutionConfig()
    max_device_hours: float | None = Field(
        default=None, gt=0, description="Stop before the study has taken more than this; None: no limit."
    )
    n_threads: int | None = Field(default=None, gt=0, description="Threads of each worker; None: PyTorch's choice.")
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

    def without_password(self) -> dict[str, Any]:
        """The settings as plain JSON to be shown or kept: the password in the URL of a store is left out."""
        values = self.model_dump(mode="json")
        if self.db is not None:
            values["db"] = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", self.db)
        return values

    @property
    def db_url(self) -> str:
        return self.db or str(self.run_dir / "results.db")

    def load_preset(self) -> Preset:
        """The preset of the study, with the study's precision, optimizer and sampling settings applied.

        Its `codec` is not: a model that is loaded replaces the preset's codec first (`study.session.study_preset`).
        """
        preset = load_preset(self.preset or default_preset(self.dataset))
        training = {
            method: preset.train_config(
                method, mixed_precision=self.mixed_precision, use_8bit_optimizer=self.use_8bit_optimizer
            ).model_dump()
            for method in preset.training
        }
        return preset.replace(training=training, sampling={**preset.sampling.model_dump(), **self.sampling})


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
