from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tribute.files import sha256_of_file, unfinished_path, write_whole, write_whole_dir


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse_to_rename_partials(self: Path, target: Path) -> Path:
    if self.name.endswith(".partial"):
        raise OSError("the rename failed")
    self.rename(target)
    return Path(target)


def test_sha256_of_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4_097  # longer than one read
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", ["text: é", b"\x00\xff", ""])
def test_a_file_is_replaced_whole(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_whole(path, "something longer that was there before")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.txt", "old")

    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as handle:
            handle.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="no space"):
            write_whole(tmp_path / "a.txt", "the new content")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse_to_rename_partials)
        with pytest.raises(OSError, match="rename"):
            write_whole(tmp_path / "a.txt", "the new content")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_the_place_of_a_file_is_untouched_until_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.txt", "old")
    seen = []
    rename = Path.replace

    def look_then_rename(self: Path, target: Path) -> Path:
        seen.append(((tmp_path / "a.txt").read_text(), self.read_text()))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", look_then_rename)
    write_whole(tmp_path / "a.txt", "new")
    assert seen == [("old", "new")]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(name)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "model"
    write_whole_dir(target, lambda folder: fill(folder, "a", "b"))
    assert contents(tmp_path / "runs") == {"model/a": b"a", "model/b": b"b"}
    write_whole_dir(target, lambda folder: fill(folder, "c"))
    assert contents(tmp_path / "runs") == {"model/c": b"c"}


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    write_whole_dir(target, lambda folder: fill(folder, "a"))

    def fill_half(folder: Path) -> None:
        fill(folder, "b")
        assert contents(target) == {"a": b"a"}
        raise error

    with pytest.raises(type(error)):
        write_whole_dir(target, fill_half)
    assert contents(tmp_path) == {"model/a": b"a"}
    with pytest.raises(type(error)):
        write_whole_dir(tmp_path / "other", fill_half)
    assert contents(tmp_path) == {"model/a": b"a"}


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_whole_dir(target, lambda folder: fill(folder, "a"))
    monkeypatch.setattr(Path, "replace", refuse_to_rename_partials)
    with pytest.raises(OSError, match="rename"):
        write_whole_dir(target, lambda folder: fill(folder, "b"))
    assert contents(tmp_path) == {"model/a": b"a"}


def test_what_a_killed_process_left_does_not_disturb(tmp_path: Path) -> None:
    leftover = unfinished_path(tmp_path / "model")
    leftover.mkdir()
    fill(leftover, "half")
    write_whole_dir(tmp_path / "model", lambda folder: fill(folder, "a"))
    assert contents(tmp_path) == {"model/a": b"a"}


@pytest.mark.parametrize("when", ["old is moved aside", "new is in place"])
def test_a_folder_that_is_interrupted_between_its_two_renames_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    place = tmp_path / "a"
    write_whole_dir(place, lambda folder: write_whole(folder / "file", "old"))
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        is_new = self.name.endswith(".partial") and self.is_dir()
        if is_new and when == "new is in place":
            rename(self, target)
        if is_new:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole_dir(place, lambda folder: write_whole(folder / "file", "new"))
    assert contents(tmp_path) == {"a/file": b"new" if when == "new is in place" else b"old"}
