"""The manifest of a run: a hash of everything that a study's numbers rest on, and one hash over all of it.

`manifest.json` lies in the run folder. It is written whole or not at all at the end of every run, read without PyTorch,
and says nothing of the machine's users or folders, so that it may be published. `hash` covers all the rest of the file;
`result_hash` only what two runs of one study on one machine must agree on. Numbers that are not whole are written as
hexadecimal text (`float.hex`), so that every bit counts and a hash does not depend on how a language prints floats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tribute.config import StudyConfig, fingerprint
from tribute.errors import FitError, StoreError
from tribute.files import sha256_of_file, write_whole
from tribute.store.records import Store, StoredEvaluation, Study
from tribute.study import record as study_record
from tribute.study.attribution import Validation
from tribute.study.record import StudyRecord
from tribute.study.results import StudyResult, read_result
from tribute.types import Attributions

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
CONFIG_NAME = "config.yaml"
OUTPUT_NAMES = (
    *("attributions.csv", "attributions.parquet", "summary.json", "attributions.png", "lds.png"),
    *("pilot.json", "pictures.json"),
)
"""Files of results that are hashed where they are there, with the pictures in `samples/`; `report.html` shows the
manifest's own hash, so it cannot be in the manifest."""
_SAMPLES = "samples"

_OF_ONE_PROCESS = ("n_steps", "host", "pid")
_SHORT = 16  # hexadecimal digits that tell evaluations apart; what is to be trusted is the digest of them all
_NOT_PART_OF_RESULTS = {
    # Where things are, and what they are called: their content is hashed.
    *("name", "outdir", "db", "data_dir", "codec", "preset", "ckpt_freq"),
    # Who computes, and for how long: never changes a result by more than rounding, which the values would show.
    *("n_threads", "runtime", "execution", "max_device_hours", "pilot", "pictures"),
}
_PLACES_OF_FEATURES = ("weights", "models", "revisions", "aesthetic_head", "batch_size")


