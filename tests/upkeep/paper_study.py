"""A study that exists on paper: folders of checkpoints and a store, as a run leaves them, without a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tribute.config import StudyConfig, fingerprint
from tribute.store.records import EvaluationSpec, Store
from tribute.study.evaluations import plan_evaluations
from tribute.study.record import StudyRecord, by_role
from tribute.study.status import model_folders
from tribute.study.upkeep import model_hash

N = 6
WORTH = np.linspace(1.0, 2.0, N)
DEFINITION = {"unit": "points", "higher_is_better": True, "variant": "paper"}


@dataclass(frozen=True)
class PaperStudy:
    """Settings, where they are written, the record and the plan."""

    config: StudyConfig
    path: Path
    record: StudyRecord
    specs: list[EvaluationSpec]

    def store(self) -> Store:
        return Store.open(self.config.db_url)

    def study_id(self, store: Store) -> int:
        return store.open_study(
            self.config.name,
            dataset=self.config.dataset,
            contributor_names=self.record.contributor_names,
            n_examples=self.record.n_examples,
            fingerprint=self.record.fingerprint,
        )

    def finish(self, store: Store, n: int | None = None, **filters: Any) -> int:
        """Measure so many evaluations; how many there were."""
        study_id, n_done = self.study_id(store), 0
        while (n is None or n_done < n) and (claimed := store.claim(study_id, **filters)) is not None:
            value = 3.0 + float(claimed.spec.coalition_mask @ WORTH)
            seconds = {"train": 2.0, "sample": 1.0}
            store.finish(claimed, {"worth": value}, seconds=seconds, provenance={}, definitions={"worth": DEFINITION})
            n_done += 1
        return n_done

    def by_status(self) -> dict[str, dict[str, int]]:
        """Evaluations in the store, by role and status."""
        found: dict[str, dict[str, int]] = {}
        with self.store() as store:
            for item in store.find(self.study_id(store)):
                of_role = found.setdefault(item.spec.role or "", {})
                of_role[item.status] = of_role.get(item.status, 0) + 1
        return found


def write_checkpoint(folder: Path, n_steps: int, content: str) -> Path:
    """A checkpoint whose hashes are right, whatever it holds."""
    path = folder / f"ckpt_steps_{n_steps:08d}"
    path.mkdir(parents=True)
    for name in ("unet", "ema", "training_state"):
        (path / f"{name}.safetensors").write_text(f"{name} of {content}")
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}
    meta = {"n_steps": n_steps, "files": files, "format_version": 1, "seconds_train": 5.0}
    (path / "config.json").write_text(json.dumps({**meta, "sha256": fingerprint(meta)}))
    return path


def write_study(folder: Path, *, local: bool = False, **changes: Any) -> PaperStudy:
    """A study whose models are there and whose evaluations are pending."""
    values = {
        "name": "paper",
        "outdir": str(folder / "runs"),
        "behaviors": ["worth"],
        "fit": {"n_coalitions": 20, "n_end_points": 2},
        "test": {"n_coalitions": 4, "opt_seeds": [1, 2]},
    }
    values |= changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    config = StudyConfig.from_yaml(path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    folders = model_folders(config)
    preset = config.load_preset()
    full = write_checkpoint(folders["full"], preset.train_config("retrain").n_steps, "full")
    write_checkpoint(folders["pruned"], 0, "pruned")
    sparse = write_checkpoint(folders["sparse"], preset.train_config("prune_fine_tune").n_steps, "sparse")
    compared = {"behaviors": {"local": {"full_model": model_hash(full)}}} if local else {"behaviors": {}}
    settings = {"gd": {"start": model_hash(sparse), **compared}, "retrain": {"start": "f" * 64, **compared}}
    specs = list(plan_evaluations(config, N, settings))
    record = StudyRecord(
        name=config.name,
        dataset=config.dataset,
        contributor_names=tuple(f"contributor {i}" for i in range(N)),
        n_examples=(10,) * N,
        fingerprint="d" * 64,
        behaviors=("worth",),
        evaluations=by_role(specs),
        models={},
        classifier_accuracy=None,
        provenance={},
    )
    record.write(config.run_dir)
    study = PaperStudy(config, path, record, specs)
    with study.store() as store:
        store.add(study.study_id(store), specs)
    return study


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file, by path."""

    def walk() -> Iterator[Path]:
        return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())

    return {str(path.relative_to(folder)): path.read_bytes() for path in walk()}
