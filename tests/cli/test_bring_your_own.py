"""A model that others made goes through all commands, and back to those who use diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tribute.cli import main
from tribute.models.checkpoint import load_checkpoint
from tribute.store.records import Store

WritePipeline = Callable[..., Path]
SPARSE = "results/digits/prune_fine_tune/models/pruner=magnitude_pruning_ratio=0.3_threshold=0.05/full"
FULL = "results/digits/retrain/models/full"
MEASURE = "--db results.db --n_samples 8 --num_inference_steps 2 --model_behavior brought_ink:brightness"


def tribute(command: str, flags: str) -> None:
    main(command, flags.split())


def fails(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that a user can repair."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        tribute(command, flags)
    assert stopped.value.code == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a behavior that needs no classifier."""
    (tmp_path / "brought_ink.py").write_text("def brightness(images):\n    return float(images.mean())\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def test_a_foreign_model_is_pruned_fine_tuned_and_measured(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    tribute("prune", f"--load {folder} --dataset digits")
    tribute("train", "--dataset digits --method prune_fine_tune --n_steps 2 --batch_size 8")
    sparse = load_checkpoint(Path(SPARSE))
    assert sparse.meta["unet"]["block_out_channels"] == [8, 16]
    assert sparse.meta["noise_schedule"]["num_train_timesteps"] == 50  # the model's, not the preset's
    assert sparse.meta["start"]["origin"]["pipeline"] == "DDPMPipeline"
    tribute("unlearn", f"--load {SPARSE} --method gd --gd_steps 1 --exp_name e --removal_dist shapley {MEASURE}")
    tribute("unlearn", f"--load {folder} --dataset digits --method gd --gd_steps 1 --exp_name full {MEASURE}")
    tribute("unlearn", f"--load {folder} --dataset digits --method retrain --exp_name as_is {MEASURE}")
    with Store.open("results.db", create=False) as store:
        assert [item.spec.exp_name for item in store.find(statuses=("finished",))] == ["e", "full", "as_is"]


def test_a_class_conditional_model_goes_the_same_way(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline(num_class_embeds=11)
    tribute("prune", f"--load {folder} --dataset digits")
    tribute("train", "--dataset digits --method prune_fine_tune --n_steps 2 --batch_size 8")
    unlearn = f"--load {SPARSE} --method gd --gd_steps 1 --removal_dist shapley {MEASURE}"
    tribute("unlearn", f"{unlearn} --exp_name guided --guidance_scale 2")
    tribute("unlearn", f"{unlearn} --exp_name plain")
    with Store.open("results.db", create=False) as store:
        guided, plain = store.find(statuses=("finished",))
        assert guided.behaviors["brought_ink:brightness"] != plain.behaviors["brought_ink:brightness"]
        assert dict(guided.spec.settings)["sampling"]["guidance_scale"] == 2.0


def test_wrong_models_are_named(write_pipeline: WritePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pipeline()
    assert "--dataset: expected one of" in fails("prune", f"--load {folder}", capsys)
    coalition = "--removal_dist datamodel --removal_seed 0"
    as_is = f"--load {folder} --dataset digits --method retrain --exp_name e {MEASURE} {coalition}"
    assert "was trained on the coalition 1111111111" in fails("unlearn", as_is, capsys)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"sample_size": 16}, ["16x16", "8x8"]), ({"in_channels": 3, "out_channels": 3}, ["1 channel", "8x8 and 3"])],
)
def test_images_must_be_those_of_the_model(
    changes: dict[str, int], expected: list[str], write_pipeline: WritePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails("prune", f"--load {write_pipeline(**changes)} --dataset digits", capsys)
    assert all(part in message for part in expected), message


def test_too_few_classes_for_the_labels(write_pipeline: WritePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pipeline(num_class_embeds=4)
    gd = f"--load {folder} --dataset digits --method gd --n_steps 1 --batch_size 8"
    assert "expected at least the 10 labels of the data, found 4" in fails("train", gd, capsys)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "empty-cache")
    for command, flags in [
        ("prune", "--dataset cifar"),
        ("train", "--dataset cifar --method gd"),
        ("unlearn", f"--dataset cifar --method gd --exp_name e {MEASURE}"),
    ]:
        message = fails(command, f"--load google/ddpm-cifar10-32 {flags}", capsys)
        assert "hf download google/ddpm-cifar10-32 --local-dir FOLDER" in message
        assert "--load FOLDER" in message


def test_export_writes_a_pipeline_and_a_model_card(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    tribute("train", "--dataset digits --method retrain --n_steps 2 --batch_size 8")
    study = {
        "name": "tiny",
        "contributors": [{"name": "<b>Ann</b>", "n_examples": 3}],
        "behaviors": {},
        "provenance": {"tribute": "0.1.0"},
    }
    Path("runs").mkdir()
    Path("runs/summary.json").write_text(json.dumps(study))
    capsys.readouterr()
    tribute("export", f"--model {FULL} --to exported --run runs")
    printed = capsys.readouterr().out
    assert "DDIMPipeline.from_pretrained('exported')" in printed
    assert DDPMPipeline.from_pretrained("exported").unet.config["sample_size"] == 8
    assert "## Training-data credit" in Path("exported/README.md").read_text()
    message = fails("export", f"--model {FULL} --to exported", capsys)
    assert "exists already" in message
    tribute("prune", f"--load {FULL}")
    pruned = "results/digits/pruned/models/pruner=magnitude_pruning_ratio=0.3_threshold=0.05"
    assert "uneven widths" in fails("export", f"--model {pruned} --to other", capsys)
    # What was exported can be brought back.
    tribute("train", "--load exported --dataset digits --method gd --n_steps 1 --batch_size 8 --outdir again")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--db and --out"),
        ("--db a.db", "found --db"),
        ("--model a", "--model, --to: expected both"),
        ("--run a", "--model, --to: expected both"),
        ("--db a.db --out b --model c --to d", "found --db, --out beside --model, --to"),
        ("--db a.db --out b --no_use_ema", "found --db, --out beside --use_ema"),
        ("--model c --to d --split test --format csv", "found --format, --split beside --model, --to"),
        ("--db a.db --out b --contributor_column artist", "--contributor_column: expected --dataset"),
        ("--db a.db --out b --format csv --dataset digits", "--dataset: CSV has no indices"),
    ],
)
def test_export_says_which_flags_go_together(flags: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails("export", flags, capsys)


def test_import_needs_the_dataset_that_flags_describe(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails("import", "--db a.db --file b.jsonl --image_column picture --split test", capsys)
    assert "--image_column, --split: expected --dataset" in message and not Path("a.db").exists()


def test_dry_run_does_not_fetch_a_model_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    tribute("train", "--load google/ddpm-cifar10-32 --dataset digits --method gd --dry_run")
    assert yaml.safe_load(capsys.readouterr().out)["start"] == "google/ddpm-cifar10-32"
