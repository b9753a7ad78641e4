"""What is changed in a run after its end is found and named, all of it; what is only moved is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_study import SilentListener

from tribute.cli import main
from tribute.config import StudyConfig, fingerprint
from tribute.errors import ConfigError
from tribute.models.checkpoint import load_checkpoint, save_checkpoint
from tribute.store.records import FinishedEvaluation, Store
from tribute.study.manifest import FILE_NAME, hash_of_manifest, read_manifest, update_outputs
from tribute.study.run import run_study
from tribute.study.verification import find_run_dir, verify_run

Sql = Callable[..., None]
Edit = Callable[..., None]
SPARSE = "digits/prune_fine_tune/models/pruner=magnitude_pruning_ratio=0.3_threshold=0.05/full"
BRIGHTNESS, CONTRAST = "attested_behaviors:brightness", "attested_behaviors:contrast"


def differences(run_dir: Path, **options: Any) -> list[str]:
    return verify_run(run_dir, **options).differences


def rewrite_hash(values: dict[str, Any]) -> None:
    values["hash"] = hash_of_manifest(values)


def test_a_run_that_was_moved_and_renamed_agrees_in_everything(run_dir: Path) -> None:
    found = verify_run(run_dir)
    assert found.differences == []
    assert found.is_sound
    text = "\n".join(found.agreed)
    for what in (
        "both hashes follow",
        "18 files have the recorded SHA-256",
        "full, pruned, sparse have their hashes",
        "config.yaml and its preset are those of the run",
        "owners of digits have the recorded fingerprint",
        "20 of 20 planned evaluations are finished",
        "attributions: 4 fits, made again from the store, are identical to the last bit",
        "LDS: 4 fits, made again from the store, are identical to the last bit",
        "attributions.csv holds what is fitted",
        "attributions.parquet holds what is fitted",
        "summary.json: contributors and behaviors are those",
    ):
        assert what in text
    assert len(found.agreed) == 11
    assert [line.partition(":")[0] for line in found.unchecked] == [
        "weights of feature extractors and of a codec, and the measurements themselves"
    ]


def test_a_study_is_found_by_its_settings(
    finished: Path, make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text(make_study().to_yaml())
    assert find_run_dir(tmp_path / "study.yaml") == find_run_dir(finished) == finished
    with pytest.raises(ConfigError, match=r"holds no config\.yaml; expected the run folder"):
        find_run_dir(tmp_path)


def test_files_that_the_manifest_does_not_name_do_not_count(run_dir: Path) -> None:
    (run_dir / "report.html").write_text("<p>made later</p>")
    (run_dir / "notes.txt").write_text("mine")
    for state in run_dir.rglob("training_state.safetensors"):
        state.unlink()
    assert differences(run_dir) == []


def edited_csv(run_dir: Path) -> None:
    path = run_dir / "attributions.csv"
    rows = path.read_text().splitlines(keepends=True)
    cells = rows[3].split(",")
    cells[5] = "123.5"
    path.write_text("".join([*rows[:3], ",".join(cells), *rows[4:]]))


def test_an_edited_table_is_named_with_its_row(run_dir: Path) -> None:
    edited_csv(run_dir)
    by_hash, by_value = differences(run_dir)
    assert by_hash.startswith("attributions.csv: changed; recorded SHA-256")
    assert by_value.startswith(
        f"attributions.csv: shapley of '2' for {BRIGHTNESS}: attribution: the file has 123.5, the store"
    )


def test_an_edited_table_whose_hash_was_renewed_is_still_found(run_dir: Path) -> None:
    edited_csv(run_dir)
    update_outputs(run_dir)
    (found,) = differences(run_dir)
    assert "the file has 123.5" in found


def falsify_share(run_dir: Path) -> None:
    path = run_dir / "attributions.csv"
    rows = path.read_text().splitlines(keepends=True)
    cells = rows[3].split(",")
    cells[9] = "0.75"
    path.write_text("".join([*rows[:3], ",".join(cells), *rows[4:]]))


def add_row(run_dir: Path) -> None:
    """The true row stays, below a better one."""
    path = run_dir / "attributions.csv"
    rows = path.read_text().splitlines(keepends=True)
    cells = rows[3].split(",")
    cells[5] = "123.5"
    path.write_text("".join([*rows[:3], ",".join(cells), *rows[3:]]))


def falsify_parquet(run_dir: Path) -> None:
    path = run_dir / "attributions.parquet"
    table = parquet.read_table(path)
    values = table["share"].to_pylist()
    values[2] = 0.75
    parquet.write_table(table.set_column(9, "share", pyarrow.array(values)), path)


def falsify_summary(run_dir: Path) -> None:
    path = run_dir / "summary.json"
    values = json.loads(path.read_text())
    values["behaviors"][BRIGHTNESS]["lds"]["shapley"]["mean"] = 0.97
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("falsify", "expected"),
    [
        (falsify_share, f"attributions.csv: shapley of '2' for {BRIGHTNESS}: share: the file has 0.75, the store"),
        (add_row, "attributions.csv: other columns or rows than the store gives"),
        (falsify_parquet, f"attributions.parquet: shapley of '2' for {BRIGHTNESS}: share: the file has 0.75, the"),
        (falsify_summary, f"summary.json: behaviors: {BRIGHTNESS}: lds: shapley: mean: the file has 0.97, the store"),
    ],
)
def test_every_number_of_the_results_is_compared_with_the_store(
    run_dir: Path, falsify: Callable[[Path], None], expected: str
) -> None:
    falsify(run_dir)
    update_outputs(run_dir)  # as anybody could who can write the folder
    (found,) = differences(run_dir)
    assert found.startswith(expected)


@pytest.mark.parametrize("section", ["data", "models", "extractors"])
def test_a_result_hash_covers_the_sections_that_it_is_made_of(run_dir: Path, edit_json: Edit, section: str) -> None:
    """Who keeps `result`, of which a hash was published, and changes what it stands for."""

    def falsify(values: dict[str, Any]) -> None:
        part = values[section]
        if section == "data":
            part["fingerprint"] = "0" * 64
        elif section == "models":
            part["full"]["model_hash"] = "0" * 64
        else:
            part["other"] = {"fingerprint": "0" * 64}
        rewrite_hash(values)

    edit_json(FILE_NAME, falsify)
    assert f"manifest.json: the section {section} is not the one that result.{section} was made of" in differences(
        run_dir
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: (d / "lds.png").unlink(), ["lds.png: missing"]),
        (lambda d: (d / "summary.json").write_text("{}"), ["summary.json: changed"]),
        (
            lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text() + "# a word\n"),
            ["config.yaml: changed"],
        ),
        (
            lambda d: (d / "config.yaml").write_text(
                (d / "config.yaml").read_text().replace("pruning_ratio: 0.3", "pruning_ratio: 0.4")
            ),
            ["config.yaml: changed", "settings: config.yaml with its preset gives"],
        ),
        (
            lambda d: (d / "config.yaml").write_text(
                (d / "config.yaml").read_text().replace("max_examples: null", "max_examples: 1000")
            ),
            ["config.yaml: changed", "settings: ", "data: recorded fingerprint"],
        ),
        (
            lambda d: (d / "config.yaml").write_text(
                (d / "config.yaml").read_text().replace("estimator: auto", "estimator: ridge")
            ),
            ["config.yaml: changed", "settings: ", f"attributions: shapley for {BRIGHTNESS}: estimator recorded"],
        ),
    ],
)
def test_a_changed_file_is_named(run_dir: Path, change: Callable[[Path], Any], expected: list[str]) -> None:
    change(run_dir)
    found = differences(run_dir)
    for start in expected:
        assert any(line.startswith(start) for line in found), found


def test_damaged_weights_are_named_by_file_and_by_model(run_dir: Path) -> None:
    (weights,) = (run_dir / SPARSE).glob("*/ema.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = differences(run_dir)
    name = weights.relative_to(run_dir).as_posix()
    assert any(line.startswith(f"{name}: changed") for line in found)
    assert any(line.startswith("sparse model: ema.safetensors in ") for line in found)
    assert any(line.startswith("sparse model: another model; recorded hash") for line in found)


def test_a_whole_checkpoint_put_in_the_place_of_another_is_found(run_dir: Path, edit_json: Edit) -> None:
    """It agrees with its own config.json; and somebody wrote its hashes into the manifest, too."""
    sparse = load_checkpoint(run_dir / SPARSE)
    other = {name: tensor + 0.01 for name, tensor in sparse.ema.items()}
    meta = {name: value for name, value in sparse.meta.items() if name not in ("files", "n_steps", "format_version")}
    save_checkpoint(
        run_dir / SPARSE, n_steps=sparse.n_steps, unet=sparse.unet, ema=other, meta=meta, pruning=sparse.pruning
    )
    swapped = load_checkpoint(run_dir / SPARSE)
    found = differences(run_dir)
    assert any(line.startswith("sparse model: another model") for line in found)
    assert any("was measured from another sparse model than the one in the run folder" in line for line in found)

    def cover_up(values: dict[str, Any]) -> None:
        files = {name: sha for name, sha in swapped.meta["files"].items() if not name.startswith("training")}
        values["models"]["sparse"] |= {"model_hash": swapped.model_hash, "files": files}
        place = values["models"]["sparse"]["path"]
        values["files"] |= {f"{place}/{name}": sha for name, sha in files.items()}
        rewrite_hash(values)

    edit_json(FILE_NAME, cover_up)
    found = differences(run_dir)
    assert any("was measured from another sparse model" in line for line in found)


def test_an_edited_manifest_names_the_hash_that_it_no_longer_has(run_dir: Path, edit_json: Edit) -> None:
    def more_credit(values: dict[str, Any]) -> None:
        values["attributions"][BRIGHTNESS]["shapley"]["values"][4] = (7.5).hex()

    edit_json(FILE_NAME, more_credit)
    found = differences(run_dir)
    assert any("its content was changed after it was written: it names the hash" in line for line in found)
    assert any("the section attributions is not the one that result.attributions was made of" in line for line in found)
    assert any(f"shapley for {BRIGHTNESS}: values of '4': recorded 7.5, from the store" in line for line in found)


def test_a_value_changed_in_the_store_is_named_with_its_evaluation(run_dir: Path, sql: Sql) -> None:
    sql("UPDATE behavior SET value = value + 1e-12 WHERE evaluation_id = 7 AND name = ?", CONTRAST)
    (found,) = differences(run_dir)  # too little to change an attribution beyond the tolerance
    assert found.startswith("store: evaluation 7 (fit, attested/gd, orthogonal seed 4, training seed 42) is not as")
    sql("UPDATE behavior SET value = value + 5 WHERE evaluation_id = 7 AND name = ?", CONTRAST)
    found = differences(run_dir)
    assert any(line.startswith("store: evaluation 7 ") for line in found)
    assert any(line.startswith(f"attributions: shapley for {CONTRAST}: values of ") for line in found)
    assert any(line.startswith("attributions.csv: shapley of ") for line in found)


def test_another_coalition_under_the_same_identity_is_named(run_dir: Path, sql: Sql) -> None:
    sql("UPDATE evaluation SET coalition = (SELECT coalition FROM evaluation WHERE id = 8) WHERE id = 5")
    found = differences(run_dir)
    assert any(
        line.startswith("store: evaluation 5 (") and "do not give the identity under which it is stored" in line
        for line in found
    )


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('UPDATE behavior SET definition = \'{"unit": "EUR"}\' WHERE evaluation_id = 9', "store: evaluation 9 ("),
        ("UPDATE evaluation SET status = 'failed' WHERE id = 3", "store: evaluation 3 ("),
        ("UPDATE evaluation SET role = 'fit' WHERE id = 20", "store: evaluation 20 (fit, "),
        ("UPDATE evaluation SET opt_seed = 43 WHERE id = 4", "store: evaluation 4 ("),
        ("UPDATE contributor SET n_examples = 9999 WHERE contributor_idx = 2", "store: its contributors, or their"),
        ("UPDATE contributor SET contributor_name = 'me' WHERE contributor_idx = 2", "store: its contributors, or"),
        ("UPDATE study SET fingerprint = 'other'", "store: "),
    ],
)
def test_whatever_is_changed_in_the_store_is_named(run_dir: Path, sql: Sql, statement: str, expected: str) -> None:
    sql(statement)
    found = differences(run_dir)
    assert any(line.startswith(expected) for line in found), found


def test_an_evaluation_that_was_deleted_is_named(run_dir: Path, sql: Sql) -> None:
    sql("DELETE FROM behavior WHERE evaluation_id = 6")
    sql("DELETE FROM evaluation WHERE id = 6")
    assert any(
        line.startswith("store: fit evaluation ") and line.endswith(" is missing") for line in differences(run_dir)
    )


def test_times_owners_and_further_evaluations_do_not_count(run_dir: Path, sql: Sql) -> None:
    sql("UPDATE evaluation SET finished = 1.0, started = 0.5, created = 0.1, owner = NULL, seconds = '{\"train\": 9}'")
    with Store.open(run_dir / "results.db") as store:
        known = store.find()[4]
        further = replace(known.spec, exp_name="pilot", role="pilot")
        store.add_finished({store.studies()[0]: [FinishedEvaluation(further, known.behaviors)]})
        assert store.counts()["finished"] == 21
    assert differences(run_dir) == []


def test_a_copy_of_the_store_on_a_server_agrees(run_dir: Path, postgres_url: str) -> None:
    with Store.open(run_dir / "results.db") as store, Store.open(postgres_url) as server:
        server.add_finished({store.studies()[0]: list(reversed(store.find()))})
    (run_dir / "results.db").unlink()
    found = verify_run(run_dir, db=postgres_url)
    assert found.differences == []
    assert any("attributions: 4 fits, made again from the store, are identical" in line for line in found.agreed)


def test_a_damaged_store_is_a_difference(run_dir: Path) -> None:
    with (run_dir / "results.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 16384)
    found = differences(run_dir)
    assert any(line.startswith("store: ") for line in found), found


def test_differences_are_all_listed(run_dir: Path, sql: Sql, edit_json: Edit) -> None:
    (run_dir / "lds.png").unlink()
    edited_csv(run_dir)
    sql("UPDATE behavior SET value = 0.25 WHERE evaluation_id = 12")
    edit_json("study.json", lambda values: values["n_examples"].__setitem__(0, 1))
    starts = {line.split(":")[0] for line in differences(run_dir)}
    assert {"lds.png", "attributions.csv", "study.json", "store", "attributions"} <= starts


def test_many_differences_of_one_kind_are_counted(run_dir: Path, sql: Sql) -> None:
    sql("UPDATE behavior SET value = value + 1")
    found = [line for line in differences(run_dir) if line.startswith("store: ")]
    assert len(found) == 6
    assert found[-1] == "store: and 15 more like the last one"


def test_a_hash_that_was_published_before_is_compared(run_dir: Path) -> None:
    manifest = read_manifest(run_dir)
    assert manifest is not None
    for published in (manifest.hash, manifest.result_hash, manifest.hash[:12].upper()):
        assert differences(run_dir, published_hash=published) == []
    (found,) = differences(run_dir, published_hash="0" * 64)
    assert found == (
        f"the hash given is 000000000000; the manifest here has the hash {manifest.hash[:12]} and the result_hash "
        f"{manifest.result_hash[:12]}"
    )
    with pytest.raises(ConfigError, match="at least 12 hexadecimal digits"):
        verify_run(run_dir, published_hash=manifest.hash[:5])


def test_a_run_without_a_manifest_is_compared_with_itself(run_dir: Path, sql: Sql) -> None:
    (run_dir / FILE_NAME).unlink()
    found = verify_run(run_dir)
    (missing,) = found.differences
    assert missing.startswith("manifest.json is not there: the study has not come to its end")
    text = "\n".join(found.agreed)
    for what in ("full, pruned, sparse have their hashes", "20 of 20 planned", "fingerprint", "attributions.csv holds"):
        assert what in text
    sql("UPDATE evaluation SET opt_seed = 43 WHERE id = 4")
    edited_csv(run_dir)
    found = verify_run(run_dir)
    assert any(line.startswith("store: evaluation 4 ") for line in found.differences)
    assert any(line.startswith("attributions.csv: shapley of '2'") for line in found.differences)


def test_a_study_half_done_says_so_and_what_is_there_agrees(make_study: Callable[..., StudyConfig]) -> None:
    config = make_study(name="half", fit={"n_coalitions": 12, "n_end_points": 1}, test={"n_coalitions": 0})
    with pytest.raises(KeyboardInterrupt):
        run_study(config, SilentListener(interrupt_after=1))
    found = verify_run(config.run_dir)
    assert len(found.differences) == 1
    assert found.differences[0].startswith("manifest.json is not there")
    assert any("1 of 14 planned evaluations are finished, and all have their identities" in x for x in found.agreed)
    assert any(line.startswith("attributions: too little is measured") for line in found.unchecked)


def test_a_store_that_is_gone_is_a_difference_and_one_elsewhere_can_be_named(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "other.db"
    (run_dir / "results.db").rename(moved)
    (found,) = differences(run_dir)
    assert found.startswith("store: ") and "results.db is not there" in found
    assert differences(run_dir, db=str(moved)) == []


def test_what_is_verified_is_not_changed(run_dir: Path, sql: Sql) -> None:
    """Not even brought up to date: it may be what a dispute is about."""
    before = (run_dir / "results.db").read_bytes()
    assert differences(run_dir) == []
    assert (run_dir / "results.db").read_bytes() == before
    sql("UPDATE tribute_schema SET version = 1")
    before = (run_dir / "results.db").read_bytes()
    (found,) = differences(run_dir)
    assert "has an older schema" in found
    assert (run_dir / "results.db").read_bytes() == before
    assert not list(run_dir.glob("*.bak"))


def test_what_is_not_on_this_machine_is_told_and_is_no_difference(
    run_dir: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workshop / "tiny.yaml").rename(workshop / "away.yaml")
    try:
        found = verify_run(run_dir)
    finally:
        (workshop / "away.yaml").rename(workshop / "tiny.yaml")
    assert found.differences == []
    assert any(line.startswith("settings: the preset is not on this machine") for line in found.unchecked)


def junk_at(values: dict[str, Any], path: tuple[str, ...], junk: Any) -> None:
    for name in path[:-1]:
        values = values[name]
    if junk is None:
        del values[path[-1]]
    else:
        values[path[-1]] = junk


@pytest.mark.parametrize("junk", [None, [1], {"a": {"b": 1}}], ids=str)
def test_no_manifest_makes_the_command_fall_over(
    run_dir: Path, edit_json: Edit, junk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changed it wrote anything at all; the answer is a sentence, never a traceback."""
    monkeypatch.setattr("tribute.study.verification.check_data", lambda *_, **__: None)
    monkeypatch.setattr("tribute.study.verification._refit", lambda *_: None)
    original = (run_dir / FILE_NAME).read_text()
    places: list[tuple[str, ...]] = [(name,) for name in json.loads(original)]
    places += [("result", "data"), ("models", "full"), ("models", "full", "files"), ("models", "sparse", "path")]
    places += [("attributions", BRIGHTNESS), ("store", "evaluations"), ("data", "image_shape"), ("files", "study.json")]
    for place in places:
        (run_dir / FILE_NAME).write_text(original)
        edit_json(FILE_NAME, lambda values, place=place: junk_at(values, place, junk))
        assert differences(run_dir), place


