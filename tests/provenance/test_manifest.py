"""What a manifest says, what its hashes cover and what they do not, and that it can be published."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_study import SilentListener

from tribute.config import StudyConfig
from tribute.errors import FitError, StoreError
from tribute.files import sha256_of_file
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, Study
from tribute.study.manifest import (
    FILE_NAME,
    Ingredients,
    describe_machines,
    describe_store,
    digest_of_behaviors,
    find_evaluations,
    read_and_attest,
    read_manifest,
    update_outputs,
    without_places,
    write_manifest,
)
from tribute.study.record import StudyRecord, by_role
from tribute.study.run import run_study

NAMES = ("<b>Ann</b>", "/home/someone", "", "\u202eevil", "=cmd()")
SETTINGS = {"start": "f00", "sampling": {"guidance_scale": 1.5}}


def values_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / FILE_NAME).read_text())


def floats_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in floats_in(item)]
    if isinstance(value, list):
        return [x for item in value for x in floats_in(item)]
    return [value] if isinstance(value, float) else []


def test_a_manifest_names_every_file_model_seed_and_version(finished: Path) -> None:
    values = values_of(finished)
    for name, recorded in values["files"].items():
        assert sha256_of_file(finished / name) == recorded
    for name, model in values["models"].items():
        assert {f"{model['path']}/{file}" for file in model["files"]} <= set(values["files"]), name
        assert {"unet.safetensors", "ema.safetensors"} <= set(model["files"])
    assert {"config.yaml", "study.json", "attributions.csv", "summary.json", "lds.png"} <= set(values["files"])
    assert values["study"] == {
        "name": "attested",
        "dataset": "digits",
        "contributors": [str(digit) for digit in range(10)],
        "n_examples": [178, 182, 177, 183, 181, 182, 181, 179, 174, 180],
        "n_planned": 20,
        "n_finished": 20,
    }
    assert values["data"]["fingerprint"] == json.loads((finished / "study.json").read_text())["fingerprint"]
    assert set(values["data"]["sha256"]) == {"images", "labels", "reference_images", "reference_labels"}
    assert values["seeds"] == {
        "opt_seed": 42,
        "prune": 0,
        "noise_seed": 0,
        "extractors": {},
        "first_removal_seed": {"fit": 0, "test": 0},
        "removal_seeds": {"fit": list(range(12)), "test": [0, 1, 2]},
        "opt_seeds": {"empty": [42], "grand": [42], "fit": [42], "test": [1, 2]},
    }
    assert {"torch", "diffusers", "numpy", "scipy"} <= set(values["environment"]["versions"])
    (machine,) = values["measured_on"]
    assert machine["n_threads"] == 1
    manifest = read_manifest(finished)
    assert manifest is not None
    assert manifest.devices == [machine["device"]]
    assert manifest.python == platform.python_version()


def test_attributions_in_it_are_those_of_the_table_to_the_last_bit(finished: Path) -> None:
    values = values_of(finished)
    summary = json.loads((finished / "summary.json").read_text())
    for behavior, kernels in values["attributions"].items():
        for kernel, fitted in kernels.items():
            expected = summary["behaviors"][behavior]["attributions"][kernel]["values"]
            assert [float.fromhex(value) for value in fitted["values"]] == expected
        for kernel, found in values["lds"][behavior].items():
            assert float.fromhex(found["mean"][0]) == summary["behaviors"][behavior]["lds"][kernel]["mean"]


def test_its_hash_is_computed_as_documented(finished: Path) -> None:
    values = values_of(finished)
    assert floats_in(values) == []
    named, result_hash = values.pop("hash"), values["result_hash"]

    def sha256(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    assert sha256(values) == named
    assert sha256(values["result"]) == result_hash
    manifest = read_manifest(finished)
    assert manifest is not None
    assert (manifest.hash, manifest.result_hash) == (named, result_hash)


def test_it_names_no_folder_and_no_user_of_the_machine(finished: Path, workshop: Path) -> None:
    text = (finished / FILE_NAME).read_text()
    for private in (str(workshop), str(Path.home()) + "/", "tiny.yaml", platform.node()):
        assert private not in text, private
    assert str(workshop) in (finished / "config.yaml").read_text(), "it is there to be left out"


def test_workers_of_ray_are_one_kind_of_process_without_a_host() -> None:
    measured = {"device": "a processor", "executor": "ray", "n_steps": 3}
    found = [SimpleNamespace(provenance={**measured, "host": "node7.lab", "pid": pid}) for pid in (11, 12)]
    assert describe_machines(found) == [{"device": "a processor", "executor": "ray"}]  # type: ignore[arg-type]


def test_places_are_cut_to_their_last_part() -> None:
    origin = {"files": [{"name": "/home/ann/data/x.parquet"}, {"name": "y.parquet"}], "n": 3}
    origin |= {"a": "~/data", "b": "C:\\Users\\ann\\x.npz", "c": "hub:owner/name", "decoder": "Pillow 12"}
    found = without_places(origin)
    assert found["files"] == [{"name": "x.parquet"}, {"name": "y.parquet"}]
    assert (found["a"], found["c"], found["decoder"], found["n"]) == ("data", "hub:owner/name", "Pillow 12", 3)
    assert "ann" not in json.dumps(found)


def test_running_again_without_anything_to_do_keeps_the_published_hash(
    run_dir: Path, make_study: Callable[..., StudyConfig]
) -> None:
    place = run_dir.parent / "attested"
    run_dir.rename(place)
    config = make_study(outdir=str(place.parent))
    (place / "config.yaml").write_text(config.to_yaml())  # the outdir of the copy
    assert run_study(config, SilentListener()) is not None
    first = (place / FILE_NAME).read_bytes()
    listener = SilentListener()
    assert run_study(config, listener) is not None
    assert listener.n_evaluations == 0
    assert (place / FILE_NAME).read_bytes() == first
    assert update_outputs(place) is not None
    assert (place / FILE_NAME).read_bytes() == first
    (place / "samples").mkdir()
    (place / "samples" / "full.png").write_bytes(b"png")
    changed = update_outputs(place)
    assert changed is not None
    assert changed.hash != json.loads(first)["hash"]
    assert changed.result_hash == json.loads(first)["result_hash"]
    assert changed.values["files"]["samples/full.png"] == hashlib.sha256(b"png").hexdigest()


def test_a_damaged_manifest_is_written_anew_and_a_missing_one_is_none(tmp_path: Path, finished: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert update_outputs(tmp_path) is None
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(StoreError, match=r"cannot be read as a manifest.*run tribute run again"):
        read_manifest(tmp_path)
    values = {name: item for name, item in values_of(finished).items() if name not in ("hash", "written")}
    write_manifest(tmp_path, values)
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.hash == found.find_hash()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


# Digests of the store, from evaluations that nothing was trained for


def spec(name: str, row: int, role: str = "fit", opt_seed: int = 1) -> EvaluationSpec:
    mask = np.array([bool(row >> i & 1) for i in range(len(NAMES))])
    return EvaluationSpec(name, "digits", "gd", "shapley", None, row, mask, opt_seed, SETTINGS, role=role)


def result_of(item: EvaluationSpec, value: float) -> FinishedEvaluation:
    return FinishedEvaluation(
        item,
        {"fid": value},
        seconds={"train": float(value)},
        provenance={"device": "CPU", "n_threads": 1},
        definitions={"fid": {"unit": "", "higher_is_better": False, "variant": "classifier abc"}},
    )


def record_of(name: str, specs: list[EvaluationSpec]) -> StudyRecord:
    return StudyRecord(
        name=name,
        dataset="digits",
        contributor_names=NAMES,
        n_examples=(1, 2, 3, 4, 5),
        fingerprint="beef",
        behaviors=("fid",),
        evaluations=by_role(specs),
        models={},
        classifier_accuracy=None,
        provenance={"tribute": "1", "commit": None, "python": "3", "platform": "Linux", "versions": {}},
    )


def filled(place: Path, name: str, order: list[int], *, value: Callable[[int], float] = float) -> Store:
    """A store with twelve evaluations in some order."""
    store = Store.open(place)
    study = Study(name, "digits", NAMES, (1, 2, 3, 4, 5), "beef")
    for row in order:
        store.add_finished({study: [result_of(spec(name, row), value(row))]})
    return store


def digest(store: Store, name: str = "s", rows: range = range(12)) -> tuple[str, str]:
    record = record_of(name, [spec(name, row) for row in rows])
    found = find_evaluations(record, store)
    return describe_store(record, store, found)["digest"], digest_of_behaviors(found)


def test_the_digest_of_a_store_is_of_its_content_not_of_its_rows(tmp_path: Path) -> None:
    with filled(tmp_path / "a.db", "s", list(range(12))) as first, filled(tmp_path / "b.db", "other", [3]) as second:
        study = Study("s", "digits", NAMES, (1, 2, 3, 4, 5), "beef")
        for row in reversed(range(12)):
            second.add_finished({study: [replace(result_of(spec("s", row), float(row)), seconds={"train": 99.0})]})
        assert digest(first) == digest(second)
        assert digest(first, rows=range(11)) != digest(first)


def test_the_digest_notices_the_last_bit(tmp_path: Path) -> None:
    with (
        filled(tmp_path / "a.db", "s", list(range(12))) as first,
        filled(
            tmp_path / "b.db", "s", list(range(12)), value=lambda row: np.nextafter(row, 99.0) if row == 5 else row
        ) as second,
    ):
        assert digest(first)[0] != digest(second)[0]
        assert digest(first)[1] != digest(second)[1]


def test_what_was_measured_has_one_digest_under_any_name_of_the_study(tmp_path: Path) -> None:
    with (
        filled(tmp_path / "a.db", "s", list(range(12))) as first,
        filled(tmp_path / "b.db", "t", list(range(12))) as second,
    ):
        (store_s, behaviors_s), (store_t, behaviors_t) = digest(first, "s"), digest(second, "t")
    assert store_s != store_t
    assert behaviors_s == behaviors_t


def test_a_study_in_which_too_little_is_measured_has_a_manifest_without_attributions(
    tmp_path: Path, make_study: Callable[..., StudyConfig]
) -> None:
    """As one that a budget stopped; and contributors choose their names."""
    config = make_study(outdir=str(tmp_path), name="s")
    specs = [spec("s", row) for row in range(12)]
    record = record_of("s", [*specs, spec("s", 31, role="grand")])
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    record.write(config.run_dir)
    model = {"path": None, "n_steps": 1, "model_hash": "f00", "files": {"settings": "1"}, "origin": {"name": "x"}}
    data = {"fingerprint": "beef", "image_shape": [8, 8, 1], "contributors": {"n_examples": dict.fromkeys(NAMES, 1)}}
    ingredients = Ingredients(
        data={**data, "origin": {"name": "/home/ann/x"}},
        preset=config.load_preset().model_dump(mode="json"),
        full_model=model,
        pruned_model=model,
        sparse_model=model,
        codec={"fingerprint": "c0dec", "scaling_factor": 0.18215},
        extractors={"classifier": {"fingerprint": "abc", "seed": 0}},
    )
    with (
        filled(tmp_path / "s.db", "s", list(range(12))) as store,
        pytest.raises(FitError, match="expected finished evaluations of the empty coalition"),
    ):
        read_and_attest(config, record, store, ingredients)
    manifest = read_manifest(config.run_dir)
    assert manifest is not None
    values = manifest.values
    assert values["attributions"] == values["lds"] == {}
    assert (values["study"]["n_finished"], values["study"]["n_planned"]) == (12, 13)
    assert tuple(values["study"]["contributors"]) == tuple(values["data"]["contributors"]["n_examples"]) == NAMES
    assert values["codec"]["scaling_factor"] == (0.18215).hex()
    assert values["seeds"]["extractors"] == {"classifier": 0}
    assert "/home/ann" not in json.dumps(values)
    assert manifest.hash == manifest.find_hash()
