from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from sqlalchemy import select, text

from tests.store.content import claimed, finish, open_study, spec
from tribute.cli import export_command, import_command
from tribute.errors import ConfigError, MixedResultsError, StoreError
from tribute.store.backup import FORMAT_VERSION, export_parquet, import_parquet
from tribute.store.records import Store
from tribute.store.tables import behavior, evaluation


def rows(store: Store, *, numbered: bool) -> dict[str, Any]:
    """All columns of all evaluations and behaviors; without what only this store's own claims and numbers mean."""
    own = {"owner_token", "lease_expires", *(() if numbered else ("id", "study_id"))}

    def read(connection: Any, _number: int) -> dict[str, Any]:
        measured = (
            select(evaluation.c.identity, behavior).join(behavior).order_by(evaluation.c.identity, behavior.c.name)
        )
        return {
            "evaluation": [
                {name: value for name, value in row._mapping.items() if name not in own}
                for row in connection.execute(select(evaluation).order_by(evaluation.c.identity))
            ],
            "behavior": [
                (row.identity, row.name, row.value.hex(), row.definition) for row in connection.execute(measured)
            ],
        }

    return store.in_transaction(read, writes=False)


@pytest.fixture
def full(store: Store) -> Store:
    """Two studies, evaluations of every status, values that text would round, names that are no names."""
    names = ["ann", "=bob", "<b>x</b>", "chlöe\n", "", "مها", "f", "g", "h", "i"]
    main = open_study(store, contributor_names=names, config={"name": "main", "x": [1, None]})
    other = open_study(store, name="other", n=3)
    store.add(main, [spec(seed, role="fit", priority=seed, settings={"lr": 1 / 3, "t": "ü\\n"}) for seed in range(6)])
    store.add(main, [spec(None, removal_dist=None, datamodel_alpha=0.1, role="grand", priority=9)])
    store.add(other, [spec(0, [True, False, True])])
    definitions = {"fid": {"unit": "1", "variant": "classifier:01"}}
    for value in (0.1 + 0.2, math.nextafter(1.0, 2.0), 5e-324):
        store.finish(
            claimed(store, study_id=main),
            {"fid": value, "my:module": -1e300},
            seconds={"train": 1.25, "other": 0.1},
            provenance={"device": "cpu", "versions": {"torch": "2"}, "z": 1, "a": 2},
            definitions=definitions,
        )
    store.fail(claimed(store, study_id=main), "out of memory: '\"\n")
    finish(store, claimed(store, study_id=other), fid=7.0)
    store.record_artifact(main, "model", "models/full", sha256="aa", meta={"steps": 5})
    return store


def test_a_backup_makes_an_equal_store(full: Store, tmp_path: Path) -> None:
    assert export_parquet(full, tmp_path / "backup") == 8
    with Store.open(tmp_path / "copy.db") as copy:
        assert import_parquet(copy, tmp_path / "backup") == 8
        assert rows(copy, numbered=True) == rows(full, numbered=True)
        assert copy.studies() == full.studies()
        assert [s.config for s in copy.studies()] == [s.config for s in full.studies()]
        assert [copy.artifacts(s.study_id or 0) for s in copy.studies()] == [
            full.artifacts(s.study_id or 0) for s in full.studies()
        ]
        assert copy.check() == []
        assert import_parquet(copy, tmp_path / "backup") == 0
        assert rows(copy, numbered=True) == rows(full, numbered=True)
        export_parquet(copy, tmp_path / "second")
    for file in sorted((tmp_path / "backup").iterdir()):
        second = pyarrow.parquet.read_table(tmp_path / "second" / file.name)
        assert pyarrow.parquet.read_table(file).equals(second)


def test_one_study_goes_into_a_store_that_has_others(full: Store, tmp_path: Path) -> None:
    with Store.open(tmp_path / "copy.db") as copy:
        open_study(copy, name="before")
        assert export_parquet(full, tmp_path / "backup", study_ids=[2]) == 1
        assert import_parquet(copy, tmp_path / "backup") == 1
        assert [s.name for s in copy.studies()] == ["before", "other"]
        export_parquet(full, tmp_path / "backup")
        assert import_parquet(copy, tmp_path / "backup") == 7
        assert rows(copy, numbered=False) == rows(full, numbered=False) and copy.check() == []


def test_what_was_running_is_to_be_measured_in_the_copy(full: Store, tmp_path: Path) -> None:
    claim = claimed(full)
    export_parquet(full, tmp_path / "backup")
    with Store.open(tmp_path / "copy.db") as copy:
        import_parquet(copy, tmp_path / "backup")
        assert copy.counts() == {**full.counts(), "pending": full.counts()["pending"] + 1, "running": 0}
        assert copy.check() == [] and claimed(copy).spec == claim.spec


def test_what_is_finished_in_the_backup_only_becomes_finished(full: Store, tmp_path: Path) -> None:
    export_parquet(full, tmp_path / "backup")
    before = rows(full, numbered=True)
    full.reset(1, statuses=["finished"])
    full.retry(1)
    assert import_parquet(full, tmp_path / "backup") == 3
    after = rows(full, numbered=True)
    assert after["behavior"] == before["behavior"] and full.check() == []