@dataclass(frozen=True)
class Ingredients:
    """What a study's results are made from, as far as only a process knows that has loaded it; plain JSON values.

    Attributes:
        data: Manifest of the training data: fingerprint, hashes, contributors, origin.
        preset: The recipe, as resolved for the study.
        full_model: Where the full model is, in or outside the run folder; its hash and files.
        pruned_model: The same of the pruned model.
        sparse_model: The same of the sparse model.
        codec: Fingerprint and scaling of the codec; None for models of pixels.
        extractors: Fingerprint of each feature extractor, and the seed of one that was trained.
    """

    data: Mapping[str, Any]
    preset: Mapping[str, Any]
    full_model: Mapping[str, Any]
    pruned_model: Mapping[str, Any]
    sparse_model: Mapping[str, Any]
    codec: Mapping[str, Any] | None
    extractors: Mapping[str, Mapping[str, Any]]

    @property
    def models(self) -> dict[str, Mapping[str, Any]]:
        return {"full": self.full_model, "pruned": self.pruned_model, "sparse": self.sparse_model}


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read.

    Attributes:
        values: The whole file.
    """

    values: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 that the file names for all the rest of it."""
        return str(self.values["hash"])

    @property
    def result_hash(self) -> str:
        """SHA-256 that the file names for what equal runs agree on."""
        return str(self.values["result_hash"])

    @property
    def written(self) -> str:
        """When it was written, UTC, as `2026-01-31T12:00:00Z`."""
        return str(self.values["written"])

    @property
    def version(self) -> str:
        """Version of Tribute."""
        return str(self.values["environment"]["tribute"])

    @property
    def commit(self) -> str | None:
        """Commit of the source checkout, with `+` where it was changed; None outside one."""
        return self.values["environment"]["commit"]

    @property
    def python(self) -> str:
        return str(self.values["environment"]["python"])

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that results rest on."""
        return dict(self.values["environment"]["versions"])

    @property
    def devices(self) -> list[str]:
        """Names of the processors and accelerators that measured the evaluations."""
        return sorted({str(found["device"]) for found in self.values["measured_on"] if found.get("device")})

    def find_hash(self) -> str:
        """The hash as it follows from the rest of the file."""
        return hash_of_manifest(self.values)

    def find_result_hash(self) -> str:
        """The result hash as it follows from the section `result`."""
        return fingerprint(self.values["result"])


def read_manifest(run_dir: Path) -> Manifest | None:
    """The manifest in a run folder; None where there is none.

    Raises:
        StoreError: It cannot be read, or a newer version wrote it.
    """
    path = run_dir / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = int(values["format_version"])
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{path} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade Tribute "
                "(pip install --upgrade tribute)"
            )
        _check_shape(values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} cannot be read as a manifest ({type(error).__name__}: {error}); expected the file that tribute "
            "run writes. Restore it, or run tribute run again, which writes it anew"
        ) from error
    return Manifest(values)


def _check_shape(values: Any) -> None:
    """Refuse what is no manifest, so that whoever uses one need not expect anything: it may have been tampered with.

    Raises:
        ValueError, KeyError, TypeError: Something is missing, is of another type, or leads out of the run folder.
    """

    def texts(found: Any) -> dict[str, str]:
        if not isinstance(found, dict) or not all(isinstance(item, str) for item in found.values()):
            raise TypeError("expected texts by name")
        return found

    def below(name: str) -> None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{name!r} is not below the run folder")

    texts({name: values[name] for name in ("hash", "result_hash", "written")})
    environment = values["environment"]
    texts({"tribute": environment["tribute"], "python": environment["python"], **texts(environment["versions"])})
    texts({"commit": environment["commit"] or ""})
    for found in values["measured_on"]:
        found.get("device")
    for name in texts(values["files"]):
        below(name)
    for model in values["models"].values():
        texts({"model_hash": model["model_hash"], "path": model["path"] or "", **texts(model["files"])})
        for name in (model["path"] or "", *model["files"]):
            below(name)
    texts({"digest": values["store"]["digest"], **texts(values["store"]["evaluations"])})
    texts({"fingerprint": values["data"]["fingerprint"]})
    _, _, _ = (int(n) for n in values["data"]["image_shape"])
    for name in ("name", "dataset", "contributors", "n_examples", "n_planned", "n_finished"):
        _ = values["study"][name]
    for section in ("attributions", "lds"):
        for kernels in values[section].values():
            for fitted in kernels.values():
                fitted.items()
    for found in (values["seeds"], values["codec"] or {}, *values["extractors"].values()):
        dict(found)
    texts({name: values["result"][name] for name in ("data", "settings", "behaviors", "attributions", "lds")})


def hash_of_manifest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all but `hash` itself."""
    return fingerprint({name: value for name, value in values.items() if name != "hash"})


def read_and_attest(config: StudyConfig, record: StudyRecord, store: Store, ingredients: Ingredients) -> StudyResult:
    """The result of a study, with its manifest written into the run folder; also where too little can be fitted.

    Raises:
        FitError: Too little is measured; the manifest then has no attributions.
        StoreError: The manifest cannot be written.
    """
    try:
        result = read_result(config, record, store)
    except FitError:
        write_manifest(config.run_dir, describe_run(config, record, store, ingredients, None))
        raise
    write_manifest(config.run_dir, describe_run(config, record, store, ingredients, result))
    return result


