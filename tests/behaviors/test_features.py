"""Features are checked, and artifacts are written whole, hashed, and read back as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tribute.behaviors.features import Features, content_hash, read_artifact, write_artifact
from tribute.errors import BehaviorError


def test_artifact_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_artifact(tmp_path / "a", {"x": np.ones(3)}, {})
    assert list(tmp_path.iterdir()) == []


def test_artifact_keeps_shapes_and_types(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(3),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "none": np.empty((0, 4), np.float32),
    }
    write_artifact(tmp_path / "a", arrays, {"half": 0.1})
    found, facts = read_artifact(tmp_path / "a")
    assert facts == {"half": 0.1}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_first_of_two_writers_wins(tmp_path: Path) -> None:
    assert write_artifact(tmp_path / "a", {"x": np.ones(3)}, {"writer": 1})
    assert not write_artifact(tmp_path / "a", {"x": np.zeros(3)}, {"writer": 2})
    arrays, facts = read_artifact(tmp_path / "a")
    assert facts == {"writer": 1} and arrays["x"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_features_must_be_finite_and_of_one_length() -> None:
    images, embeddings = np.zeros((3, 8, 8, 1), np.uint8), np.zeros((3, 4), np.float32)
    with pytest.raises(BehaviorError, match=r"3 images; found \(2, 4\)"):
        Features(images, embeddings[:2])
    embeddings[1, 2] = np.nan
    with pytest.raises(BehaviorError, match="image 1"):
        Features(images, embeddings)


def test_content_hash_sees_type_shape_and_every_part() -> None:
    array = np.arange(6, dtype=np.int32)
    others = [array.reshape(2, 3), array.astype(np.int64), array[:5], array + 1]
    assert len({content_hash(array), *(content_hash(other) for other in others)}) == 5
    assert content_hash("ab", "c") != content_hash("a", "bc")
    big = np.arange(3 * 2**22, dtype=np.int64)  # more than one block
    assert content_hash(big) != content_hash(np.append(big[:-1], 0))


def test_listing_behaviors_imports_nothing_heavy() -> None:
    code = (
        "import sys, tribute.behaviors.base as b; b.get_behavior('fid'); b.get_behavior('precision');"
        "print([m for m in ('torch', 'torchmetrics', 'scipy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
