"""`unlearn.py`, `tribute unlearn`: a coalition's model and its behavior, recorded in a store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from pydantic import Field

from tribute.cli.arguments import (
    DataArguments,
    FeatureArguments,
    Pruner,
    PublishedTrainingArguments,
    RemovalArguments,
    RuntimeArguments,
    parse,
    print_settings,
)
from tribute.cli.console import EncodingReport, print_line, print_table
from tribute.cli.train_command import training_preset
from tribute.config import LocalConfig, SampleConfig
from tribute.errors import ConfigError, MixedResultsError, StoreError
from tribute.games.designs import coalition_of
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import load_model
from tribute.study.layout import dataset_name, models_dir, removal_name
from tribute.unlearning.base import check_method


class UnlearnArguments(DataArguments, RemovalArguments, PublishedTrainingArguments, RuntimeArguments, FeatureArguments):
    """Flags of `unlearn.py`."""

    load: Path = Field(
        description="The sparse (or full) model for gd, the coalition's own model for retrain: a checkpoint, a "
        "diffusers folder, or a hub id."
    )
    db: str = Field(description="Store: a file, or a SQLAlchemy URL.")
    exp_name: str = Field(description="Name under which the result is recorded.")
    method: str = Field(description="gd or retrain; ga, lora and iu are not in this version.")
    model_behavior: str = Field(
        default="global",
        description="global, local, or a list such as fid,kid@clip,local,avg_mse,my_module:my_function:lower.",
    )
    full_model: Path | None = Field(
        default=None,
        description="Checkpoint of the full model, for local behaviors; None: the model at --load, with gd.",
    )
    gd_steps: int | None = Field(default=None, ge=0, description="Updates of --method gd; None: the preset's.")
    batch_size: int | None = Field(default=None, gt=0, description="Examples per update; None: the preset's.")
    lr: float | None = Field(default=None, gt=0, description="Learning rate of --method gd; None: the preset's.")
    ga_ratio: float = Field(default=1.0, description="For --method ga.")
    iu_ratio: float = Field(default=1.0, description="For --method iu.")
    lora_rank: int = Field(default=16, description="For --method lora.")
    lora_dropout: float = Field(default=0.05, description="For --method lora.")
    pruning_ratio: float | None = Field(default=None, description="Checked against the sparse model at --load.")
    pruner: Pruner | None = Field(default=None, description="Checked against the sparse model at --load.")
    thr: float | None = Field(default=None, description="Checked against the sparse model at --load.")
    n_samples: int | None = Field(default=None, gt=0, description="Generated images; None: the preset's.")
    num_inference_steps: int | None = Field(default=None, gt=0, description="Sampling steps; None: the preset's.")
    sampler: Literal["ddim", "dpm-solver++"] | None = Field(default=None, description="None: the preset's.")
    sample_batch_size: int | None = Field(default=None, gt=0, description="Never changes a result.")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="Of classifier-free guidance, for conditional models; None: the preset's."
    )
    sample_mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        default=None, description="None: the preset's."
    )
    use_ema: bool = Field(default=True, description="Measure the moving average of the weights.")
    save_samples: Path | None = Field(default=None, description="Also write the first 64 images as a PNG grid.")
    n_local_samples: int = Field(default=100, gt=0, description="Images that local behaviors compare.")
    n_noises: int = Field(default=50, gt=0, description="Noise levels for the diffusion loss of each image.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, measure the coalition, record and print the behaviors."""
    arguments = parse(UnlearnArguments, argv, prog=prog, description="Measure the behaviors of a coalition's model.")
    check_method(arguments.method)
    if arguments.precompute_stage == "save":
        raise ConfigError("--precompute_stage save: encodes and stops, which main.py does; leave it out here, or reuse")
    behaviors = behavior_list(arguments.model_behavior)
    features = arguments.features(behaviors)
    checkpoint = load_model(arguments.load)
    check_pruning_flags(arguments, checkpoint)
    full = full_model(arguments, behaviors, checkpoint)
    source = arguments.source(checkpoint.meta.get("source"))
    preset = training_preset(arguments, source.dataset, checkpoint).with_codec(arguments.codec)
    arguments.check_precompute_stage(preset)
    sampling = sample_settings(arguments, preset.sampling)
    train = None
    if arguments.method == "gd":
        train = preset.train_config(
            "gd",
            n_steps=arguments.gd_steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            mixed_precision=arguments.mixed_precision,
            use_8bit_optimizer=arguments.use_8bit_optimizer,
            opt_seed=arguments.opt_seed,
        )
    removal = arguments.removal()
    if arguments.dry_run:
        print_settings(
            {
                "source": source,
                "load": checkpoint.path,
                "method": arguments.method,
                "train": train,
                "sampling": sampling,
                "runtime": arguments.runtime(),
                "behaviors": behaviors,
                "features": features,
                "local": None if full is None else {"full_model": full.path, **dict(local_settings(arguments))},
                "removal": removal,
                "db": arguments.db,
                "exp_name": arguments.exp_name,
            }
        )
        return

    from tribute.diffusion.preflight import Launch, check_precision, check_training
    from tribute.store.records import EvaluationSpec, Store
    from tribute.study.compatibility import check_same_data
    from tribute.study.executors import SerialExecutor
    from tribute.study.outputs import write_image_grid
    from tribute.study.stages import Saving, checkpoint_policy
    from tribute.study.team import Team
    from tribute.study.worker import Worker

    launch = Launch.from_environment()
    if train is not None:
        check_training(train, device=arguments.device, runtime=arguments.runtime(), launch=launch)
    check_precision(sampling.mixed_precision, arguments.device)
    with Store.open(arguments.db) if launch.is_main else nullcontext() as store:
        worker = Worker(
            source,
            preset,
            behaviors=behaviors,
            features=features,
            mixed_precision=train.mixed_precision if train else "no",
            runtime=arguments.runtime(),
            device=arguments.device,
            n_threads=arguments.n_threads,
            reuse_latents=arguments.precompute_stage == "reuse",
            on_block=EncodingReport(),
        )
        check_same_data(checkpoint, worker)
        if full is not None:
            sampling = worker.compare_with(full, sampling.replace(use_ema=arguments.use_ema), local_settings(arguments))
        contributors = worker.data.contributors
        mask = coalition_of(
            removal["removal_dist"],
            contributors.n_contributors,
            arguments.removal_seed,
            datamodel_alpha=arguments.datamodel_alpha,
        )
        opt_seed = arguments.opt_seed
        if train is None:
            method = worker.as_is(checkpoint, use_ema=arguments.use_ema)
            if mask.any():
                opt_seed = int(checkpoint.meta.get("train", {}).get("opt_seed", opt_seed))
        else:
            policy = None
            if arguments.keep_all_ckpts and mask.any():
                name = removal_name(removal["removal_dist"], arguments.datamodel_alpha, arguments.removal_seed)
                folder = models_dir(arguments.outdir, dataset_name(source.dataset, source.contributors), "gd", name)
                policy = checkpoint_policy(
                    worker,
                    Saving(folder, preset.ckpt_freq.get("gd", 1000), keep_all=True),
                    method="gd",
                    coalition_mask=mask,
                    start=checkpoint,
                    removal=removal,
                )
            method = worker.fine_tuning(checkpoint, train, use_ema=arguments.use_ema, checkpoints=policy)
        value_functions = {arguments.method: worker.value_function(method, sampling)}
        team = Team(worker.trainer.processes, value_functions, contributors.n_contributors)
        if store is None:
            team.follow()
            return
        study_id = store.open_study(
            arguments.exp_name,
            dataset=source.dataset,
            contributor_names=contributors.names,
            n_examples=[int(n) for n in contributors.n_examples],
            fingerprint=worker.data.fingerprint,
        )
        spec = EvaluationSpec(
            exp_name=arguments.exp_name,
            dataset=source.dataset,
            method=arguments.method,
            coalition_mask=mask,
            opt_seed=opt_seed,
            settings=worker.settings(sampling, train=train, start=checkpoint.model_hash, use_ema=arguments.use_ema),
            **removal,
        )
        evaluation_ids = store.add(study_id, [spec])
        store.retry(study_id, evaluation_ids=evaluation_ids)
        executor = SerialExecutor(
            team.measure, definitions=worker.behavior_definitions(), provenance=worker.provenance(), max_attempts=1
        )
        images = []
        n_done = executor.run(
            store,
            study_id,
            evaluation_ids=evaluation_ids,
            on_done=lambda claimed, evaluation: images.append(evaluation.images),
        )
        (record,) = store.find(study_id, evaluation_ids=evaluation_ids)
        if record.status != "finished":
            raise StoreError(
                f"the evaluation was not finished: it is {record.status}"
                + (f" ({record.error})" if record.error else f", claimed by {record.owner}")
            )
        present = [name for name, is_in in zip(contributors.names, mask, strict=True) if is_in]
        print_line(f"{len(present)} of {len(mask)} contributors: {', '.join(present) or 'nobody'}")
        real = worker.measurement.measure_real(sampling.n_samples)
        shown = worker.reported_behaviors()
        n_hidden = len(record.behaviors) - len(shown)
        rows = [[name, f"{record.behaviors[name]:.4f}", f"{real[name]:.4f}" if name in real else "-"] for name in shown]
        columns = ["behavior", "value", "real images"] if real else ["behavior", "value"]
        print_table(
            f"{arguments.exp_name}: behaviors of {sampling.n_samples:,} images",
            columns,
            [row[: len(columns)] for row in rows],
            note=f"and {n_hidden:,} values of single images, generated_image_0_mse and so on" if n_hidden else "",
        )
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in record.seconds.items())
        if arguments.save_samples is not None:
            if not images:
                images = [team.measure(arguments.method, mask, opt_seed=opt_seed).images]
            write_image_grid(images[0][:64], arguments.save_samples)
            print_line(f"wrote {arguments.save_samples}")
        team.dismiss()
        print_line(f"{'recorded' if n_done else 'was recorded before'} in {arguments.db} ({seconds})")