def test_numbers_that_are_none_are_named(run_dir: Path, edit_json: Edit) -> None:
    def no_number(values: dict[str, Any]) -> None:
        values["attributions"][BRIGHTNESS]["shapley"]["values"][0] = "much"
        values["attributions"][BRIGHTNESS]["shapley"]["standard_errors"] = ["0x1p+0"]
        values["lds"][BRIGHTNESS]["shapley"] = {"n_test": 4000}

    edit_json(FILE_NAME, no_number)
    found = differences(run_dir)
    assert any("values of '0': recorded nan" in line for line in found)
    assert any("standard_errors recorded ['0x1p+0'], found" in line for line in found)
    assert any("LDS: shapley" in line and "n_test recorded 4000, found 3" in line for line in found)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../etc/passwd", "a/../../b", "a\\b"])
def test_a_manifest_cannot_point_out_of_its_folder(run_dir: Path, edit_json: Edit, name: str) -> None:
    edit_json(FILE_NAME, lambda values: values["files"].__setitem__(name, "0" * 64))
    found = differences(run_dir)
    assert any("is not below the run folder" in line for line in found)
    edit_json(FILE_NAME, lambda values: values["files"].pop(name))
    edit_json(FILE_NAME, lambda values: values["models"]["full"].__setitem__("path", name))
    assert any("is not below the run folder" in line for line in differences(run_dir))