def test_other_values_are_refused_whole(full: Store, tmp_path: Path) -> None:
    export_parquet(full, tmp_path / "backup")
    with Store.open(tmp_path / "copy.db") as copy:
        main = open_study(copy, contributor_names=full.studies()[0].contributor_names)
        (first, *_) = full.find(1, statuses=["finished"])
        copy.add(main, [first.spec])
        finish(copy, claimed(copy), fid=9.0)
        before = copy.find()
        with pytest.raises(MixedResultsError, match=r"finished with \{'fid': 9.0\}.*another store"):
            import_parquet(copy, tmp_path / "backup")
        assert copy.find() == before and len(copy.studies()) == 1


def test_other_contributors_are_refused(full: Store, tmp_path: Path) -> None:
    export_parquet(full, tmp_path / "backup")
    with Store.open(tmp_path / "copy.db") as copy:
        open_study(copy, n=4)
        with pytest.raises(MixedResultsError, match="4 contributors"):
            import_parquet(copy, tmp_path / "backup")


def test_masks_are_lists_of_bool_for_other_programs(full: Store, tmp_path: Path) -> None:
    export_parquet(full, tmp_path / "backup")
    table = pyarrow.parquet.read_table(tmp_path / "backup" / "evaluation.parquet")
    np.testing.assert_array_equal(
        table["coalition_mask"].to_pylist()[:6], [s.spec.coalition_mask for s in full.find(1)[:6]]
    )


def break_file(folder: Path) -> None:
    (folder / "behavior.parquet").write_bytes(b"PAR1, or what is left of it")


def lose_file(folder: Path) -> None:
    (folder / "behavior.parquet").unlink()


def come_from_the_future(folder: Path) -> None:
    path = folder / "study.parquet"
    table = pyarrow.parquet.read_table(path)
    about = {b"tribute": b'{"format": %d}' % (FORMAT_VERSION + 1)}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), path)


def come_from_elsewhere(folder: Path) -> None:
    path = folder / "study.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).replace_schema_metadata(None), path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (break_file, "behavior.parquet that cannot be read"),
        (lose_file, "has no behavior.parquet"),
        (come_from_the_future, "newer version"),
        (come_from_elsewhere, "did not write"),
    ],
)
def test_a_folder_that_is_no_backup_is_refused(tmp_path: Path, damage: Callable[[Path], None], match: str) -> None:
    with Store.open(tmp_path / "r.db") as store:
        open_study(store)
        export_parquet(store, tmp_path / "backup")
        damage(tmp_path / "backup")
        with pytest.raises(StoreError, match=match):
            import_parquet(store, tmp_path / "backup")


def test_a_backup_replaces_only_a_backup(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.db") as store:
        open_study(store)
        export_parquet(store, tmp_path / "backup")
        open_study(store, name="second")
        export_parquet(store, tmp_path / "backup")
        with Store.open(tmp_path / "copy.db") as copy:
            import_parquet(copy, tmp_path / "backup")
            assert len(copy.studies()) == 2
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.png").write_text("")
        for place in (tmp_path / "photos", tmp_path / "r.db"):
            with pytest.raises(StoreError, match="is something else"):
                export_parquet(store, place)
        assert (tmp_path / "photos" / "cat.png").exists()


def test_an_identity_that_does_not_fit_is_found_by_the_check(full: Store) -> None:
    full.in_transaction(lambda c, _: c.execute(text("UPDATE evaluation SET opt_seed = 77 WHERE id = 2")), writes=True)
    assert full.check() == ["1 evaluations with an identity that is not that of their settings: 2"]
    assert replace(full.find()[1].spec, opt_seed=0).identity != full.find()[1].spec.identity


def test_the_commands_back_up_and_restore(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = full._engine.url.render_as_string(hide_password=False)
    export_command.run(["--db", url, "--out", "backup", "--format", "parquet"], "tribute export")
    import_command.run(["--db", "copy.db", "--file", "backup"], "tribute import")
    with Store.open("copy.db", create=False) as copy:
        assert rows(copy, numbered=True) == rows(full, numbered=True)
    export_command.run(["--db", url, "--out", "one", "--format", "parquet", "--study", "other"], "tribute export")
    assert capsys.readouterr().out.splitlines() == [
        "wrote 8 evaluations to backup",
        "8 new evaluations in copy.db",
        "wrote 1 evaluations to one",
    ]
    for run, flags, match in [
        (export_command.run, ["--db", url, "--out", "two", "--format", "parquet", "--study", "x"], "main, other"),
        (export_command.run, ["--db", url, "--out", "two", "--format", "parquet", "--exp_name", "e1"], "whole studies"),
        (export_command.run, ["--db", url, "--out", "two", "--study", "main"], "--format parquet"),
        (import_command.run, ["--db", "copy.db", "--file", "backup", "--dataset", "digits"], "leave it out"),
    ]:
        with pytest.raises(ConfigError, match=match):
            run(flags, "tribute")
    assert not Path("two").exists()
