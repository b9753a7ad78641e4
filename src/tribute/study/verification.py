"""`tribute verify`: what a manifest says, recomputed from what is there; every difference in words.

Everything here but `--deep` is done without PyTorch: hashes of files, identities of models, digests of the store,
attributions and LDS fitted anew, the training data read again.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tribute.config import StudyConfig, fingerprint
from tribute.data.registry import find_source
from tribute.errors import ConfigError, FitError, StoreError, TributeError
from tribute.files import sha256_of_file
from tribute.store.columns import read_columns
from tribute.store.records import Store, StoredEvaluation
from tribute.study.findings import Verification, fingerprint_difference
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.manifest import (
    CONFIG_NAME,
    FILE_NAME,
    Manifest,
    content_of_study,
    describe_attributions,
    describe_lds,
    describe_store,
    digest_of_behaviors,
    find_evaluations,
    read_manifest,
    settings_of_results,
    short_digest,
)
from tribute.study.outputs import ATTRIBUTION_COLUMNS, attribution_columns, attributions_csv, summary
from tribute.study.provenance import environment
from tribute.study.record import StudyRecord
from tribute.study.results import StudyResult, read_result
from tribute.study.status import open_to_read

SAME_VERSIONS_TOLERANCE = 1e-9
"""Of a number fitted again, relative to the largest of its kind, where NumPy, SciPy and Tribute are those of the run:
sums may be ordered otherwise with another number of threads."""
OTHER_VERSIONS_TOLERANCE = 1e-6
"""The same where their versions differ."""

_N_SHOWN = 5
_WHAT_FITS = ("numpy", "scipy")


def find_run_dir(path: Path) -> Path:
    """The run folder that is meant by a folder, or by the settings of its study.

    Raises:
        ConfigError: It is neither.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; expected the run folder of a study, or the study's YAML file")
    if path.is_file():
        path = StudyConfig.from_yaml(path).run_dir
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{path} holds no {CONFIG_NAME}; expected the run folder of a study, as tribute run writes, or the study's "
            "YAML file with the outdir of the run"
        )
    return path


def verify_run(
    run_dir: Path,
    *,
    db: str | None = None,
    published_hash: str | None = None,
    deep: bool = False,
    n_evaluations: int = 1,
    seed: int = 0,
) -> Verification:
    """Recompute what can be recomputed of a run, and compare.

    Args:
        run_dir: The run folder; it may have been moved, or copied from another machine.
        db: Its store; None: `results.db` in the folder, or the `db` of its settings.
        published_hash: A hash of the manifest that was made known before, or the start of one.
        deep: Also load the models, and measure evaluations again.
        n_evaluations: How many.
        seed: Which ones.

    Raises:
        ConfigError: The settings in the folder cannot be read.
    """
    found = Verification(run_dir)
    config = StudyConfig.from_yaml(run_dir / CONFIG_NAME)
    check_manifest(found, published_hash)
    hashes = _Hashes(run_dir)
    check_files(found, hashes)
    models = check_models(found, config, hashes)
    check_settings_of_results(found, config)
    record = _read_record(found, run_dir)
    if record is not None:
        _check_record(found, record)
        check_data(found, config, record, deep=deep)
        with ExitStack() as stack:
            store = _open_store(found, config, run_dir, db, stack)
            if store is not None:
                evaluations = _evaluations_of(found, record, store, models.get("sparse"))
                if evaluations is not None:
                    result = _refit(found, config, record, store)
                    if result is not None:
                        # Ranks are simulated, with other draws where linear algebra rounds otherwise.
                        with_ranks = check_fit(found, result)
                        check_csv(found, result, with_ranks=with_ranks)
                        check_parquet(found, result, with_ranks=with_ranks)
                        check_summary(found, result, with_ranks=with_ranks)
                    if deep:
                        from tribute.study.remeasurement import remeasure

                        remeasure(found, config, record, evaluations, n_evaluations=n_evaluations, seed=seed)
    if not deep:
        found.unchecked.append(
            "weights of feature extractors and of a codec, and the measurements themselves: give --deep to load the "
            "models and measure again"
        )
    return found


# The manifest itself


