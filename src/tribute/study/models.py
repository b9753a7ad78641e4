"""The two models that a study begins with: the full model and the sparse one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tribute.config import Preset, StudyConfig, TrainConfig
from tribute.diffusion.train import Progress
from tribute.games.coalitions import grand_coalition
from tribute.models.checkpoint import Checkpoint, load_checkpoint
from tribute.study.budget import Budget
from tribute.study.compatibility import check_same_data
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.listener import Listener
from tribute.study.session import train_settings
from tribute.study.stages import Saving, prune_model, train_model
from tribute.study.worker import Worker


def train_and_prune(
    config: StudyConfig,
    preset: Preset,
    worker: Worker,
    listener: Listener,
    loaded: Checkpoint | None,
    budget: Budget | None = None,
) -> tuple[Checkpoint, Checkpoint]:
    """The full model, trained unless it was loaded, and the sparse model fine-tuned on everyone.

    Raises:
        StoppedEarly: The budget does not suffice; the models continue from what is saved.
    """
    everyone = grand_coalition(worker.data.contributors.n_contributors)

    def saving(name: str, train: TrainConfig, method: str, *parts: str) -> Saving:
        freq = config.ckpt_freq or preset.ckpt_freq.get(method, 1000)
        folder = models_dir(config.run_dir, dataset_folder(config.dataset), method, *parts)
        return Saving(folder, freq, stop_early=None if budget is None else budget.model(name, train.n_steps))

    def report(title: str) -> Any:
        def on_log(at: Progress) -> None:
            text = f"loss {at.loss:.4f}, {at.images_per_second:,.0f} images/s"
            listener.progress(title, at.step, at.n_steps, text)

        return on_log

    listener.stage("Full model")
    if loaded is not None:
        check_same_data(loaded, worker)
        full = loaded
        listener.message(f"loaded from {config.full_model.load}")
    else:
        settings = train_settings(preset, config.full_model, "retrain", config.opt_seed)
        full = train_model(
            worker,
            settings,
            saving("full", settings, "retrain", "full"),
            method="retrain",
            coalition_mask=everyone,
            on_log=report("training"),
        )
    listener.stage("Sparse model")
    with worker.trainer.processes.main_first():
        pruned, result = prune_model(worker, full, config.prune, _pruned_dir(config))
    summary = pruned.meta["pruning"] if result is None else result.summary()
    parameters, macs = summary["n_parameters"], summary["n_macs"]
    listener.message(
        f"{config.prune.pruner} pruning: parameters {parameters['before']:,} -> {parameters['after']:,}, "
        f"multiply-accumulates {macs['before']:,} -> {macs['after']:,}"
    )
    settings = train_settings(preset, config.sparse_model, "prune_fine_tune", config.opt_seed)
    sparse = train_model(
        worker,
        settings,
        saving("sparse", settings, "prune_fine_tune", pruning_name(config.prune), "full"),
        method="prune_fine_tune",
        coalition_mask=everyone,
        start=pruned,
        on_log=report("fine-tuning"),
    )
    return full, sparse


def _pruned_dir(config: StudyConfig) -> Path:
    return models_dir(config.run_dir, dataset_folder(config.dataset), "pruned", pruning_name(config.prune))


def load_pruned_summary(config: StudyConfig) -> dict[str, Any]:
    """Figures of the pruning stage, read back from its checkpoint."""
    return dict(load_checkpoint(_pruned_dir(config)).meta["pruning"])
