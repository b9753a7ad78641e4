"""Pictures of a study: what they show is what was measured, and nothing that is there is made again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_study import SilentListener

from tribute.config import StudyConfig
from tribute.errors import BehaviorError, StoreError
from tribute.files import sha256_of_file
from tribute.store.records import Store
from tribute.study import pictures
from tribute.study.outputs import image_grid_png
from tribute.study.pictures import Picture, file_name, read_pictures, top_contributors
from tribute.study.results import StudyResult
from tribute.study.run import run_study
from tribute.study.session import StudySession
from tribute.types import Attributions

MakeStudy = Callable[..., StudyConfig]
BRIGHTNESS, CONTRAST = "ink_behaviors:brightness", "ink_behaviors:contrast"
SMALL: dict[str, Any] = {
    "behaviors": ["ink_behaviors:brightness:lower", "ink_behaviors:contrast"],  # so that somebody has credit
    "fit": {"n_coalitions": 24, "n_end_points": 1, "first_removal_seed": 300},
    "test": {"n_coalitions": 0},
    "pictures": {"n_images": 12},  # all that an evaluation measures
}


def ran(config: StudyConfig) -> tuple[StudyResult, SilentListener]:
    listener = SilentListener()
    result = run_study(config, listener)
    assert result is not None
    return result, listener


def made(listener: SilentListener) -> list[str]:
    """Files that were made in a run."""
    return [text.split(":")[0] for text in listener.messages if text.startswith("samples/")]


def tiles(picture: Picture) -> np.ndarray:
    """The images in a picture `(n_images, 8, 8)`, as they were before the zoom."""
    with Image.open(picture.path) as image:
        grid = np.asarray(image)[::8, ::8]
    rows = grid.shape[0] // 9
    cells = grid.reshape(rows, 9, picture.columns, 9)[:, :8, :, :8]
    return cells.transpose(0, 2, 1, 3).reshape(-1, 8, 8)[: picture.n_images]


@pytest.fixture
def study(make_study: MakeStudy) -> tuple[StudyConfig, StudyResult, SilentListener]:
    config = make_study(**SMALL)
    return config, *ran(config)


def test_pictures_show_what_was_measured(study: tuple[StudyConfig, StudyResult, SilentListener]) -> None:
    config, result, listener = study
    full, sparse, *without = read_pictures(config.run_dir)
    assert (full.kind, sparse.kind, {item.kind for item in without}) == ("full", "sparse", {"without_top"})
    assert [item.behavior for item in without] == [BRIGHTNESS, CONTRAST]
    assert "Pictures" in listener.messages
    assert made(listener) == [f"samples/{item.path.name}" for item in (full, sparse, *without)]
    with Store.open(config.db_url, create=False) as store:
        found = {item.spec.identity: item for item in store.find()}
        artifacts = store.artifacts(1, kind="picture")
    for item in (sparse, *without):
        images, stored = tiles(item), found[item.evaluation or ""]
        assert images.shape == (12, 8, 8)
        # The behaviors of what is in the picture are those that were recorded for its model.
        assert float(images.mean()) == stored.behaviors[BRIGHTNESS] == item.behaviors[BRIGHTNESS]
        assert float(images.std(axis=(1, 2)).mean()) == pytest.approx(stored.behaviors[CONTRAST], rel=1e-12)
        assert stored.spec.method == "gd"
        assert stored.spec.opt_seed == config.opt_seed
        assert np.flatnonzero(~stored.spec.coalition_mask).tolist() == sorted(item.removed_idx)
    assert {found[item.evaluation or ""].spec.role for item in (sparse, *without)} == {"picture"}
    grand = next(item for item in found.values() if item.spec.role == "grand")
    assert sparse.behaviors == grand.behaviors  # v(grand) again, to the last bit
    assert sparse.removed_idx == ()
    for item, behavior in zip(without, result.behaviors, strict=True):
        assert item.removed_idx == top_contributors(behavior)
        assert len(item.removed_idx) == 3
    assert len({item.model_hash for item in (sparse, *without)}) == 1 != full.model_hash
    assert tiles(full).mean() != tiles(sparse).mean()
    assert full.behaviors == {}
    assert {(item.path, item.sha256) for item in artifacts} == {
        (f"samples/{item.path.name}", sha256_of_file(item.path)) for item in (full, sparse, *without)
    }


def test_evaluations_for_pictures_are_no_part_of_the_attributions(
    study: tuple[StudyConfig, StudyResult, SilentListener], make_study: MakeStudy
) -> None:
    config, result, _ = study
    with Store.open(config.db_url, create=False) as store:
        # `tribute lds` takes what was not drawn from a law to be v(grand).
        not_drawn = store.read(behavior_name=BRIGHTNESS, method="gd", removal_dist=None)
        assert not_drawn.masks.all()
        assert store.counts(role="picture")["finished"] >= 1
    plain, _ = ran(make_study(**SMALL | {"name": "plain", "pictures": {"n_images": 0}}))
    for one, other in zip(result.behaviors, plain.behaviors, strict=True):
        assert one.attributions["shapley"].values.tolist() == other.attributions["shapley"].values.tolist()
    assert result.counts == plain.counts
    assert not (plain.config.run_dir / "samples").exists()


def test_nothing_that_is_there_is_made_again(
    study: tuple[StudyConfig, StudyResult, SilentListener], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = study
    before = {item.path: item.path.read_bytes() for item in read_pictures(config.run_dir)}
    record = (config.run_dir / "samples" / "pictures.json").read_bytes()
    paths = list(before)

    assert made(ran(config)[1]) == []
    assert (config.run_dir / "samples" / "pictures.json").read_bytes() == record

    # A file that is gone, and one that was changed, are made again, as they were; and nothing is measured twice.
    paths[1].unlink()
    paths[2].write_bytes(paths[0].read_bytes())
    assert [item.path for item in read_pictures(config.run_dir)] == [paths[0], paths[3]]
    with Store.open(config.db_url, create=False) as store:
        counts = store.counts()
    assert made(ran(config)[1]) == [f"samples/{path.name}" for path in paths[1:3]]
    assert {path: path.read_bytes() for path in paths} == before
    with Store.open(config.db_url, create=False) as store:
        assert store.counts() == counts

    # Other top contributors of one behavior: its picture alone is another.
    rule = top_contributors
    monkeypatch.setattr(pictures, "top_contributors", lambda item: (0, 1) if item.name == CONTRAST else rule(item))
    assert made(ran(config)[1]) == [f"samples/{paths[3].name}"]
    assert read_pictures(config.run_dir)[3].removed_idx == (0, 1)
    assert paths[3].read_bytes() != before[paths[3]]

    # Nobody has credit for it any more: the old picture would be a lie.
    monkeypatch.setattr(pictures, "top_contributors", lambda item: () if item.name == CONTRAST else rule(item))
    listener = ran(config)[1]
    assert f"{CONTRAST}: no picture without the top contributors, as nobody has credit" in listener.messages
    assert [item.path for item in read_pictures(config.run_dir)] == paths[:3]
    assert not paths[3].exists()

    # Fewer images: all are others.
    fewer = config.replace(pictures=config.pictures.replace(n_images=5))
    assert len(made(ran(fewer)[1])) == 3
    assert [item.n_images for item in read_pictures(config.run_dir)] == [5, 5, 5]
    np.testing.assert_array_equal(tiles(read_pictures(config.run_dir)[0]), tiles_of(before[paths[0]])[:5])


def tiles_of(content: bytes) -> np.ndarray:
    import io

    with Image.open(io.BytesIO(content)) as image:
        grid = np.asarray(image)[::8, ::8]
    return grid.reshape(-1, 9, 8, 9)[:, :8, :, :8].transpose(0, 2, 1, 3).reshape(-1, 8, 8)


def test_a_picture_that_cannot_be_made_costs_no_result(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    off = make_study(**SMALL | {"pictures": {"n_images": 0}})
    first, _ = ran(off)
    config = make_study(**SMALL)

    def broken(self: StudySession, method: str, coalition_mask: Any, *, opt_seed: int) -> Any:
        raise BehaviorError("it is not a number")

    with monkeypatch.context() as patch:
        patch.setattr(StudySession, "measure", broken)
        result, listener = ran(config)
    assert result.behaviors[0].attributions["shapley"].values.tolist() == (
        first.behaviors[0].attributions["shapley"].values.tolist()
    )
    assert any(
        "no picture of the model without 3 contributors: it is not a number" in text for text in listener.messages
    )
    assert [item.kind for item in read_pictures(config.run_dir)] == ["full"]

    samples = config.run_dir / "samples"
    (samples / "pictures.json").unlink()
    with monkeypatch.context() as patch:

        def full_disk(path: Path, content: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(pictures, "write_whole", full_disk)
        _, listener = ran(config)
    assert any("not all pictures were made" in text and "make room" in text for text in listener.messages)
    assert len(made(ran(config)[1])) == 4  # and afterwards all is well


# Without a study


def behavior(values: list[float], *, higher: bool = True) -> Any:
    array = np.array(values)
    fitted = Attributions(array, np.zeros((len(array),) * 2), "shapley", "gp", "analytic", 1, 1, 0.0)
    return SimpleNamespace(attributions={"shapley": fitted}, definition={"higher_is_better": higher})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], ()),
        ([1.0, 3.0], (1,)),
        ([1.0, 3.0, 2.0], (1,)),
        ([1.0, 3.0, 2.0, 5.0], (3,)),
        ([1.0, 3.0, 2.0, 5.0, 0.0], (3, 1)),
        ([1.0, -3.0, -2.0, -5.0, -1.0], (0,)),
        ([-1.0, -3.0, -2.0], ()),
        ([float(i) for i in range(12)], (11, 10, 9)),
    ],
)
def test_who_is_left_out(values: list[float], expected: tuple[int, ...]) -> None:
    assert top_contributors(behavior(values)) == expected
    assert top_contributors(behavior([-x for x in values], higher=False)) == expected


def test_names_of_files_are_plain_and_differ() -> None:
    names = ["fid", "FID", "fid@inception", "a/b", "a:b", "../../etc/passwd", "x" * 300, "..", "\u0444\u0438\u0434"]
    files = [file_name(name) for name in names]
    assert files[0] == "without_top_fid.png"
    assert len({name.lower() for name in files}) == len(names)
    for name in files:
        assert len(name) < 100
        assert name.isascii()
        assert Path(name).name == name
        assert not set(name) & set('/\\:*?"<>| ')


def test_a_grid_is_a_png_that_others_read(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    for n_channels in (1, 3):
        images = stream.integers(0, 256, (5, 40, 33, n_channels), dtype=np.uint8)
        path = tmp_path / "grid.png"
        path.write_bytes(image_grid_png(images, n_columns=3))
        with Image.open(path) as image:
            assert image.mode == ("L" if n_channels == 1 else "RGB")
            found = np.asarray(image).reshape(2 * 41, 3 * 34, n_channels)
        np.testing.assert_array_equal(found[41:81, 34:67], images[4])
        assert (found[41:81, 68:] == 255).all()


def test_what_is_wrong_in_a_run_folder_is_told(tmp_path: Path) -> None:
    assert read_pictures(tmp_path) == []
    record = tmp_path / "samples" / "pictures.json"
    record.parent.mkdir()
    picture = Picture("full", record.parent / "full.png", "", None, (), 4, 8, {}, "0", None, "h", "s")
    values = {**{k: v for k, v in vars(replace(picture)).items() if k != "path"}, "file": "../summary.json"}
    for content in ("{", "[]", "{}", '{"schema": "tribute.pictures/2", "pictures": []}'):
        record.write_text(content)
        with pytest.raises(StoreError, match=r"pictures\.json cannot be read .* remove it"):
            read_pictures(tmp_path)
    record.write_text(json.dumps({"schema": "tribute.pictures/1", "pictures": [values]}))
    with pytest.raises(StoreError, match="expected the name of a file beside it"):
        read_pictures(tmp_path)
    record.write_text(json.dumps({"schema": "tribute.pictures/1", "pictures": [values | {"file": "full.png"}]}))
    assert read_pictures(tmp_path) == []  # the file is not there


def test_pictures_are_read_without_pytorch() -> None:
    code = (
        "import sys; from tribute.study.pictures import read_pictures; from tribute.report.payout import pay_out; "
        "from tribute.study.outputs import write_outputs; assert 'torch' not in sys.modules; "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