def check_manifest(found: Verification, published_hash: str | None) -> None:
    """Read the manifest, and compare its hashes with the rest of it and with a published one."""
    try:
        found.manifest = read_manifest(found.run_dir)
    except StoreError as error:
        found.differences.append(str(error))
        return
    manifest = found.manifest
    if manifest is None:
        found.differences.append(
            f"{FILE_NAME} is not there: the study has not come to its end, or the file was removed. What is there is "
            "only compared with itself; run tribute run again, which writes the manifest"
        )
        return
    differences = []
    for name, named, follows in (
        ("hash", manifest.hash, manifest.find_hash()),
        ("result_hash", manifest.result_hash, manifest.find_result_hash()),
    ):
        if named != follows:
            differences.append(
                f"{FILE_NAME}: its content was changed after it was written: it names the {name} {named[:12]}, its "
                f"content gives {follows[:12]}"
            )
    parts = manifest.values["result"]
    codec = manifest.values["codec"]
    sections = {
        "data": manifest.values["data"]["fingerprint"],
        "models": {name: model["model_hash"] for name, model in manifest.values["models"].items()},
        "codec": None if codec is None else codec.get("fingerprint"),
        "extractors": {name: item.get("fingerprint") for name, item in manifest.values["extractors"].items()},
        "attributions": fingerprint(manifest.values["attributions"]),
        "lds": fingerprint(manifest.values["lds"]),
    }
    for name, follows in sections.items():
        if parts.get(name) != follows:  # else a result_hash that was published would say nothing of the section
            differences.append(f"{FILE_NAME}: the section {name} is not the one that result.{name} was made of")
    found.conclude(differences, f"{FILE_NAME}: both hashes follow from its content")
    if published_hash is not None:
        _check_published(found, manifest, published_hash.strip().lower())


def _check_published(found: Verification, manifest: Manifest, published: str) -> None:
    """Compare with a hash that was made known before."""
    if len(published) < 12:
        raise ConfigError(f"--hash: expected at least 12 hexadecimal digits, found {published!r}")
    names = {"hash": manifest.find_hash(), "result_hash": manifest.find_result_hash()}
    matches = [name for name, value in names.items() if value.startswith(published)]
    differs = f"the hash given is {published[:12]}; the manifest here has the hash {names['hash'][:12]} and the "
    differs += f"result_hash {names['result_hash'][:12]}"
    found.conclude([] if matches else [differs], f"the hash given is the {' and '.join(matches)} of this manifest")


# Files and models