def behavior_list(model_behavior: str) -> list[str]:
    """Names of the behaviors that `--model_behavior` means; `local` stays one."""
    from tribute.behaviors.base import GLOBAL_BEHAVIORS

    names: list[str] = []
    for name in (part.strip() for part in model_behavior.split(",")):
        names += GLOBAL_BEHAVIORS if name == "global" else [name] * bool(name)
    return names


def local_settings(arguments: UnlearnArguments) -> LocalConfig:
    """How much local behaviors look at."""
    return LocalConfig(n_samples=arguments.n_local_samples, n_noises=arguments.n_noises)


def full_model(arguments: UnlearnArguments, behaviors: Sequence[str], checkpoint: Checkpoint) -> Checkpoint | None:
    """The model that local behaviors compare with; None where there are none.

    Raises:
        ConfigError: With `retrain`, the model at `--load` is the coalition's own: another one must be named.
    """
    from tribute.behaviors.local import split_local

    local_names, _ = split_local(behaviors)
    if not local_names:
        return None
    if arguments.full_model is not None:
        return load_model(arguments.full_model)
    if arguments.method == "retrain":
        raise ConfigError(
            f"--full_model: {', '.join(local_names)} compare with the full model, and with --method retrain the model "
            "at --load is the coalition's; name the one that main.py --method retrain trained on everybody"
        )
    return checkpoint


