"""Studies of a model that others made, and of a class-conditional one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_study import TINY_PRESET, SilentListener

from tribute.config import StudyConfig
from tribute.errors import ConfigError, MixedResultsError
from tribute.models.checkpoint import load_checkpoint, load_last_intact, save_checkpoint
from tribute.store.records import Store
from tribute.study.outputs import summary
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]
SMALL = {"fit": {"n_coalitions": 24, "n_end_points": 1, "first_removal_seed": 300}}
NO_TEST = {"test": {"n_coalitions": 0}}


def test_a_study_begins_with_the_model_that_it_is_given(
    make_study: MakeStudy, write_pipeline: Callable[..., Path]
) -> None:
    folder = write_pipeline()
    config = make_study(full_model={"load": str(folder)}, test={"n_coalitions": 3, "opt_seeds": [1]}, **SMALL)
    result = run_study(config, SilentListener())
    assert not (config.run_dir / "digits" / "retrain").exists()  # nothing was trained in its place
    origin = summary(result)["models"]["full"]["origin"]
    assert (origin["name"], origin["scheduler"]) == ("pipeline", "DDPMScheduler")
    with Store.open(config.db_url, create=False) as store:
        schedules = {str(item.spec.settings["noise_schedule"]["num_train_timesteps"]) for item in store.find()}
    assert schedules == {"50"}
    # The same folder with other weights is another study.
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1.0
    save_file(tensors, weights)
    with pytest.raises(MixedResultsError, match="pruned from another model"):
        run_study(config, SilentListener())


def test_a_study_of_a_checkpoint_of_ours_is_the_study_that_trained_it(make_study: MakeStudy) -> None:
    trained = make_study(name="trained", **SMALL, **NO_TEST)
    run_study(trained, SilentListener())
    full = trained.run_dir / "digits" / "retrain" / "models" / "full"
    loaded = make_study(name="loaded", full_model={"load": str(full)}, **SMALL, **NO_TEST)
    run_study(loaded, SilentListener())

    def values(config: StudyConfig) -> list[dict[str, float]]:
        with Store.open(config.db_url, create=False) as store:
            return [dict(item.behaviors) for item in store.find(statuses=("finished",))]

    assert values(loaded) == values(trained)


@pytest.mark.parametrize("setting", ["n_steps", "batch_size", "gradient_accumulation_steps", "lr"])
def test_a_model_is_trained_or_loaded(make_study: MakeStudy, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"a model that is loaded is not trained: give load, or {setting}"):
        make_study(full_model={"load": "owner/name", setting: 5})


def test_a_pruned_model_and_one_of_a_part_are_no_full_models(make_study: MakeStudy, tmp_path: Path) -> None:
    trained = make_study(name="trained", **SMALL, **NO_TEST)
    run_study(trained, SilentListener())
    pruned = next(trained.run_dir.glob("digits/pruned/models/*"))
    with pytest.raises(MixedResultsError, match=r"full_model.load: .* is pruned"):
        run_study(make_study(name="pruned", full_model={"load": str(pruned)}, **SMALL), SilentListener())
    full = load_checkpoint(trained.run_dir / "digits" / "retrain" / "models" / "full")
    meta = {**full.meta, "coalition": "0111111111"}
    path = save_checkpoint(tmp_path / "part", n_steps=1, unet=full.unet, ema=full.ema, meta=meta)
    with pytest.raises(MixedResultsError, match=r"full_model.load: .* coalition 0111111111"):
        run_study(make_study(name="part", full_model={"load": str(path)}, **SMALL), SilentListener())


def test_what_cannot_be_measured_or_trained_is_refused_before_anything_is_trained(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    mixed = {**TINY_PRESET, "training": dict(TINY_PRESET["training"])}
    mixed["training"]["gd"] = {**mixed["training"]["gd"], "mixed_precision": "bf16"}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    for changes, message in (
        ({"preset": str(tmp_path / "mixed.yaml")}, "mixed_precision: .* in one precision; found .*gd bf16"),
        ({"behaviors": ["generated_image_9_mse"], "local": {"n_samples": 3}}, "images 0 to 2 are compared"),
        ({"sampling": {"num_inference_steps": 1001}}, "num_inference_steps"),
        ({"sampling": {"guidance_scale": 2.0}}, "guidance_scale"),
    ):
        config = make_study(**changes)
        with pytest.raises(ConfigError, match=message):
            run_study(config, SilentListener())
        assert not config.run_dir.exists()


def test_a_conditional_study_trains_prunes_and_samples_with_labels(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = {**TINY_PRESET, "unet": {**TINY_PRESET["unet"], "num_class_embeds": 11}}
    preset["training"] = {name: {**item, "label_dropout": 0.1} for name, item in TINY_PRESET["training"].items()}
    preset["sampling"] = {**TINY_PRESET["sampling"], "guidance_scale": 1.5}
    (tmp_path / "conditional.yaml").write_text(yaml.safe_dump(preset))
    asked: list[list[int]] = []

    def spy(model: object, config: object, schedule: object, *, label_counts: object, **options: object) -> object:
        from tribute.diffusion.sample import sample_images

        asked.append(list(label_counts))  # pyright: ignore[reportArgumentType]
        return sample_images(model, config, schedule, label_counts=label_counts, **options)  # pyright: ignore

    monkeypatch.setattr("tribute.study.value_function.sample_images", spy)
    config = make_study(preset=str(tmp_path / "conditional.yaml"), **SMALL, **NO_TEST)
    listener = SilentListener()
    run_study(config, listener)
    assert listener.n_evaluations == len(asked) == 26
    # Contributors are the ten classes, so a coalition is asked for the labels of its own members.
    with Store.open(config.db_url, create=False) as store:
        masks = [list(item.spec.coalition_mask) for item in store.find()]
    for mask, label_counts in zip(masks, asked, strict=True):
        assert [count > 0 for count in label_counts] == (mask if any(mask) else [True] * 10)
    sparse = next(config.run_dir.glob("digits/prune_fine_tune/models/*/full"))
    found = load_last_intact(sparse)
    assert found is not None and found.ema["class_embedding.weight"].shape[0] == 11


def test_a_network_with_too_few_classes_is_refused_before_anything_is_trained(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    preset = {**TINY_PRESET, "unet": {**TINY_PRESET["unet"], "num_class_embeds": 7}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(preset))
    config = make_study(preset=str(tmp_path / "few.yaml"), **NO_TEST)
    with pytest.raises(ConfigError, match="expected at least the 10 labels of the data, found 7"):
        run_study(config, SilentListener())
    assert not config.run_dir.exists()