class _Hashes:
    """SHA-256 of files below a run folder, each computed once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._known: dict[str, str | None] = {}

    def of(self, name: str) -> str | None:
        """None where the file is missing or cannot be read."""
        if name not in self._known:
            try:
                self._known[name] = sha256_of_file(self.run_dir / name)
            except OSError:
                self._known[name] = None
        return self._known[name]


def check_files(found: Verification, hashes: _Hashes) -> None:
    """Compare the SHA-256 of every file that the manifest names; files that it does not name do not count."""
    if found.manifest is None:
        return
    files: Mapping[str, str] = found.manifest.values["files"]
    differences = []
    for name, recorded in files.items():
        sha256 = hashes.of(name)
        if sha256 is None:
            differences.append(f"{name}: missing; recorded was the SHA-256 {recorded[:12]}")
        elif sha256 != recorded:
            differences.append(f"{name}: changed; recorded SHA-256 {recorded[:12]}, found {sha256[:12]}")
    found.conclude(differences, f"{len(files)} files have the recorded SHA-256")


def check_models(found: Verification, config: StudyConfig, hashes: _Hashes) -> dict[str, str]:
    """Identities of the models from their files: as recorded, and each made from the one before it.

    Returns:
        Hashes of the models that were found, by name.
    """
    identities: dict[str, str] = {}
    starts: dict[str, str | None] = {}
    differences = []
    for name, folder in _model_folders(found, config).items():
        if folder is None:
            _check_model_elsewhere(found, config, name, identities)
            continue
        try:
            meta = json.loads((found.run_dir / folder / "config.json").read_text(encoding="utf-8"))
            named = {n: sha for n, sha in dict(meta["files"]).items() if not n.startswith("training_state")}
            start = meta.get("start") or {}
            starts[name] = start.get("hash")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            differences.append(f"{name} model: {folder}/config.json cannot be read ({type(error).__name__}: {error})")
            continue
        actual = {file: hashes.of(f"{folder}/{file}") for file in named}
        if actual != named:
            wrong = ", ".join(file for file in named if actual[file] != named[file])
            differences.append(f"{name} model: {wrong} in {folder} is not the one that its own config.json names")
        identities[name] = fingerprint(actual)
    if found.manifest is not None:
        for name, model in found.manifest.values["models"].items():
            recorded = model["model_hash"]
            if name in identities and identities[name] != recorded:
                differences.append(
                    f"{name} model: another model; recorded hash {recorded[:12]}, its files give "
                    f"{identities[name][:12]}"
                )
    for name, before in (("pruned", "full"), ("sparse", "pruned")):
        start = starts.get(name)
        if start is not None and before in identities and start != identities[before]:
            differences.append(
                f"{name} model: it says that it was made from a {before} model with the hash {start[:12]}; the one "
                f"here has {identities[before][:12]}"
            )
    if identities or differences:
        found.conclude(differences, f"models: {', '.join(identities)} have their hashes, each made from the one before")
    return identities


def _model_folders(found: Verification, config: StudyConfig) -> dict[str, str | None]:
    """Folders of the checkpoints, relative to the run folder; None for a model that lies elsewhere."""
    if found.manifest is not None:
        return {name: model.get("path") for name, model in found.manifest.values["models"].items()}
    dataset, pruning = dataset_folder(config.dataset), pruning_name(config.prune)
    places = {
        "full": models_dir(Path(), dataset, "retrain", "full"),
        "pruned": models_dir(Path(), dataset, "pruned", pruning),
        "sparse": models_dir(Path(), dataset, "prune_fine_tune", pruning, "full"),
    }
    folders: dict[str, str | None] = {}
    for name, place in places.items():
        checkpoints = sorted(path.name for path in (found.run_dir / place).glob("ckpt_steps_????????"))
        if checkpoints:
            folders[name] = (place / checkpoints[-1]).as_posix()
    if config.full_model.load is not None:
        folders["full"] = None
    return folders


def _check_model_elsewhere(found: Verification, config: StudyConfig, name: str, identities: dict[str, str]) -> None:
    """The full model of a study that loaded it: its files, where they are on this machine."""
    load = config.full_model.load
    folder = None if load is None else Path(load)
    if folder is None or not folder.is_dir():
        found.unchecked.append(f"{name} model: it was loaded from elsewhere, and {load!r} is not on this machine")
        return
    if found.manifest is None:
        found.unchecked.append(f"{name} model: it was loaded from {load}, and no manifest says what it was")
        return
    recorded = found.manifest.values["models"][name]
    checkpoints = sorted(folder.glob("ckpt_steps_????????"))
    folder = checkpoints[-1] if checkpoints else folder
    weights = "diffusion_pytorch_model.safetensors"
    for file, sha256 in recorded["files"].items():
        if not file.endswith((".safetensors", ".json")):
            continue  # settings, which are no file
        places = [folder / file, folder / "unet" / weights, folder / weights]
        place = next((place for place in places if place.is_file()), None)
        actual = None if place is None else sha256_of_file(place)
        if actual != sha256:
            found.differences.append(
                f"{name} model: {file} of the model loaded from {load} is not the recorded one: SHA-256 "
                f"{sha256[:12]}, found {'no such file' if actual is None else actual[:12]}"
            )
            return
    identities[name] = recorded["model_hash"]


# Settings and data


def check_settings_of_results(found: Verification, config: StudyConfig) -> None:
    """The settings in the folder, with the recipe that they name, against those that the results were made with."""
    if found.manifest is None:
        return
    if config.full_model.load is not None:
        found.unchecked.append("settings: the recipe is that of the full model, which was loaded; give --deep")
        return
    try:
        preset = config.load_preset()
    except ConfigError as error:
        found.unchecked.append(f"settings: the preset is not on this machine ({error})")
        return
    recorded = found.manifest.values["result"]["settings"]
    now = fingerprint(settings_of_results(config, preset.model_dump(mode="json")))
    differs = (
        f"settings: {CONFIG_NAME} with its preset gives {now[:12]}, recorded is {recorded[:12]}: a setting or the "
        "preset was changed, or this version of Tribute has other defaults"
    )
    found.conclude([differs] if now != recorded else [], "settings: config.yaml and its preset are those of the run")


def check_data(found: Verification, config: StudyConfig, record: StudyRecord, *, deep: bool) -> None:
    """Read the training data again, and compare its fingerprint: images, labels, owners."""
    is_embedded = find_source(config.dataset).layout == "embedded"
    if not is_embedded and config.data_dir is None and not deep:
        found.unchecked.append("data: it comes from the hub; give --deep to read it from there")
        return
    if config.data_dir is not None and not config.data_dir.exists():
        found.unchecked.append(f"data: its folder {config.data_dir} is not on this machine")
        return
    shape = None if found.manifest is None else found.manifest.values["data"]["image_shape"]
    try:
        if shape is None:
            preset = config.load_preset()
            shape = (config.image_size or preset.image_size, 0, preset.image_channels)
        from tribute.data.sources import load_training_data

        asked = {**dict(config.data), "image_size": shape[0], "image_channels": shape[2]}
        now = load_training_data(**asked).fingerprint
    except TributeError as error:
        found.unchecked.append(f"data: it cannot be read here ({error})")
        return
    differs = fingerprint_difference("data", record.fingerprint, now) + ": images, labels or owners are other ones"
    found.conclude(
        [differs] if now != record.fingerprint else [],
        f"data: images, labels and owners of {config.dataset} have the recorded fingerprint",
    )


def _read_record(found: Verification, run_dir: Path) -> StudyRecord | None:
    try:
        return StudyRecord.read_from(run_dir)
    except StoreError as error:
        found.differences.append(str(error))
        return None


def _check_record(found: Verification, record: StudyRecord) -> None:
    """What `study.json` says against the manifest."""
    if found.manifest is None:
        return
    study, data = found.manifest.values["study"], found.manifest.values["data"]
    pairs = {
        "name": (study["name"], record.name),
        "dataset": (study["dataset"], record.dataset),
        "contributors": (study["contributors"], list(record.contributor_names)),
        "numbers of examples": (study["n_examples"], list(record.n_examples)),
        "fingerprint of the data": (data["fingerprint"], record.fingerprint),
    }
    for what, (recorded, now) in pairs.items():
        if recorded != now:
            found.differences.append(f"study.json: other {what} than in the manifest: recorded {recorded}, found {now}")


# Store


def _open_store(
    found: Verification, config: StudyConfig, run_dir: Path, db: str | None, stack: ExitStack
) -> Store | None:
    """The store of the run, only to be read: what is verified is not changed. None where it cannot be opened."""
    location = db or config.db or str(run_dir / "results.db")
    try:
        return stack.enter_context(open_to_read(config.replace(db=location)))
    except StoreError as error:
        text = f"store: {error}"
        (found.differences if db is None and config.db is None else found.unchecked).append(text)
        return None


def _evaluations_of(
    found: Verification, record: StudyRecord, store: Store, sparse_hash: str | None
) -> list[StoredEvaluation] | None:
    """What `check_store` returns; None where the store is damaged, or not that of the study."""
    try:
        return check_store(found, record, store, sparse_hash=sparse_hash)
    except TributeError as error:
        found.differences.append(f"store: {error}")
        return None


def check_store(
    found: Verification, record: StudyRecord, store: Store, *, sparse_hash: str | None
) -> list[StoredEvaluation]:
    """Compare the planned evaluations in the store with the manifest and with their identities.

    Returns:
        Those that are there.

    Raises:
        StoreError, MixedResultsError: The store cannot be read, or is not that of the study.
    """
    study_id = record.study_id(store)
    study = next(item for item in store.studies() if item.study_id == study_id)
    # A server may hold studies of others, whose faults are not this run's.
    differences = [] if store.serves_many_hosts else [f"store: {fault}" for fault in store.check()]
    wanted = [(role, identity) for role, identities in record.evaluations.items() for identity in identities]
    ids = store.ids_of(study_id, [identity for _, identity in wanted])
    evaluations = find_evaluations(record, store)
    by_id = {item.evaluation_id: item for item in evaluations}
    role_of = {identity: role for role, identity in wanted}
    changed = [by_id[ids[name]] for name in ids if by_id[ids[name]].spec.identity != name]
    differences += _some(
        (
            f"store: evaluation {item.evaluation_id} ({item.spec}): its coalition, seeds, method or settings were "
            "changed: they do not give the identity under which it is stored"
        )
        for item in changed
    )
    differences += _some(
        f"store: {role_of[name]} evaluation {name[:12]} is missing" for _, name in wanted if name not in ids
    )
    other_start = [
        item
        for item in evaluations
        if sparse_hash is not None and item.spec.method == "gd" and item.spec.settings.get("start") != sparse_hash
    ]
    differences += _some(
        f"store: evaluation {item.evaluation_id} ({item.spec}) was measured from another sparse model than the one in "
        "the run folder"
        for item in other_start
    )
    if content_of_study(study)["contributors"] != [
        list(pair) for pair in zip(record.contributor_names, record.n_examples, strict=True)
    ]:
        differences.append("store: its contributors, or their numbers of examples, are not those of study.json")
    n_finished = sum(item.status == "finished" for item in evaluations)
    counted = f"store: {n_finished} of {record.n_evaluations} planned evaluations are finished"
    if found.manifest is None:
        found.conclude(differences, f"{counted}, and all have their identities")
        return evaluations
    differences += _differing_evaluations(found.manifest, evaluations)
    recorded = found.manifest.values["store"]["digest"]
    now = describe_store(record, store, evaluations)["digest"]
    if now != recorded and not differences:
        differences.append(f"store: other content than recorded: digest {recorded[:12]}, found {now[:12]}")
    found.conclude(differences, f"{counted}; identities, values and definitions are the recorded ones")
    if not differences and digest_of_behaviors(evaluations) != found.manifest.values["result"]["behaviors"]:
        found.differences.append(f"{FILE_NAME}: result.behaviors is not the digest of the recorded values")
    return evaluations


def _differing_evaluations(manifest: Manifest, evaluations: Sequence[StoredEvaluation]) -> list[str]:
    """Evaluations that are not as the manifest has them."""
    recorded: Mapping[str, str] = manifest.values["store"]["evaluations"]
    lines = []
    for item in evaluations:
        name, digest = short_digest(item)
        if name in recorded and recorded[name] != digest:
            values = ", ".join(f"{behavior} {value:.6g}" for behavior, value in list(item.behaviors.items())[:3])
            lines.append(
                f"store: evaluation {item.evaluation_id} ({item.spec.role}, {item.spec}) is not as recorded: now "
                f"{item.status}{', ' if values else ''}{values}"
            )
        elif name not in recorded:
            lines.append(f"store: evaluation {item.evaluation_id} ({item.spec}) is not in the manifest")
    return _some(lines)


def _some(lines: Iterable[str]) -> list[str]:
    """The first lines, and how many more there are."""
    every = list(lines)
    n_more = len(every) - _N_SHOWN
    if n_more <= 1:
        return every
    return [*every[:_N_SHOWN], f"{every[0].partition(':')[0]}: and {n_more} more like the last one"]


# Attributions and LDS


def _refit(found: Verification, config: StudyConfig, record: StudyRecord, store: Store) -> StudyResult | None:
    """The result from the store; None where too little is measured."""
    try:
        return read_result(config, record, store)
    except FitError as error:
        if found.manifest is not None and found.manifest.values["attributions"]:
            found.differences.append(f"attributions: they cannot be fitted to what the store holds now ({error})")
        else:
            found.unchecked.append(f"attributions: too little is measured ({error})")
    except TributeError as error:
        found.differences.append(f"attributions: {error}")
    return None


def check_fit(found: Verification, result: StudyResult) -> bool:
    """Attributions and LDS, fitted again from the store, against the recorded ones: are they the same to the bit?"""
    if found.manifest is None:
        return False
    is_identical = True
    tolerance, versions = _tolerance(found.manifest)
    names = list(result.contributor_names)
    for what, recorded, now in (
        ("attributions", found.manifest.values["attributions"], describe_attributions(result)),
        ("LDS", found.manifest.values["lds"], describe_lds(result)),
    ):
        differences, largest = _compare_fits(what, recorded, now, tolerance, names)
        is_identical &= not differences and largest == 0
        n_fits = sum(len(kernels) for kernels in recorded.values())
        if not n_fits and not differences:
            continue
        how = "identical to the last bit" if largest == 0 else f"within {largest:.1e} (relative; {tolerance:g} allowed)"
        found.conclude(_some(differences), f"{what}: {n_fits} fits, made again from the store, are {how}{versions}")
    return is_identical


def _tolerance(manifest: Manifest) -> tuple[float, str]:
    """How far numbers fitted here may be from those of the run, and a word on versions where they differ."""
    here = environment()
    pairs = {"tribute": (manifest.version, here["tribute"])}
    pairs |= {name: (manifest.versions.get(name, "?"), here["versions"].get(name, "?")) for name in _WHAT_FITS}
    other = [f"{name} {there}, here {now}" for name, (there, now) in pairs.items() if there != now]
    if not other:
        return SAME_VERSIONS_TOLERANCE, ""
    return OTHER_VERSIONS_TOLERANCE, f"; versions differ: the run had {'; '.join(other)}"


def _compare_fits(
    what: str, recorded: Mapping[str, Any], now: Mapping[str, Any], tolerance: float, contributor_names: list[str]
) -> tuple[list[str], float]:
    """Differences beyond the tolerance, and the largest relative one."""
    differences: list[str] = []
    largest = 0.0
    for behavior in dict.fromkeys([*recorded, *now]):
        there, here = recorded.get(behavior, {}), now.get(behavior, {})
        for kernel in dict.fromkeys([*there, *here]):
            title = f"{what}: {kernel} for {behavior}"
            if kernel not in there or kernel not in here:
                have = (
                    "recorded, but cannot be fitted now" if kernel in there else "not recorded, but can be fitted now"
                )
                differences.append(f"{title} was {have}")
                continue
            for name in dict.fromkeys([*there[kernel], *here[kernel]]):
                first, second = there[kernel].get(name), here[kernel].get(name)
                if first == second:
                    continue
                if not isinstance(first, list) or not isinstance(second, list) or len(first) != len(second):
                    differences.append(f"{title}: {name} recorded {first}, found {second}")
                    continue
                distance, worst = _distance(first, second)
                largest = max(largest, distance)
                if not distance <= tolerance:
                    whose = f" of {contributor_names[worst]!r}" if len(first) == len(contributor_names) else ""
                    differences.append(
                        f"{title}: {name}{whose}: recorded {_number(first[worst]):.8g}, from the store "
                        f"{_number(second[worst]):.8g}"
                    )
    return differences, largest


def _distance(first: Sequence[str], second: Sequence[str]) -> tuple[float, int]:
    """Largest difference relative to the largest number of the first, and where it is; infinite beside a NaN."""
    pairs = [(_number(a), _number(b)) for a, b in zip(first, second, strict=True)]
    scale = max((abs(a) for a, _ in pairs if math.isfinite(a)), default=0.0) or 1.0
    distances = [0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) / scale for a, b in pairs]
    distances = [math.inf if math.isnan(distance) else distance for distance in distances]
    worst = max(range(len(distances)), key=distances.__getitem__)
    return distances[worst], worst


def _number(text: str) -> float:
    """A number of the manifest; one that was tampered with is not a number."""
    try:
        return float.fromhex(text)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def check_csv(found: Verification, result: StudyResult, *, with_ranks: bool) -> None:
    """`attributions.csv`, where it is there, against the fit to the store: also an old one, or one edited by hand."""
    path = found.run_dir / "attributions.csv"
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        found.differences.append(f"attributions.csv cannot be read ({error})")
        return
    expected = attributions_csv(result)
    if text == expected:
        found.agreed.append("attributions.csv holds what is fitted to the store")
        return
    if (other := _compare_cells("attributions.csv", _cells(text), _cells(expected), with_ranks)) is None:
        found.differences.append("attributions.csv: other columns or rows than the store gives")
        return
    found.conclude(_some(other), "attributions.csv holds what is fitted to the store, within its eight digits")


def check_parquet(found: Verification, result: StudyResult, *, with_ranks: bool) -> None:
    """`attributions.parquet`, where it is there, against the fit to the store."""
    path = found.run_dir / "attributions.parquet"
    if not path.is_file():
        return
    try:
        table = read_columns(path)
    except StoreError as error:
        found.differences.append(f"attributions.parquet: {error}")
        return
    columns = attribution_columns(result)
    there = [list(table), *(list(row) for row in zip(*table.values(), strict=True))]
    here = [list(columns), *(list(row) for row in zip(*(values for _, values in columns.values()), strict=True))]
    if (other := _compare_cells("attributions.parquet", there, here, with_ranks)) is None:
        found.differences.append("attributions.parquet: other columns or rows than the store gives")
        return
    found.conclude(_some(other), "attributions.parquet holds what is fitted to the store")


def check_summary(found: Verification, result: StudyResult, *, with_ranks: bool) -> None:
    """Contributors and behaviors in `summary.json`, where it is there, against the fit to the store."""
    path = found.run_dir / "summary.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        there = {name: there[name] for name in ("contributors", "behaviors")}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.differences.append(f"summary.json cannot be read as the results of a study ({error!r})")
        return
    here = summary(result)
    other = list(_other_values("summary.json", there, {name: here[name] for name in there}, with_ranks=with_ranks))
    found.conclude(_some(other), "summary.json: contributors and behaviors are those that the store gives")


def _other_values(place: str, there: Any, here: Any, *, with_ranks: bool, scale: float = 0.0) -> Iterator[str]:
    """Where two JSON values differ, each with its place; numbers beside the largest one of their list."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        for name in here:
            # Texts that hold rounded numbers say nothing that the numbers do not.
            if name in ("explanation", "separation", "warning", "not_fitted") or (
                name == "rank_intervals_95" and not with_ranks
            ):
                continue
            yield from _other_values(f"{place}: {name}", there[name], here[name], with_ranks=with_ranks)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        scale = max([scale, *(abs(item) for item in here if isinstance(item, int | float))])
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from _other_values(f"{place}[{i}]", a, b, with_ranks=with_ranks, scale=scale)
    elif not _is_same(there, here, scale):
        yield f"{place}: the file has {_shown(there)}, the store gives {_shown(here)}"