def test_a_manifest_of_a_newer_version_is_refused(run_dir: Path, edit_json: Edit) -> None:
    edit_json(FILE_NAME, lambda values: values.__setitem__("format_version", 2))
    assert any("has format 2, this version reads up to 1; upgrade" in line for line in differences(run_dir))


def test_the_command_prints_all_and_its_status_says_whether_anything_differs(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("verify", [str(run_dir)])
    shown = capsys.readouterr().out
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert f"hash         {manifest.hash}" in shown
    assert shown.endswith("nothing differs\n")
    edited_csv(run_dir)
    with pytest.raises(SystemExit) as stopped:
        main("verify", [str(run_dir), "--hash", manifest.hash])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    assert "DIFFERS      attributions.csv: changed" in shown
    assert shown.endswith("2 differences\n")


def test_verification_needs_no_pytorch(run_dir: Path, workshop: Path) -> None:
    code = (
        "import sys; from tribute.cli import main; main('verify', [sys.argv[1]]); "
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(workshop), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing differs" in done.stdout
    assert "attributions: 4 fits, made again from the store, are identical to the last bit" in done.stdout


# Deep


@pytest.fixture
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_one_thread")
def test_a_value_falsified_before_the_manifest_is_found_by_measuring_again(
    run_dir: Path, sql: Sql, make_study: Callable[..., StudyConfig]
) -> None:
    found = verify_run(run_dir, deep=True, n_evaluations=2, seed=3)
    assert found.differences == found.unchecked == []
    assert sum("behaviors are identical to the last bit" in line for line in found.agreed) == 2
    assert any(
        "data, extractors, settings and models, loaded anew, give the 20 recorded evaluations" in line
        for line in found.agreed
    )
    # Whoever leads the study changes all values a little, fits again, and writes a manifest that agrees with itself.
    sql("UPDATE behavior SET value = value * 1.0000001 WHERE name = ?", BRIGHTNESS)
    config = make_study(outdir=str(run_dir.parent), name="attested")
    shutil.copytree(run_dir, config.run_dir)
    (config.run_dir / "config.yaml").unlink()
    assert run_study(config, SilentListener()) is not None
    for name in ("attributions.csv", "attributions.parquet", "summary.json"):
        (config.run_dir / name).unlink()
    update_outputs(config.run_dir)
    assert differences(config.run_dir) == []
    (lie,) = differences(config.run_dir, deep=True, seed=5)
    assert lie.startswith("measured again: evaluation ")
    assert f"{BRIGHTNESS} stored " in lie
    assert lie.endswith("on the same device with the same versions and threads")


@pytest.mark.usefixtures("_one_thread")
def test_nothing_is_concluded_from_another_device(run_dir: Path, sql: Sql) -> None:
    sql("UPDATE evaluation SET provenance = json_set(provenance, '$.device', 'a GPU')")
    sql("UPDATE behavior SET value = value * 1.0000001 WHERE name = ?", BRIGHTNESS)
    found = verify_run(run_dir, deep=True)
    assert not any(line.startswith("measured again") for line in found.differences)
    (told,) = (line for line in found.unchecked if line.startswith("measured again"))
    assert "measured with another device, which may change digits" in told


@pytest.mark.usefixtures("_one_thread")
def test_another_classifier_is_a_difference_only_where_it_would_have_been_the_same(
    run_dir: Path, sql: Sql, edit_json: Edit
) -> None:
    def with_classifier(values: dict[str, Any]) -> None:
        values["extractors"]["classifier"] = {"fingerprint": "c1a551f1e8", "seed": 0}
        values["result"]["extractors"]["classifier"] = "c1a551f1e8"
        values["result_hash"] = fingerprint(values["result"])
        rewrite_hash(values)

    edit_json(FILE_NAME, with_classifier)
    told = "extractor classifier: recorded fingerprint c1a551f1e8, found none"
    assert told in differences(run_dir, deep=True)
    sql("UPDATE evaluation SET provenance = json_set(provenance, '$.versions.torch', '9')")
    found = verify_run(run_dir, deep=True)
    assert found.differences == []
    (line,) = found.unchecked
    assert line.startswith(f"measurements: {told}: it was trained anew, with another versions")


@pytest.mark.usefixtures("_one_thread")
def test_a_model_that_was_loaded_is_looked_for_where_it_was(
    make_study: Callable[..., StudyConfig], write_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pipeline()
    small = {"fit": {"n_coalitions": 12, "n_end_points": 1}, "test": {"n_coalitions": 0}}
    config = make_study(name="loaded", outdir=str(tmp_path), full_model={"load": str(folder)}, **small)
    assert run_study(config, SilentListener()) is not None
    manifest = read_manifest(config.run_dir)
    assert manifest is not None
    full = manifest.values["models"]["full"]
    assert (full["path"], full["origin"]["name"]) == (None, "pipeline")
    assert str(tmp_path) not in (config.run_dir / FILE_NAME).read_text()
    found = verify_run(config.run_dir, deep=True)
    assert found.differences == []
    assert [line.partition(":")[0] for line in found.unchecked] == ["settings"]
    assert any(line.startswith("models: full, pruned, sparse have their hashes") for line in found.agreed)
    assert any(line.startswith("measured again: ") for line in found.agreed)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (changed,) = differences(config.run_dir)
    assert changed.startswith("full model: unet.safetensors of the model loaded from ")
    shutil.rmtree(folder)
    found = verify_run(config.run_dir)
    assert found.differences == []
    assert any(line.startswith("full model: it was loaded from elsewhere, and ") for line in found.unchecked)
