"""`tribute report`: what it writes, where, and what it says when it cannot."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from reading import read_html

from benchmarks.synthetic_study import two_behaviors, write_synthetic_study
from tribute.cli import main
from tribute.config import StudyConfig


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_synthetic_study(tmp_path, two_behaviors(6)[:1], n_fit=24, n_test=8)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as caught:
        main("report", list(argv))
    assert caught.value.code == 1
    return capsys.readouterr().err


def test_it_is_written_into_the_run_folder_or_where_one_says(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("report", [str(study)])
    path = StudyConfig.from_yaml(study).run_dir / "report.html"
    assert "wrote" in capsys.readouterr().out
    assert read_html(path.read_text(encoding="utf-8")).by_id("answer")
    other = tmp_path / "elsewhere" / "page.html"
    main("report", [str(study), "--out", str(other), "--budget", "1000", "--currency", "JPY", "--negative", "pool"])
    assert "1,000 JPY" in read_html(other.read_text(encoding="utf-8")).by_id("payout").text
    found = sorted(item.name for item in other.parent.iterdir())
    assert found == ["page.html", "payout.csv"], "nothing half-written is left"
    rows = list(csv.DictReader((other.parent / "payout.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["contributor"] for row in rows] == [f"contributor {i + 1}" for i in range(6)]
    assert sum(int(row["amount"]) for row in rows) == 1000 and {row["negative"] for row in rows} == {"pool"}
    assert not (path.parent / "payout.csv").exists()


def test_it_may_be_read_in_any_folder(study: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    StudyConfig.from_yaml(study).outdir.rename(moved)
    main("report", [str(study), "--outdir", str(moved)])
    assert (moved / "synthetic" / "report.html").exists()


def test_what_is_wrong_is_said(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected behaviors of the study (inception_score); found beauty" in fails(
        capsys, str(study), "--behavior", "beauty"
    )
    assert "expected --budget beside them" in fails(capsys, str(study), "--currency", "EUR")
    assert "currency" in fails(capsys, str(study), "--budget", "10", "--currency", "EURO")
    (tmp_path / "folder.html" / "x").mkdir(parents=True)
    assert "could not be written" in fails(capsys, str(study), "--out", str(tmp_path / "folder.html"))
    assert "study.json is not there" in fails(capsys, str(study), "--outdir", str(tmp_path / "empty"))
    assert not (StudyConfig.from_yaml(study).run_dir / "report.html").exists()


def test_a_report_that_fails_leaves_the_one_that_was_there(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main("report", [str(study)])
    path = StudyConfig.from_yaml(study).run_dir / "report.html"
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in fails(capsys, str(study), "--budget", "10")
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir() if "partial" in item.name] == []


def test_it_does_not_wait_for_pytorch(study: Path) -> None:
    heavy = "{'torch', 'diffusers', 'matplotlib', 'datasets', 'pandas', 'sklearn'}"
    code = f"import sys; from tribute.cli import main; main('report', sys.argv[1:]); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(study)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