def write_manifest(run_dir: Path, values: Mapping[str, Any]) -> Manifest:
    """Write a manifest with its hash and the time, unless the one that is there says the same.

    So a study that is run again without anything to do keeps the hash that may have been published.

    Raises:
        StoreError: The folder is not writable.
    """
    try:
        earlier = read_manifest(run_dir)
    except StoreError:  # damaged, or of another version: what is written now is right
        earlier = None
    if earlier is not None and earlier.hash == earlier.find_hash() and _without_time(earlier.values) == values:
        return earlier
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    complete = {"format_version": FORMAT_VERSION, "written": written, **values}
    complete["hash"] = hash_of_manifest(complete)
    try:
        write_whole(run_dir / FILE_NAME, json.dumps(complete, indent=1, allow_nan=False))
    except OSError as error:
        raise StoreError(
            f"{run_dir / FILE_NAME} could not be written ({error}); the results are safe in the store. Make room and "
            "run the same command again"
        ) from error
    return Manifest(complete)


def update_outputs(run_dir: Path) -> Manifest | None:
    """Hash the files of results again, after they were written; returns None where there is no manifest.

    Raises:
        StoreError: The manifest is damaged, or the folder is not writable.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return None
    outputs = {name: sha256_of_file(run_dir / name) for name in find_outputs(run_dir)}
    others = {name: found for name, found in manifest.values["files"].items() if not is_output(name)}
    return write_manifest(run_dir, _without_time(manifest.values) | {"files": others | outputs})


def find_outputs(run_dir: Path) -> list[str]:
    """Names, relative to the run folder, of the files of results that are there."""
    found = [name for name in OUTPUT_NAMES if (run_dir / name).is_file()]
    pictures = [path for path in (run_dir / _SAMPLES).glob("*") if path.suffix in (".png", ".json")]
    return found + sorted(f"{_SAMPLES}/{path.name}" for path in pictures if path.is_file())


def is_output(name: str) -> bool:
    """Whether a file of the manifest is one of results."""
    return name in OUTPUT_NAMES or PurePosixPath(name).parts[:1] == (_SAMPLES,)


def _without_time(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_manifest` is given."""
    return {name: value for name, value in values.items() if name not in ("format_version", "written", "hash")}


def describe_run(
    config: StudyConfig, record: StudyRecord, store: Store, ingredients: Ingredients, result: StudyResult | None
) -> dict[str, Any]:
    """All that a manifest says besides time and hash, as plain JSON without a single float.

    Args:
        config: The study.
        record: What belongs to it.
        store: Holds its evaluations.
        ingredients: What they were made from.
        result: What was found; None where too little is measured.
    """
    found = find_evaluations(record, store)
    attributions = {} if result is None else describe_attributions(result)
    lds = {} if result is None else describe_lds(result)
    files = {name: sha256_of_file(config.run_dir / name) for name in (CONFIG_NAME, study_record.FILE_NAME)}
    for model in ingredients.models.values():
        if model.get("path") is not None:
            files |= {f"{model['path']}/{name}": sha for name, sha in model["files"].items()}
            files[f"{model['path']}/config.json"] = sha256_of_file(config.run_dir / model["path"] / "config.json")
    files |= {name: sha256_of_file(config.run_dir / name) for name in find_outputs(config.run_dir)}
    part = {
        "data": ingredients.data["fingerprint"],
        "settings": fingerprint(settings_of_results(config, ingredients.preset)),
        "models": {name: model["model_hash"] for name, model in ingredients.models.items()},
        "codec": None if ingredients.codec is None else ingredients.codec["fingerprint"],
        "extractors": {name: item["fingerprint"] for name, item in ingredients.extractors.items()},
        "behaviors": digest_of_behaviors(found),
        "attributions": fingerprint(attributions),
        "lds": fingerprint(lds),
    }
    environment = {name: record.provenance.get(name) for name in ("tribute", "commit", "python", "platform")}
    return without_floats(
        {
            "study": {
                "name": record.name,
                "dataset": record.dataset,
                "contributors": list(record.contributor_names),
                "n_examples": list(record.n_examples),
                "n_planned": record.n_evaluations,
                "n_finished": sum(item.status == "finished" for item in found),
            },
            "data": {**ingredients.data, "origin": without_places(ingredients.data.get("origin", {}))},
            "models": dict(ingredients.models),
            "codec": ingredients.codec,
            "extractors": dict(ingredients.extractors),
            "files": dict(sorted(files.items())),
            "store": describe_store(record, store, found),
            "seeds": describe_seeds(config, ingredients, found),
            "environment": {**environment, "versions": dict(record.provenance.get("versions", {}))},
            "measured_on": describe_machines(found),
            "attributions": attributions,
            "lds": lds,
            "result": part,
            "result_hash": fingerprint(part),
        }
    )


