"""The parts of a report that are there only where something else was run: pilot, pictures."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from reading import rows_of, texts
from written_report import Written, make_report

from benchmarks.synthetic_study import two_behaviors, write_synthetic_study
from tribute.errors import StoreError
from tribute.files import write_whole
from tribute.study.pictures import FILE_NAME as PICTURES
from tribute.study.pictures import FOLDER, SCHEMA, read_pictures
from tribute.study.pilot_record import PilotResult, judge


def test_the_pilot_is_part_of_the_proof(tmp_path: Path, plain: Written) -> None:
    study = write_synthetic_study(tmp_path, two_behaviors(6)[:1], n_fit=24)
    config = make_report(study).config
    found = judge(
        "inception_score",
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.5],
        [1.1, 2.3, 2.9, 4.2, 5.5, 6.0],
        higher_is_better=True,
        full=6.0,
        sparse=5.5,
        sft_pair=(1.0, 1.1),
        retrain_pair=(2.0, 2.1),
    )
    PilotResult("synthetic", ("110000",) * 6, (found,)).write(config.run_dir)
    report = make_report(study)
    assert "6 coalitions were measured in both ways" in report.document.by_id("proof").text
    table = next(
        t for t in report.document.by_id("proof").all("table") if t.all("caption")[0].text.startswith("What the pilot")
    )
    assert texts(rows_of(table)[0])[:2] == ["Inception Score", "1.00"] and texts(rows_of(table)[0])[-1] == "passed"
    assert report.document.by_id("term-pilot")
    assert "in both ways" not in plain.document.by_id("proof").text
    assert [item for item in plain.document.walk() if item.attributes.get("id") == "term-pilot"] == []


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_pictures(run_dir: Path, sizes: dict[str, int]) -> None:
    """Pictures as `tribute run` leaves them; sizes in bytes, by kind."""
    entries = []
    for kind, size in sizes.items():
        content = PNG + b"\0" * (size - len(PNG))
        write_whole(run_dir / FOLDER / f"{kind}.png", content)
        entries.append(
            {
                "kind": kind,
                "file": f"{kind}.png",
                "caption": f"Images of {kind} <b>",
                "behavior": "inception_score" if kind == "without_top" else None,
                "removed_idx": [0, 1] if kind == "without_top" else [],
                "n_images": 16,
                "columns": 8,
                "behaviors": {"inception_score": 1.25} if kind != "full" else {},
                "sha256": hashlib.sha256(content).hexdigest(),
                "evaluation": None,
                "model_hash": "0" * 64,
                "source": "1" * 64,
            }
        )
    write_whole(run_dir / FOLDER / PICTURES, json.dumps({"schema": SCHEMA, "pictures": entries}))
    assert len(read_pictures(run_dir)) == len(sizes)


def test_generated_images_are_within_the_page(tmp_path: Path, plain: Written) -> None:
    study = write_synthetic_study(tmp_path, two_behaviors(6), n_fit=24, contributor_names=["<b>A", *"BCDEF"])
    write_pictures(make_report(study).config.run_dir, {"sparse": 100, "full": 90, "without_top": 1000})
    report = make_report(study)
    section = report.document.by_id("pictures")
    images = section.all("img")
    assert [figure.text.split(".")[0] for figure in section.all("figcaption")] == [
        "By the full model",
        "By the sparse model, with everybody",
        "Without the top contributors to Inception Score",
    ]
    assert all(image.attributes["src"].startswith("data:image/png;base64,iVBOR") for image in images)
    assert all("16 generated images" in image.attributes["alt"] for image in images)
    assert "Without: <b>A, B. Measured: Inception Score 1.250." in section.all("figcaption")[2].text
    assert "pictures" not in [item.attributes["id"] for item in plain.document.all("section")]
    write_pictures(report.config.run_dir, {"full": 90, "sparse": 500_000})
    assert (
        "1 more picture is in the run folder, too large for this page"
        in make_report(study).document.by_id("pictures").text
    )


def test_a_picture_record_that_is_damaged_is_named(plain: Written, tmp_path: Path) -> None:
    study = write_synthetic_study(tmp_path, two_behaviors(6)[:1], n_fit=24)
    write_whole(make_report(study).config.run_dir / FOLDER / PICTURES, "{")
    with pytest.raises(StoreError, match="pictures"):
        make_report(study)
