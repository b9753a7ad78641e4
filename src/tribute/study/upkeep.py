"""Throwing away results of a study, or what it no longer needs: first a list with sizes, then, when asked, the deed.

Nothing outside a run folder, the store of the study and the cache is touched, links are not followed, and what a
process of this host has open is left alone. A folder is renamed before it is deleted, so that a crash in between
leaves no half checkpoint, only a leftover that the next `tribute gc` finds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tribute.config import StudyConfig, fingerprint
from tribute.errors import ConfigError, StoreError
from tribute.files import sha256_of_file
from tribute.store.records import Store, StoredEvaluation
from tribute.study.pictures import FILE_NAME as PICTURES_NAME
from tribute.study.pilot_record import FILE_NAME as PILOT_NAME
from tribute.study.record import FILE_NAME, StudyRecord
from tribute.study.status import ModelName, checkpoint_folders, model_folders, store_exists

ROLES = ("empty", "grand", "fit", "loo", "test")
STAGES = ("full_model", "pruned_model", "sparse_model", "coalitions", *ROLES)
"""What can be reset."""

OUTPUTS = ("attributions.csv", "attributions.parquet", "summary.json", "attributions.png", "lds.png", "manifest.json")
"""Files that `tribute run` writes from the results, and writes anew."""

Kind = Literal["checkpoints", "damaged", "leftovers", "evaluations", "backups", "images", "cache"]
KINDS: tuple[Kind, ...] = ("checkpoints", "damaged", "leftovers", "evaluations", "backups", "images", "cache")

SETTLED_SECONDS = 3600.0
"""A leftover must have been left alone for so long: its process may be on another host."""

_MODEL_OF_STAGE: dict[str, ModelName] = {"full_model": "full", "pruned_model": "pruned", "sparse_model": "sparse"}
_MODEL_ORDER: tuple[ModelName, ...] = ("full", "pruned", "sparse")
_LEFTOVER = re.compile(r"^\.?(?P<name>.+)\.(?P<pid>[^.]+)\.(?P<kind>partial|replaced|deleted)$")
_DAMAGED = re.compile(r"\.damaged(-[0-9a-f]+)?$")
_BACKUP = re.compile(r"\.schema-\d+\.bak$")


@dataclass(frozen=True)
class Doomed:
    """A file or folder that may go.

    Attributes:
        kind: Why.
        path: Where it is.
        n_bytes: How much room it takes.
        reason: What it is, for people.
        last_used: When it was last read or written, by the file system, seconds since the epoch.
    """

    kind: Kind
    path: Path
    n_bytes: int
    reason: str
    last_used: float


@dataclass(frozen=True)
class Waste:
    """What may be deleted, and what was looked at and stays.

    Attributes:
        files: Files and folders.
        evaluations: Evaluations in the store that the study no longer asks for.
        seconds: Of work that they took.
        kept: What stays although it looks like waste, with the reason.
    """

    files: tuple[Doomed, ...] = ()
    evaluations: tuple[StoredEvaluation, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    kept: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Room that the files take."""
        return sum(item.n_bytes for item in self.files)

    def __bool__(self) -> bool:
        return bool(self.files or self.evaluations)


