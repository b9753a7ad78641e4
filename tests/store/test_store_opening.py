from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tribute.errors import StoreError
from tribute.store.database import network_file_system
from tribute.store.records import Store
from tribute.store.tables import SCHEMA_VERSION


def test_folders_are_made_and_a_second_opening_finds_what_the_first_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.db"
    with Store.open(path) as store:
        study_id = store.open_study(
            "s",
            dataset="digits",
            contributor_names=["a"],
            n_examples=[3],
            fingerprint="f",
            config={"x": (1, 2)},
        )
    with Store.open(f"sqlite:///{path}", create=False) as store:
        assert store.location == str(path)
        (study,) = store.studies(name="s", dataset="digits")
        assert (study.study_id, study.n_examples, study.config) == (study_id, (3,), {"x": [1, 2]})
        assert store.studies(name="other") == []


def test_it_works_in_write_ahead_mode(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with Store.open(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_store_in_memory() -> None:
    with Store.open("sqlite://") as store:
        assert store.counts() == {"pending": 0, "running": 0, "finished": 0, "failed": 0}


def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with Store.open(path):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE tribute_schema SET version = {SCHEMA_VERSION + 6}")
    with pytest.raises(StoreError, match=rf"schema {SCHEMA_VERSION}.*schema {SCHEMA_VERSION + 6}.*[Uu]pgrade"):
        Store.open(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a directory.*results\.db"):
        Store.open(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Store.open(file / "results.db")
    with pytest.raises(StoreError, match=r"cannot be made|not writable|unable to open"):
        Store.open("/proc/results.db")


def test_a_file_that_is_not_writable_is_refused_before_the_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.db"
    with Store.open(path):
        pass
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere, so say that we may not
    with pytest.raises(StoreError, match="not writable"):
        Store.open(path)
    with Store.open(path, create=False) as store:
        assert store.counts()["pending"] == 0


@pytest.mark.parametrize("content", ["a note, not a database\n", "x" * 5000])
def test_a_file_that_is_not_a_database_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(StoreError, match="not a database"):
        Store.open(path)
    assert path.read_text() == content


def test_the_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="other tables: photos"):
        Store.open(path)
    with pytest.raises(StoreError, match="has none"):
        Store.open(path, create=False)
    assert path.read_bytes() == before


def test_a_missing_store_is_not_made_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Store.open(tmp_path / "typo.db", create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nosuchdatabase://user:secret@host/name", "://", "oracle+nothere://u:secret@h/n"])
def test_a_url_that_leads_nowhere_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert "secret" not in str(caught.value)


def test_a_lost_database_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DROP TABLE behavior")
        with pytest.raises(StoreError, match="no such table"):
            store.find()


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
me@host: /mnt/my\\040disk fuse.sshfs rw 0 0
server:/x /over nfs rw 0 0
/dev/sdc1 /over xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/r.db", None),
        ("/home/ann/r.db", "nfs4"),
        ("/home/local/r.db", None),
        ("/homework/r.db", None),
        ("/mnt/my disk/r.db", "sshfs"),
        ("/over/r.db", None),
    ],
)
def test_network_file_systems_are_recognised(path: str, kind: str | None) -> None:
    assert network_file_system(Path(path), MOUNTS) == kind


def test_a_file_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tribute.store.database.network_file_system", lambda *_: "nfs4")
    with pytest.raises(StoreError, match=r"nfs4.*local disk.*PostgreSQL"):
        Store.open(tmp_path / "results.db")