def _compare_cells(what: str, there: list[list[Any]], here: list[list[Any]], with_ranks: bool) -> list[str] | None:
    """Cells that differ between two tables, whose first row names the columns; None where they have other ones."""
    if len(there) != len(here) or there[0] != here[0] or any(len(row) != len(here[0]) for row in there):
        return None
    names = here[0]
    compared = [i for i, name in enumerate(names) if with_ranks or name not in ("rank_low", "rank_high")]
    scales = {
        i: max((abs(row[i]) for row in here[1:] if isinstance(row[i], int | float)), default=0.0) for i in compared
    }
    lines = []
    for a, b in zip(there[1:], here[1:], strict=True):
        row = dict(zip(names, b, strict=True))
        title = f"{what}: {row['kernel']} of {row['contributor']!r} for {row['behavior']}"
        lines += [
            f"{title}: {names[i]}: the file has {_shown(a[i])}, the store gives {_shown(b[i])}"
            for i in compared
            if not _is_same(a[i], b[i], scales[i])
        ]
    return lines


def _is_same(first: Any, second: Any, scale: float) -> bool:
    """Whether two values of a file are the same; numbers to the eight digits that a table has."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first == second or math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-8 * scale)
    return first == second


def _shown(value: Any) -> str:
    """A value of a file in a sentence."""
    return f"{value:.8g}" if isinstance(value, float) else repr(value)[:80]


def _cells(text: str) -> list[list[Any]]:
    """Rows of CSV, numbers of all columns but those of text as numbers."""
    rows: list[list[Any]] = [list(row) for row in csv.reader(io.StringIO(text, newline=""))] or [[]]
    numbers = [i for i, name in enumerate(rows[0]) if ATTRIBUTION_COLUMNS.get(name, "text") != "text"]
    for row in rows[1:]:
        for i in numbers:
            with suppress(ValueError, IndexError):
                row[i] = float(row[i])
    return rows