@dataclass(frozen=True)
class Reset:
    """What goes when a stage is reset.

    Attributes:
        stage: Which.
        forgotten: Evaluations that become pending again, as if they had never been measured.
        deleted: Evaluations of a model that goes; `tribute run` asks for others in their place.
        models: Folders of models.
        outputs: Files made from the results.
    """

    stage: str
    forgotten: tuple[StoredEvaluation, ...] = field(default=(), repr=False)
    deleted: tuple[StoredEvaluation, ...] = field(default=(), repr=False)
    models: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.forgotten or self.deleted or self.models)

    @property
    def evaluations(self) -> tuple[StoredEvaluation, ...]:
        """All evaluations whose results go."""
        return (*self.forgotten, *self.deleted)

    @property
    def n_bytes(self) -> int:
        """Room that the files take."""
        return sum(size_of(path) for path in (*self.models, *self.outputs))

    @property
    def seconds(self) -> float:
        """Of work that the evaluations took."""
        return seconds_of(self.evaluations)

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of evaluations by role and status."""
        found: dict[str, Counter[str]] = {}
        for item in self.evaluations:
            found.setdefault(item.spec.role or "fit", Counter())[item.status] += 1
        return {role: dict(counter) for role, counter in found.items()}


def plan_reset(config: StudyConfig, stage: str, store: Store | None) -> Reset:
    """What goes when a stage and all that depends on it is thrown away.

    A model takes along the models made from it, and those evaluations whose identity names one of them: by
    sparsified fine-tuning, all that began with it; by retraining, those with local behaviors, which compare with the
    full model. Retrained models begin with random weights, so other test evaluations stay. What a pilot found of a
    model goes with it. A role takes its evaluations, `coalitions` all of the study's.

    Args:
        config: The study.
        stage: One of `STAGES`.
        store: Its store; None where there is none yet.

    Raises:
        ConfigError: The stage is unknown, or its model was loaded and not trained, or lies elsewhere behind a link.
        StoreError: The record or a checkpoint of the study cannot be read.
    """
    if stage not in STAGES:
        raise ConfigError(f"--stage: expected one of {', '.join(STAGES)}; found {stage!r}")
    outputs = tuple(path for name in OUTPUTS if (path := config.run_dir / name).is_file() and not path.is_symlink())
    if stage not in _MODEL_OF_STAGE:
        record = StudyRecord.read(config)
        items = () if store is None else measured(store, record, ROLES if stage == "coalitions" else (stage,))
        return Reset(stage, forgotten=items, outputs=outputs if items else ())
    if stage == "full_model" and config.full_model.load is not None:
        raise ConfigError(
            f"--stage full_model: this study loads its full model from {config.full_model.load}, which is not the "
            "study's to delete. Use --stage pruned_model, or give the study another name to begin with another model"
        )
    folders = model_folders(config)
    first = _MODEL_ORDER.index(_MODEL_OF_STAGE[stage])
    # What depends on another goes first, so that a crash leaves no model without the one it was made from.
    models = tuple(folders[name] for name in reversed(_MODEL_ORDER[first:]) if _is_plain_folder(folders[name]))
    for folder in models:
        if not folder.resolve().is_relative_to(config.run_dir.resolve()):
            raise ConfigError(
                f"--stage {stage}: expected its models in {config.run_dir}; {folder} is in {folder.resolve()}, behind "
                "a link, and may be another study's. Remove the link instead"
            )
    hashes = {model_hash(path) for folder in models for path in checkpoint_folders(folder)}
    deleted: tuple[StoredEvaluation, ...] = ()
    if store is not None:
        found = store.studies(name=config.name, dataset=config.dataset)
        ids = [item.study_id for item in found if item.study_id is not None]
        deleted = tuple(item for study_id in ids for item in store.find(study_id) if depends_on(item, hashes))
    if models:
        of_models = (config.run_dir / name for name in (PILOT_NAME, FILE_NAME))
        outputs = (*outputs, *(path for path in of_models if path.is_file() and not path.is_symlink()))
    return Reset(stage, deleted=deleted, models=models, outputs=outputs if models or deleted else ())


def apply_reset(reset: Reset, store: Store | None) -> None:
    """Do it: the evaluations first, in one transaction, then the files; done again after a crash it goes on.

    The caller holds the lock of the run folder.

    Raises:
        StoreError: One of the evaluations is being measured, the store does not answer, or a file cannot be deleted.
    """
    if store is not None:
        for study_id in {item.study_id for item in reset.forgotten}:
            ids = [item.evaluation_id for item in reset.forgotten if item.study_id == study_id]
            store.reset(study_id, evaluation_ids=ids)
        for study_id in {item.study_id for item in reset.deleted}:
            ids = [item.evaluation_id for item in reset.deleted if item.study_id == study_id]
            store.delete(study_id, evaluation_ids=ids)
    for path in (*reset.outputs, *reset.models):
        remove(path)


def measured(store: Store, record: StudyRecord, roles: Sequence[str]) -> tuple[StoredEvaluation, ...]:
    """The planned evaluations of some roles that were begun, whatever came of them."""
    if not store.studies(name=record.name, dataset=record.dataset):
        return ()
    ids = record.evaluation_ids(store, roles=roles)
    statuses = ("running", "finished", "failed")
    return tuple(store.find(record.study_id(store), evaluation_ids=ids, statuses=statuses)) if ids else ()


def depends_on(item: StoredEvaluation, hashes: Iterable[str]) -> bool:
    """Whether the identity of an evaluation names one of these models."""
    settings = json.dumps(item.spec.settings)
    return any(f'"{sha256}"' in settings for sha256 in hashes)


def model_hash(checkpoint: Path) -> str:
    """The identity of a checkpoint's model, as `models.checkpoint.Checkpoint.model_hash`, without reading the weights.

    Raises:
        StoreError: Its `config.json` cannot be read.
    """
    try:
        files = dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{checkpoint / 'config.json'} cannot be read ({error}), so that it is not known which evaluations began "
            "with this model. Move the checkpoint away, and delete the evaluations that nothing asks for any more "
            "with tribute gc after the next tribute run"
        ) from error
    return fingerprint({name: value for name, value in files.items() if not name.startswith("training_state")})


def seconds_of(items: Iterable[StoredEvaluation]) -> float:
    """Seconds of work in finished evaluations."""
    return sum(sum(item.seconds.values()) for item in items)


def find_waste(config: StudyConfig, store: Store | None, *, of_server: bool = False) -> Waste:
    """What a study no longer needs: in its run folder, in its store and beside that.

    - `checkpoints`: those before the last one, where the last one is whole
    - `damaged`: checkpoints that could not be read and were kept aside
    - `leftovers`: what processes that have ended left half-written
    - `evaluations`: those in the store that the study, as it was last run, does not ask for; not those of a role
      besides its own, as of a pilot
    - `backups`: copies of the store from before a migration, unless other studies are in it
    - `images`: folders of generated images, but for the pictures of the study, which are results

    Args:
        config: The study.
        store: Its store; None where there is none.
        of_server: Also look for evaluations in the store of a server, where run folders on other hosts may ask for
            what this one does not.
    """
    root = config.run_dir
    in_use = paths_in_use()
    found: list[Doomed] = []
    kept: list[str] = []
    for folder, names in _walk(root):
        checkpoints = checkpoint_folders(folder)
        if len(checkpoints) > 1:
            if is_whole(checkpoints[-1]):
                found += [_doomed("checkpoints", path, f"{checkpoints[-1].name} is whole") for path in checkpoints[:-1]]
            else:
                kept.append(f"{folder}: all checkpoints, as the last one is not whole")
        for name in names:
            path = folder / name
            if _DAMAGED.search(name):
                found.append(_doomed("damaged", path, "could not be read and was kept aside"))
            elif (left := _LEFTOVER.match(name)) is not None:
                found += _leftover(path, left, kept)
            elif _BACKUP.search(name):
                found.append(_doomed("backups", path, "the store before its schema was migrated"))
            elif name in ("samples", "images") and _is_plain_folder(path) and not (path / PICTURES_NAME).exists():
                found.append(_doomed("images", path, "generated images"))
    evaluations: tuple[StoredEvaluation, ...] = ()
    if store is not None and (root / FILE_NAME).exists():
        evaluations = unasked(store, StudyRecord.read(config))
        if evaluations and store.serves_many_hosts and not of_server:
            kept.append(
                f"{len(evaluations)} evaluations in {store.location} that this run folder does not ask for: run "
                "folders on other hosts may. Where none does, give --what evaluations"
            )
            evaluations = ()
    is_shared = store is not None and len(store.studies()) > 1
    if "://" not in config.db_url and not is_shared:
        place = Path(config.db_url).expanduser()
        if not place.resolve().is_relative_to(root.resolve()) and place.parent.is_dir():
            beside = (path for path in place.parent.iterdir() if path.name.startswith(place.name))
            found += [
                _doomed("backups", path, "the store before its schema was migrated")
                for path in beside
                if _BACKUP.search(path.name) and path.is_file() and not path.is_symlink()
            ]
    return _without_used(Waste(tuple(found), evaluations, seconds_of(evaluations), tuple(kept)), in_use)


def unasked(store: Store, record: StudyRecord) -> tuple[StoredEvaluation, ...]:
    """Evaluations at rest under the name of a study that its last plan does not ask for."""
    if not store.studies(name=record.name, dataset=record.dataset):
        return ()
    asked = {identity for identities in record.evaluations.values() for identity in identities}
    statuses = ("pending", "finished", "failed")
    return tuple(
        item
        for item in store.find(record.study_id(store), exp_name=record.name, statuses=statuses)
        if (item.spec.role or "fit") in ROLES and item.spec.identity not in asked
    )


def find_cache_waste(cache_dir: Path) -> Waste:
    """Every entry of the cache that no process of this host has open; all of them are made again when they are needed.

    An entry is a folder of images, latents, features or a classifier, or a list of hashes. Latents that are being
    encoded, by whichever process, are left alone until an hour after the last block.
    """
    found: list[Doomed] = []
    kept: list[str] = []
    kinds = {
        "tensors": "decoded images",
        "latents": "latents",
        "references": "features of real images",
        "classifiers": "a classifier",
        "hashes": "hashes of source files",
    }
    for name, what in kinds.items():
        folder = cache_dir / name
        if not _is_plain_folder(folder):
            continue
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or path.suffix == ".lock":
                continue
            if _DAMAGED.search(path.name):
                found.append(_doomed("damaged", path, f"{what}, damaged"))
            elif path.name.startswith("."):
                if time.time() - _last_used(path, written=True) > SETTLED_SECONDS:
                    found.append(_doomed("leftovers", path, f"{what}, unfinished"))
                else:
                    kept.append(f"{path}: was worked on within the hour")
            else:
                found.append(_doomed("cache", path, what))
    return _without_used(Waste(tuple(found), kept=tuple(kept)), paths_in_use())


def clean(waste: Waste, store: Store | None) -> None:
    """Delete it; the caller holds the lock of the run folder, where there is one.

    Raises:
        StoreError: An evaluation is being measured, the store does not answer, or a file cannot be deleted.
    """
    if store is not None:
        for study_id in {item.study_id for item in waste.evaluations}:
            ids = [item.evaluation_id for item in waste.evaluations if item.study_id == study_id]
            store.delete(study_id, evaluation_ids=ids)
    for item in waste.files:
        remove(item.path)


def only(waste: Waste, kinds: Sequence[Kind]) -> Waste:
    """The part of some kinds."""
    evaluations = waste.evaluations if "evaluations" in kinds else ()
    files = tuple(item for item in waste.files if item.kind in kinds)
    return Waste(files, evaluations, seconds_of(evaluations), waste.kept)


def remove(path: Path) -> None:
    """Delete a file or a folder, which is renamed first; one that is not there is no error.

    A link is removed, never what it points to.

    Raises:
        StoreError: It cannot be deleted.
    """
    doomed = path.with_name(f".{path.name}.{os.getpid()}.deleted")
    if _LEFTOVER.match(path.name):
        doomed = path  # it has such a name already
    try:
        if doomed != path:
            path.replace(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(
            f"{path} cannot be deleted ({error}); what was deleted before it stays deleted. Make its folder writable "
            "and give the same command again"
        ) from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum((folder / name).lstat().st_size for folder, names in _walk(path, files=True) for name in names)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint has the SHA-256 that its `config.json` names."""
    try:
        meta: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        recorded = meta.pop("sha256", None)
        if recorded not in (None, fingerprint(meta)):
            return False
        files: Mapping[str, str] = meta["files"]
        return bool(files) and all(sha256_of_file(checkpoint / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def paths_in_use() -> set[Path]:
    """Files that processes of this host, as far as this user may see, have open or mapped into memory.

    Empty where there is no /proc.
    """
    found: set[Path] = set()
    own = os.getpid()
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(own):
            continue
        with suppress(OSError, UnicodeDecodeError):
            for line in (process / "maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/"):
                    found.add(Path(fields[5]))
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    target = link.readlink()
                    if target.is_absolute():
                        found.add(target)
    return found


def _without_used(waste: Waste, in_use: set[Path]) -> Waste:
    """Without what a process has open."""
    used_folders = {parent for path in in_use for parent in (path, *path.parents)}
    files, kept = [], list(waste.kept)
    for item in waste.files:
        if item.path.resolve() in used_folders:
            kept.append(f"{item.path}: in use by a process")
        else:
            files.append(item)
    return Waste(tuple(files), waste.evaluations, waste.seconds, tuple(kept))


def _leftover(path: Path, left: re.Match[str], kept: list[str]) -> list[Doomed]:
    """What a process left, if it has ended and what it was writing is there in another form, or never was."""
    age = time.time() - _last_used(path, written=True)
    pid = left["pid"]
    if age < SETTLED_SECONDS or (pid.isdigit() and Path(f"/proc/{pid}").exists()):
        kept.append(f"{path}: its process may still be at work")
        return []
    if left["kind"] == "replaced" and not path.with_name(left["name"]).exists():
        # A crash between two renames: this is the only copy.
        kept.append(f"{path}: the only copy of {left['name']}; rename it to that by hand")
        return []
    return [_doomed("leftovers", path, "left by a process that has ended")]


def _doomed(kind: Kind, path: Path, reason: str) -> Doomed:
    return Doomed(kind, path, size_of(path), reason, _last_used(path))


def _last_used(path: Path, *, written: bool = False) -> float:
    """When a file, or anything below a folder, was last written or, unless `written`, read."""

    def at(item: Path) -> float:
        status = item.lstat()
        return max(status.st_mtime, status.st_atime if item.is_file() and not written else 0.0)

    times = [at(path)]
    if _is_plain_folder(path):
        with suppress(FileNotFoundError):  # somebody else deletes at the same time
            times += [at(folder / name) for folder, names in _walk(path, files=True) for name in names]
    return max(times)


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _walk(root: Path, *, files: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """Folders below a root, that included, with the names in each; links are not followed.

    Args:
        root: Where to begin.
        files: Only names of files (and links) instead of all names, and into every folder; else what may go as a
            whole is not looked into.
    """
    for folder, folders, names in os.walk(root, followlinks=False):
        here = Path(folder)
        if files:
            links = [name for name in folders if (here / name).is_symlink()]
            yield here, names + links
            continue
        yield here, sorted(folders + names)
        folders[:] = [
            name
            for name in sorted(folders)
            if not (_DAMAGED.search(name) or _LEFTOVER.match(name) or name in ("samples", "images"))
            and not name.startswith("ckpt_steps_")
        ]


def study_of_run_dir(run_dir: Path) -> StudyConfig:
    """The settings of the study whose run folder this is, wherever it was moved to.

    Raises:
        ConfigError: It is none.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run folder of a study: expected a config.yaml in it. Give STUDY.yaml")
    run_dir = run_dir.resolve()
    config = StudyConfig.from_yaml(path)
    if config.run_dir.resolve() != run_dir:  # where it is the same, its settings stay as they are, to the letter
        config = config.replace(outdir=run_dir.parent)
    if config.name != run_dir.name:
        raise ConfigError(
            f"{run_dir}: expected a folder named like its study, {config.name!r}, as its store is looked for there. "
            "Rename the folder"
        )
    return config


def existing_store(config: StudyConfig) -> Store | None:
    """The store of a study, open for writing; None where there is none."""
    return Store.open(config.db_url, create=False) if store_exists(config) else None
