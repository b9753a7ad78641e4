"""What a study's results are made from, gathered from the process that has it all loaded, for the manifest."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tribute.behaviors.classifier import train_or_load_classifier
from tribute.behaviors.extractors import CLASSIFIER
from tribute.config import StudyConfig
from tribute.models.checkpoint import Checkpoint, load_checkpoint
from tribute.models.pipelines import is_foreign
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.manifest import Ingredients, last_part, without_places
from tribute.study.session import StudySession


def gather_ingredients(config: StudyConfig, session: StudySession, full: Checkpoint, sparse: Checkpoint) -> Ingredients:
    """What the results of a study are made from.

    Args:
        config: The study.
        session: With data and extractors.
        full: Trained on everybody.
        sparse: Pruned and fine-tuned on everybody.
    """
    pruned = load_checkpoint(
        models_dir(config.run_dir, dataset_folder(config.dataset), "pruned", pruning_name(config.prune))
    )
    worker = session.worker
    seed = inspect.signature(train_or_load_classifier).parameters["seed"].default
    extractors: dict[str, dict[str, Any]] = {
        name: {"fingerprint": found, **({"seed": seed} if name == CLASSIFIER else {})}
        for name, found in worker.measurement.fingerprints().items()
    }
    codec = None
    if worker.latent_space is not None:
        saved = worker.latent_space.record()
        codec = {**{name: saved[name] for name in ("fingerprint", "scaling_factor", "factor")}}
        codec["name"] = last_part(str(saved["path"]))
    return Ingredients(
        data=worker.data.manifest,
        preset=session.preset.model_dump(mode="json"),
        full_model=describe_model(full, config.run_dir),
        pruned_model=describe_model(pruned, config.run_dir),
        sparse_model=describe_model(sparse, config.run_dir),
        codec=codec,
        extractors=extractors,
    )


def describe_model(checkpoint: Checkpoint, run_dir: Path) -> dict[str, Any]:
    """A model's place below the run folder, its identity and its files; of one that lies elsewhere, its name.

    The state of the optimizer is no part of it: it may be deleted once training has ended.
    """
    folder, root = checkpoint.path.resolve(), run_dir.resolve()
    inside = folder.is_relative_to(root) and not is_foreign(checkpoint)
    files = {name: sha for name, sha in checkpoint.meta["files"].items() if not name.startswith("training_state")}
    described = {
        "path": folder.relative_to(root).as_posix() if inside else None,
        "n_steps": checkpoint.n_steps,
        "model_hash": checkpoint.model_hash,
        "files": files,
    }
    if inside:
        return described
    origin = without_places(checkpoint.meta["origin"]) if is_foreign(checkpoint) else {"name": folder.name}
    return described | {"origin": origin}
