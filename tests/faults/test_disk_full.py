"""A disk that is full: nothing half-written remains, the message says what to do, and with room the run goes on."""

from __future__ import annotations

import dataclasses
import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tribute.behaviors.classifier import train_or_load_classifier
from tribute.behaviors.classifier_networks import PLAIN
from tribute.behaviors.features import Features
from tribute.behaviors.reference import Reference
from tribute.cli import main
from tribute.config import StudyConfig
from tribute.data import latents as latents_module
from tribute.data.latents import LatentSource, encode_or_open
from tribute.data.tensors import write_tensor_cache
from tribute.errors import BehaviorError, CheckpointError, DataError, TributeError
from tribute.files import is_disk_full, write_whole
from tribute.models.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from tribute.store.records import Store
from tribute.study.outputs import write_outputs
from tribute.study.run import run_study
from tribute.types import Images


class DiskFiller:
    """A listener that fills the disk when a stage begins, or before a coalition."""

    def __init__(self, fill: Callable[[], None], moment: str | None) -> None:
        self.fill = fill
        self.moment = moment
        self.n_measured = 0

    def stage(self, title: str) -> None:
        if title == self.moment:
            self.fill()

    def message(self, text: str) -> None: ...

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        if title == "coalitions":
            self.n_measured += 1
            if self.moment == "third coalition" and self.n_measured == 3:
                self.fill()


def values(config: StudyConfig) -> dict[str, tuple[str, dict[str, float]]]:
    with Store.open(config.db_url, create=False) as store:
        return {item.spec.identity: (item.status, dict(item.behaviors)) for item in store.find()}


def test_a_study_whose_disk_fills_again_and_again_ends_as_if_it_had_not(
    make_study: Callable[..., StudyConfig], small_disk: Any, tmp_path: Path
) -> None:
    undisturbed = make_study()
    expected = run_study(undisturbed, DiskFiller(lambda: None, None))
    assert expected is not None
    write_outputs(expected)
    config = make_study(outdir=str(small_disk.path))
    measured = 0
    for moment in ("Data", "Full model", "Sparse model", "Coalitions", "third coalition", "outputs"):
        listener = DiskFiller(small_disk.fill, moment)
        with pytest.raises(TributeError, match=r"(?i)(no space left|disk is full)") as found:
            result = run_study(config, listener)
            small_disk.fill()
            assert result is not None
            write_outputs(result)
        assert "run the same command again" in str(found.value) or moment in ("Data", "Coalitions", "third coalition")
        assert not [name for name in small_disk.names() if name.endswith((".partial", ".replaced"))]
        for folder in config.run_dir.rglob("full"):
            assert all(load_checkpoint(path) for path in list_checkpoints(folder))
        small_disk.make_room()
        measured += listener.n_measured
        if (config.run_dir / "results.db").exists():
            connection = sqlite3.connect(config.run_dir / "results.db")
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()
    last = DiskFiller(lambda: None, None)
    result = run_study(config, last)
    assert result is not None
    write_outputs(result)
    assert values(config) == values(undisturbed)
    csv = "attributions.csv"
    assert (config.run_dir / csv).read_bytes() == (undisturbed.run_dir / csv).read_bytes()
    assert measured + last.n_measured == len(values(config)) == 14


def test_the_old_file_stays_where_the_new_one_does_not_fit(small_disk: Any) -> None:
    path = small_disk.path / "summary.json"
    write_whole(path, "old")
    small_disk.fill(but_kib=16)
    with pytest.raises(OSError, match="No space left") as found:
        write_whole(path, "n" * 100_000)
    assert is_disk_full(found.value)
    assert path.read_text() == "old"
    assert small_disk.names() == ["summary.json"]
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_checkpoint_that_does_not_fit_says_how_much_is_needed(small_disk: Any) -> None:
    weights = {"w": torch.zeros(300_000)}
    save_checkpoint(small_disk.path, n_steps=1, unet=weights, ema=weights, meta={})
    small_disk.fill(but_kib=1500)  # room for the weights, not for their average
    with pytest.raises(CheckpointError, match=r"2\.3 MiB needed, 1\.5 MiB free.*earlier checkpoints are untouched"):
        save_checkpoint(small_disk.path, n_steps=2, unet=weights, ema=weights, meta={})
    assert [path.name for path in small_disk.path.iterdir() if path.is_dir()] == ["ckpt_steps_00000001"]
    load_checkpoint(small_disk.path)