def settings_of_results(config: StudyConfig, preset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine results, without places and without how they are computed.

    Args:
        config: The study.
        preset: Its recipe, resolved.
    """
    settings = {name: value for name, value in _plain(config).items() if name not in _NOT_PART_OF_RESULTS}
    settings["features"] = {n: v for n, v in settings["features"].items() if n not in _PLACES_OF_FEATURES}
    settings["full_model"] = {n: v for n, v in settings["full_model"].items() if n != "load"}
    settings["sampling"] = {n: v for n, v in settings["sampling"].items() if n != "batch_size"}
    recipe = {name: value for name, value in preset.items() if name not in ("codec", "ckpt_freq")}
    recipe["sampling"] = {n: v for n, v in preset["sampling"].items() if n != "batch_size"}
    return {"study": settings, "preset": recipe}


def _plain(config: StudyConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


# What is in the store


def find_evaluations(record: StudyRecord, store: Store) -> list[StoredEvaluation]:
    """The planned evaluations of a study that its store has, by number."""
    return store.find(record.study_id(store), evaluation_ids=record.evaluation_ids(store))


def describe_store(record: StudyRecord, store: Store, found: Sequence[StoredEvaluation]) -> dict[str, Any]:
    """Digests of the planned evaluations and of their study.

    They cover identities, roles, statuses, values to the last bit and definitions; not the order of rows, times,
    owners or the kind of database, so that a copy in another database has the same.

    Args:
        record: What belongs to the study.
        store: Holds it.
        found: Its evaluations.
    """
    study = next(item for item in store.studies(name=record.name, dataset=record.dataset))
    content = {item.spec.identity: content_of(item) for item in found}
    return {
        "digest": fingerprint({"study": content_of_study(study), "evaluations": content}),
        "evaluations": {name[:_SHORT]: fingerprint(item)[:_SHORT] for name, item in sorted(content.items())},
    }


def short_digest(item: StoredEvaluation) -> tuple[str, str]:
    """An evaluation's key and value in the section `store` of a manifest."""
    return item.spec.identity[:_SHORT], fingerprint(content_of(item))[:_SHORT]


def content_of_study(study: Study) -> dict[str, Any]:
    """What the digest of a store covers of a study itself."""
    return {
        "name": study.name,
        "dataset": study.dataset,
        "fingerprint": study.fingerprint,
        "contributors": [list(pair) for pair in zip(study.contributor_names, study.n_examples, strict=True)],
    }


def content_of(item: StoredEvaluation) -> dict[str, Any]:
    """What the digest of a store covers of an evaluation, besides what its identity covers."""
    return {
        "role": item.spec.role,
        "status": "pending" if item.status == "running" else item.status,
        "behaviors": {name: float(value).hex() for name, value in item.behaviors.items()},
        "definitions": without_floats(item.definitions),
    }


def digest_of_behaviors(found: Iterable[StoredEvaluation]) -> str:
    """SHA-256 of what was measured, without the name of the study, so without identities; only what is finished."""
    rows = []
    for item in found:
        if item.status != "finished":
            continue
        spec, content = item.spec, content_of(item)
        law = [spec.removal_dist, None if spec.datamodel_alpha is None else spec.datamodel_alpha.hex()]
        mask = "".join("1" if present else "0" for present in spec.coalition_mask)
        settings = fingerprint(without_floats(spec.settings))
        rows.append([content["role"], spec.method, mask, *law, spec.removal_seed, spec.opt_seed, settings, content])
    return fingerprint(sorted(rows, key=fingerprint))


def describe_seeds(config: StudyConfig, ingredients: Ingredients, found: Sequence[StoredEvaluation]) -> dict[str, Any]:
    """Every seed from which something random was drawn."""
    removal: dict[str, set[int]] = {}
    training: dict[str, set[int]] = {}
    for item in found:
        role = item.spec.role or "fit"
        training.setdefault(role, set()).add(item.spec.opt_seed)
        if item.spec.removal_seed is not None:
            removal.setdefault(role, set()).add(item.spec.removal_seed)
    return {
        "opt_seed": config.opt_seed,
        "prune": config.prune.seed,
        "noise_seed": ingredients.preset["sampling"]["noise_seed"],
        "extractors": {name: item["seed"] for name, item in ingredients.extractors.items() if "seed" in item},
        "first_removal_seed": {"fit": config.fit.first_removal_seed, "test": config.test.first_removal_seed},
        "removal_seeds": {role: sorted(seeds) for role, seeds in removal.items()},
        "opt_seeds": {role: sorted(seeds) for role, seeds in training.items()},
    }


def describe_machines(found: Sequence[StoredEvaluation]) -> list[dict[str, Any]]:
    """Every kind of process that measured an evaluation: versions, commit, device, threads; each once.

    Not which process on which host, as workers of Ray record it.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for item in found:
        kind = without_floats({name: value for name, value in item.provenance.items() if name not in _OF_ONE_PROCESS})
        if kind:
            kinds[fingerprint(kind)] = kind
    return [kinds[name] for name in sorted(kinds)]


# What was found


def describe_attributions(result: StudyResult) -> dict[str, dict[str, Any]]:
    """Values and standard errors by behavior and kernel, hexadecimal."""
    return {
        item.name: {kernel: _describe_fit(fitted) for kernel, fitted in item.attributions.items()}
        for item in result.behaviors
    }


def _describe_fit(fitted: Attributions) -> dict[str, Any]:
    return {
        "estimator": fitted.estimator,
        "design": fitted.design,
        "n_coalitions": int(fitted.n_coalitions),
        "values": [float(value).hex() for value in fitted.values],
        "standard_errors": [float(value).hex() for value in fitted.standard_errors],
    }


def describe_lds(result: StudyResult) -> dict[str, dict[str, Any]]:
    """LDS with its interval, per seed, of the seeds' mean, and the ceiling, by behavior and kernel, hexadecimal."""
    return {
        item.name: {kernel: _describe_validation(found) for kernel, found in item.validations.items()}
        for item in result.behaviors
    }


def _describe_validation(found: Validation) -> dict[str, Any]:
    score, ceiling = found.score, found.ceiling
    return {
        "n_test": int(score.n_test),
        "mean": [float(score.mean).hex()],
        "interval_95": [float(value).hex() for value in score.interval],
        "per_seed": [float(value).hex() for value in score.per_seed],
        "averaged": [float(score.averaged).hex()],
        "ceiling": [] if ceiling is None else [float(ceiling.value).hex()],
    }


# What a published file must not hold


def without_floats(value: Any) -> Any:
    """The same JSON with every float as hexadecimal text."""
    if isinstance(value, Mapping):
        return {name: without_floats(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_floats(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def without_places(value: Any) -> Any:
    """The same JSON with every absolute path cut to its last part, as it would name a machine's users."""
    if isinstance(value, Mapping):
        return {name: without_places(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return last_part(value) if isinstance(value, str) else value


def last_part(place: str) -> str:
    """A path that begins at the root, a drive or a user's folder, cut to its last part; any other text as it is."""
    if place.startswith(("/", "~/")):
        return PurePosixPath(place).name
    is_windows = place.startswith("\\\\") or place[1:3] in (":\\", ":/")
    return PureWindowsPath(place).name if is_windows else place
