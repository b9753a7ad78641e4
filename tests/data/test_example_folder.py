"""The example that writes a folder of images with owners."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tribute.data.sources import load_training_data

SCRIPT = Path(__file__).parents[2] / "examples" / "make_folder.py"


def test_the_example_writes_a_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    for i in range(400):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(buffer, "JPEG" if i % 2 else "PNG")
        records.append({"bytes": buffer.getvalue()})
    # A JPEG may begin with any segment, here with a comment.
    records[1]["bytes"] = b"\xff\xd8\xff\xfe\x00\x04hi" + records[1]["bytes"][2:]
    pq.write_table(pa.table({"img": records, "label": np.arange(400) % 10}), tmp_path / "train.parquet")
    folder = tmp_path / "contributors"
    monkeypatch.setattr(sys, "argv", ["make_folder.py", "--data_dir", str(tmp_path), "--to", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    options = {"contributor_column": "artist", "label_column": "label", "image_size": 8, "cache_dir": tmp_path}
    data = load_training_data("folder", data_dir=folder, **options)
    assert data.n_examples == 400 and data.contributors.n_contributors == 12 and len(data.label_names) == 10
    assert (folder / "images" / "00001.jpg").is_file()
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "exists already" in capsys.readouterr().err