def test_a_classifier_that_does_not_fit_leaves_nothing_and_is_trained_again(
    small_disk: Any, digit_images: Images
) -> None:
    recipe = dataclasses.replace(PLAIN, n_epochs=1, min_steps=12)
    options: dict[str, Any] = {"label_names": list("01"), "recipe": recipe}
    images, labels = digit_images[:64], np.arange(64) % 2
    expected = train_or_load_classifier(images, labels, cache_dir=None, **options)
    small_disk.fill(but_kib=40)
    with pytest.raises(BehaviorError, match=r"cannot be kept in .*No space left.*needed, 40 KiB free.*TRIBUTE_CACHE"):
        train_or_load_classifier(images, labels, cache_dir=small_disk.path / "classifiers", **options)
    assert small_disk.names() == ["classifiers"]
    small_disk.make_room()
    found = train_or_load_classifier(images, labels, cache_dir=small_disk.path / "classifiers", **options)
    assert found.fingerprint == expected.fingerprint


class Flat:
    """Pixels as features."""

    name, fingerprint = "flat", "f" * 64

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        return Features(images, images.reshape(len(images), -1).astype(np.float32))


def test_features_of_real_images_that_do_not_fit_leave_nothing(small_disk: Any, digit_images: Images) -> None:
    small_disk.fill(but_kib=40)
    with pytest.raises(BehaviorError, match=r"No space left.*40 KiB free.*TRIBUTE_CACHE"):
        Reference.cached(digit_images, Flat(), cache_dir=small_disk.path / "references")
    assert [name for name in small_disk.names() if not name.endswith(".lock")] == ["references"]
    small_disk.make_room()
    found = Reference.cached(digit_images, Flat(), cache_dir=small_disk.path / "references")
    np.testing.assert_array_equal(found.features.embeddings, Flat().extract(digit_images).embeddings)


def test_images_that_do_not_fit_leave_nothing(small_disk: Any, digit_images: Images) -> None:
    small_disk.fill(but_kib=40)
    options: dict[str, Any] = {"shape": digit_images.shape, "columns": {}, "source": {}}
    with pytest.raises(DataError, match=r"No space left.*40 KiB free.*free some space"):
        write_tensor_cache(small_disk.path / "digits", [digit_images], **options)
    assert small_disk.names() == []


def test_latents_go_on_where_the_disk_was_full(
    small_disk: Any, digit_images: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(latents_module, "BLOCK_ROWS", 100)
    codec = {"fingerprint": "c", "kind": "VQModel", "path": "p", "scaling_factor": 1.0}
    source = LatentSource("digits", "i" * 64, digit_images.shape[1:], codec)
    encoded: list[int] = []

    def encode(images: Images) -> np.ndarray:
        encoded.append(len(images))
        return images.astype(np.float32).transpose(0, 3, 1, 2)

    images = digit_images[:1000]
    expected = encode_or_open(tmp_path / "undisturbed", source, images, encode, (1, 8, 8)).latents
    encoded.clear()
    small_disk.fill(but_kib=120)  # 25.6 kB for each block
    with pytest.raises(DataError, match=r"No space left"):
        encode_or_open(small_disk.path, source, images, encode, (1, 8, 8))
    n_first = len(encoded)
    assert 2 <= n_first < 10
    small_disk.make_room()
    found = encode_or_open(small_disk.path, source, images, encode, (1, 8, 8)).latents
    np.testing.assert_array_equal(found, expected)
    assert len(encoded) == 10 + 1  # only the block that did not fit was encoded twice


def test_a_full_disk_that_nobody_expected_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tribute.cli import data_command

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    monkeypatch.setattr(data_command, "run", full)
    with pytest.raises(SystemExit) as found:
        main("data", [])
    assert found.value.code == 1
    assert capsys.readouterr().err == (
        "error: the disk is full (/somewhere/file); free some space and run the same command again\n"
    )