def sample_settings(arguments: UnlearnArguments, base: SampleConfig) -> SampleConfig:
    """The preset's sampling with the flags applied."""
    flags = {
        "n_samples": arguments.n_samples,
        "num_inference_steps": arguments.num_inference_steps,
        "sampler": arguments.sampler,
        "batch_size": arguments.sample_batch_size,
        "guidance_scale": arguments.guidance_scale,
        "mixed_precision": arguments.sample_mixed_precision,
    }
    return base.replace(**{key: value for key, value in flags.items() if value is not None})


def check_pruning_flags(arguments: UnlearnArguments, checkpoint: Checkpoint) -> None:
    """Pruning flags describe the model at `--load`; a contradiction is an error.

    For `--method retrain` the model is measured as it is, so they do not matter.
    """
    if arguments.pruning_ratio is not None and not 0 <= arguments.pruning_ratio < 1:
        raise ConfigError(
            "--pruning_ratio: expected the fraction of channels removed, at least 0 and below 1; "
            f"found {arguments.pruning_ratio}"
        )
    if arguments.method != "gd":
        return
    asked = {name: getattr(arguments, name) for name in ("pruning_ratio", "pruner", "thr")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return
    if checkpoint.pruning is None:
        raise MixedResultsError(
            f"--load: {checkpoint.path} is not pruned, but {', '.join('--' + name for name in asked)} "
            "ask for a sparse model. Load what main.py --method prune_fine_tune wrote, or leave these flags out to "
            "fine-tune the full model"
        )
    saved = checkpoint.pruning["settings"]
    wrong = [f"--{name}: saved {saved[name]}, asked {value}" for name, value in asked.items() if saved[name] != value]
    if wrong:
        raise MixedResultsError(f"--load: {checkpoint.path} was pruned by other settings: {'; '.join(wrong)}")
