"""The published commands, as published, on real digits with few steps; and what they say to wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml

from tribute.cli import COMMANDS, main
from tribute.cli.arguments import Design
from tribute.games.designs import DESIGNS, draw_design
from tribute.games.removal import draw_coalition
from tribute.store.records import Store

BEHAVIORS = "ink:brightness,ink:contrast:lower"
SPARSE = "results/digits/prune_fine_tune/models/pruner=magnitude_pruning_ratio=0.3_threshold=0.05/full"
FULL = "results/digits/retrain/models/full"
QUICK_GD = (
    f"--load {SPARSE} --db results.db --exp_name e1 --dataset digits --method gd --gd_steps 2 --n_samples 8 "
    f"--num_inference_steps 2 --model_behavior {BEHAVIORS}"
)
RETRAINED = "results/digits/retrain/models/datamodel/datamodel_alpha=0.5_seed=0"
QUICK_TEST = (
    f"--load {RETRAINED} --db results.db --exp_name e0 --method retrain --removal_dist datamodel --removal_seed 0 "
    f"--n_samples 8 --num_inference_steps 2 --model_behavior {BEHAVIORS}"
)
LOCAL = " --n_local_samples 3 --n_noises 4"
LDS = "--train_db results.db --train_exp_name e1 --max_train_size 10 --model_behavior_key "

pytestmark = pytest.mark.usefixtures("workshop")


def tribute(command: str, flags: str = "") -> None:
    main(command, flags.split())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a full, a pruned, a sparse and a retrained model, made by the published commands."""
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    out = f"--outdir {folder / 'results'} --n_steps 4 --batch_size 8 --dataset digits"
    tribute("train", f"{out} --method retrain --keep_all_ckpts --mixed_precision no --gradient_accumulation_steps 1")
    prune = "--pruning_ratio 0.3 --pruner magnitude --thr 0.05"
    tribute("prune", f"--load {folder / FULL} --outdir {folder / 'results'} {prune}")
    tribute("train", f"{out} --method prune_fine_tune {prune}")
    tribute("train", f"{out} --method retrain --removal_dist datamodel --datamodel_alpha 0.5 --removal_seed 0")
    return folder


@pytest.fixture
def workshop(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that sees the models, with behaviors that need no classifier."""
    (tmp_path / "results").symlink_to(models / "results")
    (tmp_path / "ink.py").write_text(
        "def brightness(images):\n    return float(images.mean())\n\n"
        "def contrast(images):\n    return float(images.std())\n\n"
        "def nothing(images):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def stored(db: str = "results.db") -> list[tuple[str, str | None, int | None]]:
    with Store.open(db, create=False) as store:
        return [(item.spec.exp_name, item.spec.removal_dist, item.spec.removal_seed) for item in store.find()]


def fails(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that a user can repair."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        tribute(command, flags)
    captured = capsys.readouterr()
    assert stopped.value.code in (1, 2)
    return " ".join((captured.err + captured.out).split())


def test_the_whole_sequence_ends_in_attributions_and_lds(capsys: pytest.CaptureFixture[str]) -> None:
    tribute("unlearn", QUICK_GD + " --removal_dist empty")
    tribute("unlearn", QUICK_GD + " --removal_dist None")
    for seed in range(26, 48):
        tribute("unlearn", QUICK_GD + f" --removal_dist datashapley --removal_seed {seed}")
    for seed in range(3):
        removal = f"--dataset digits --method retrain --removal_dist datamodel --removal_seed {seed}"
        tribute("train", f"{removal} --n_steps 4 --batch_size 8 --outdir own")
        tribute(
            "unlearn",
            f"--load own/digits/retrain/models/datamodel/datamodel_alpha=0.5_seed={seed} {removal} --db results.db "
            f"--exp_name e0 --n_samples 8 --num_inference_steps 2 --model_behavior {BEHAVIORS} "
            "--n_local_samples 100 --n_noises 50 --use_ema",
        )
    capsys.readouterr()
    tribute(
        "lds",
        "--dataset digits --removal_dist shapley --model_behavior_key ink:brightness --train_db results.db "
        "--train_exp_name e1 --method gd --full_db results.db --null_db results.db --max_train_size 100 "
        "--test_db results.db --test_exp_name e0 --num_test_subset 100 --by_class",
    )
    printed = capsys.readouterr().out
    assert "LDS x 100 of ink:brightness" in printed
    assert "attribution" in printed
    assert "auto chose gp" in printed


def test_the_same_evaluation_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = QUICK_GD + " --removal_dist shapley --removal_seed 3"
    tribute("unlearn", flags)
    assert "recorded in" in capsys.readouterr().out
    tribute("unlearn", flags + " --sample_batch_size 3")
    assert "was recorded before" in capsys.readouterr().out
    assert stored() == [("e1", "shapley", 3)]


def test_behaviors_look_through_the_network_that_they_name(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    monkeypatch.setenv("TRIBUTE_CACHE", str(workshop / "cache"))
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=4)
    CLIPVisionModelWithProjection(config).save_pretrained(workshop / "clip")
    flags = QUICK_GD.replace(BEHAVIORS, "vendi@clip,kid@clip,ink:brightness")
    tribute("unlearn", flags + " --removal_dist empty --feature_models clip=clip --max_reference 50")
    with Store.open("results.db", create=False) as store:
        (found,) = store.find()
    assert set(found.behaviors) == {"vendi@clip", "kid@clip", "ink:brightness"}
    variant = found.spec.settings["behaviors"]["kid@clip"]
    assert variant.startswith("clip ") and "centre crop to 8x8" in variant
    assert variant.endswith("; 50 of 1797 real images, a fixed draw")


def test_the_flags_of_the_published_unlearn_command_are_accepted() -> None:
    tribute(
        "unlearn",
        QUICK_GD + " --ga_ratio 1.0 --removal_dist shapley --removal_seed 0 --pruning_ratio 0.3 --pruner magnitude "
        "--thr 0.05 --keep_all_ckpts --mixed_precision no --gradient_accumulation_steps 1 --iu_ratio 0.5 "
        "--lora_rank 16 --lora_dropout 0.05 --outdir kept",
    )
    assert list(Path("kept").glob("digits/gd/models/shapley/shapley_seed=0/ckpt_steps_00000002/unet.safetensors"))


@pytest.mark.parametrize("removal_dist", ["", " --removal_dist shapley"])
def test_a_coalition_of_a_design_is_recorded_under_its_name(removal_dist: str) -> None:
    flags = QUICK_GD + removal_dist + " --keep_all_ckpts --outdir kept --removal_seed 5 --design "
    for design in ("orthogonal", "kernel"):
        tribute("unlearn", flags + design)
        name = "shapley" if design == "kernel" else design
        assert list(Path("kept").glob(f"digits/gd/models/{name}/{name}_seed=5/ckpt_steps_00000002"))
    assert stored() == [("e1", "orthogonal", 5), ("e1", "shapley", 5)]
    with Store.open("results.db", create=False) as store:
        masks = [np.array(item.spec.coalition_mask) for item in store.find()]
    np.testing.assert_array_equal(masks[0], draw_design("orthogonal", 10, 6)[5])
    np.testing.assert_array_equal(masks[1], draw_coalition("shapley", 10, 5))


def test_models_of_a_design_are_trained_on_its_coalitions(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--dataset digits --method retrain --n_steps 1 --batch_size 8 --outdir own --removal_seed 2 --design paired"
    tribute("train", flags)
    assert list(Path("own").glob("digits/retrain/models/paired/paired_seed=2/ckpt_steps_00000001"))
    n_present = int(draw_design("paired", 10, 3)[2].sum())
    assert f"trained on {n_present} of 10 contributors" in capsys.readouterr().out


def test_designs_of_flags_are_those_of_games() -> None:
    assert get_args(Design) == DESIGNS


def test_dry_run_prints_the_settings_and_leaves_nothing(capsys: pytest.CaptureFixture[str], workshop: Path) -> None:
    before = sorted(path.name for path in workshop.iterdir())
    tribute("unlearn", QUICK_GD + " --removal_dist shapley --dry_run")
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["train"]["n_steps"] == 2
    assert settings["removal"] == {"removal_dist": "shapley", "datamodel_alpha": None, "removal_seed": 0}
    tribute("unlearn", QUICK_GD.replace(BEHAVIORS, "global,local") + LOCAL + f" --full_model {FULL} --dry_run")
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["behaviors"][-2:] == ["entropy", "local"]
    assert settings["local"]["n_samples"] == 3
    assert settings["local"]["full_model"].startswith(FULL)
    tribute("train", "--dataset cifar --method retrain --preset cifar-small --dry_run")
    assert yaml.safe_load(capsys.readouterr().out)["train"]["n_steps"] == 20_000
    tribute("prune", f"--load {FULL} --dry_run")
    assert sorted(path.name for path in workshop.iterdir()) == before


def stored_behaviors(db: str = "results.db") -> list[dict[str, float]]:
    with Store.open(db, create=False) as store:
        return [dict(item.behaviors) for item in store.find()]


def test_local_behaviors_are_stored_for_every_image_and_printed_on_average(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = QUICK_GD.replace(BEHAVIORS, "local") + " --removal_dist shapley --removal_seed 1" + LOCAL
    tribute("unlearn", flags + f" --full_model {FULL}")
    printed = capsys.readouterr().out
    assert "behaviors of 3 images" in printed
    assert "avg_ssim" in printed
    assert "15 values of single images" in printed
    assert "generated_image_1_ssim" not in printed
    (values,) = stored_behaviors()
    assert len(values) == 5 * 4
    for average, single in (("avg_mse", "mse"), ("avg_total_loss", "diffusion_loss"), ("avg_elbo_loss", "elbo_loss")):
        assert values[average] > 0
        singles = [values[f"generated_image_{i}_{single}"] for i in range(3)]
        np.testing.assert_allclose(values[average], np.mean(singles), rtol=1e-12)
    tribute("unlearn", flags + f" --full_model {FULL} --sample_batch_size 2")
    assert "was recorded before" in capsys.readouterr().out
    tribute("unlearn", flags)  # compared with the sparse model: another evaluation
    assert len(stored_behaviors()) == 2
    message = fails("lds", LDS + "avg_mse", capsys)
    assert "share one definition" in message
    assert message.count("vs model") == 2


def test_a_model_of_everybody_is_like_itself_and_coalitions_stay_near(capsys: pytest.CaptureFixture[str]) -> None:
    flags = QUICK_GD.replace("--gd_steps 2", "--gd_steps 0").replace(BEHAVIORS, f"local,{BEHAVIORS}") + LOCAL
    tribute("unlearn", flags)
    tribute("unlearn", flags.replace("--gd_steps 0", "--gd_steps 2") + " --removal_dist shapley")
    printed = capsys.readouterr().out
    assert "behaviors of 8 images" in printed, "behaviors of all images decide how many there are"
    same, other = stored_behaviors()
    assert [same[name] for name in ("avg_mse", "avg_nrmse", "avg_ssim")] == [0, 0, 1]
    assert other["avg_mse"] > 0
    assert other["avg_ssim"] < 1
    assert other["avg_total_loss"] != same["avg_total_loss"]


def test_single_local_behaviors_are_measured_alone_and_fitted_by_their_key(capsys: pytest.CaptureFixture[str]) -> None:
    flags = QUICK_GD.replace(BEHAVIORS, "avg_mse,generated_image_2_ssim") + LOCAL + f" --full_model {FULL}"
    for seed in range(6):
        tribute("unlearn", f"{flags} --design paired --removal_seed {seed}")
    for removal in ("empty", "None"):
        tribute("unlearn", f"{flags} --removal_dist {removal}")
    assert all(set(values) == {"avg_mse", "generated_image_2_ssim"} for values in stored_behaviors())
    for key, direction in (("avg_mse", "lower"), ("generated_image_2_ssim", "higher")):
        capsys.readouterr()
        tribute("lds", LDS + key)
        printed = capsys.readouterr().out
        assert f"{key}: shapley" in printed
        assert f"{direction} is better" in printed


def test_retrained_models_are_compared_with_the_full_model() -> None:
    tribute("unlearn", QUICK_TEST.replace(BEHAVIORS, "local") + LOCAL + f" --full_model {FULL}")
    (values,) = stored_behaviors()
    assert values["avg_mse"] > 0


def test_export_and_import_give_the_same_store_again(capsys: pytest.CaptureFixture[str]) -> None:
    tribute("unlearn", QUICK_GD + " --removal_dist shapley --removal_seed 3")
    tribute("export", "--db results.db --out results.jsonl --dataset digits")
    tribute("import", "--db other.db --file results.jsonl --dataset digits")
    assert stored("other.db") == stored()
    tribute("export", "--db results.db --out results.csv --format csv")
    assert "ink:brightness" in Path("results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("train", "--dataset imagenet --method retrain", ["--dataset", "digits, cifar", "imagenet"]),
        ("train", "--method retrain", ["--dataset", "found none"]),
        ("train", "--dataset digits --method retrain --contributors artists", ["artists", "vendors"]),
        ("train", "--dataset digits --method unlearn", ["--method", "prune_fine_tune", "unlearn"]),
        ("train", "--dataset digits --method ga", ["ga", "not of this version"]),
        ("train", "--dataset digits --method gd", ["--load"]),
        ("train", f"--dataset digits --method retrain --load {FULL}", ["--load"]),
        ("train", "--dataset digits --method retrain --removal_dist everyone", ["--removal-dist", "shapley"]),
        ("train", "--dataset digits --method retrain --n_steps many", ["--n-steps", "many"]),
        ("train", "--dataset digits --method retrain --n_stepps 4", ["--n_stepps"]),
        ("train", "--dataset digits --method retrain --precompute_stage save", ["--precompute_stage"]),
        ("train", "--dataset digits --method retrain --mixed_precision fp16 --n_steps 1", ["fp16", "GPU"]),
        ("train", "--dataset digits --method retrain --preset imagenet", ["--preset", "cifar-small"]),
        ("train", "--dataset digits --method retrain --preset cifar --n_steps 1", ["32x32", "8x8"]),
        ("train", "--dataset cifar --method retrain", ["data_dir"]),
        ("train", "--dataset digits --method retrain --removal_dist empty --n_steps 1", ["empty"]),
        ("train", "--dataset digits --method prune_fine_tune --outdir nowhere", ["prune.py", "--load"]),
        ("train", "--dataset digits --method retrain --outdir ink.py", ["--outdir", "ink.py", "writable"]),
        ("prune", f"--load {FULL} --pruning_ratio 1.0", ["--pruning_ratio", "1.0"]),
        ("prune", f"--load {FULL} --pruning_ratio -0.1", ["--pruning_ratio", "-0.1"]),
        ("prune", "--load nowhere", ["nowhere", "no checkpoint"]),
        ("prune", f"--load {FULL} --contributors vendors", ["other data"]),
        ("unlearn", QUICK_GD + " --pruning_ratio 0.5", ["--pruning_ratio", "saved 0.3", "asked 0.5"]),
        ("unlearn", QUICK_GD.replace(SPARSE, FULL) + " --pruner magnitude", ["--pruner", "not pruned"]),
        ("unlearn", QUICK_GD.replace("--method gd", "--method lora"), ["lora", "not of this version"]),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "local") + " --full_model nowhere", ["nowhere", "no checkpoint"]),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "local") + f" --full_model {RETRAINED}", ["--full_model", "everybody"]),
        (
            "unlearn",
            QUICK_GD.replace(BEHAVIORS, "generated_image_100_ssim"),
            ["generated_image_100_ssim", "0 to 99", "--n_local_samples"],
        ),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "local") + " --n_noises 0", ["n_noises", "greater than 0"]),
        (
            "unlearn",
            QUICK_TEST.replace(BEHAVIORS, "fid,avg_mse"),
            ["--full_model", "avg_mse", "--method retrain", "the coalition's"],
        ),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "beauty"), ["beauty", "inception_score"]),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "ink:nothing"), ["ink:nothing", "nan"]),
        ("unlearn", QUICK_GD.replace(BEHAVIORS, "ink:missing"), ["missing"]),
        ("unlearn", QUICK_GD.replace("--db results.db", "--db ."), ["directory"]),
        ("unlearn", QUICK_GD + " --removal_dist datamodel --datamodel_alpha 1.5", ["alpha", "1.5"]),
        ("unlearn", QUICK_GD + " --removal_dist shapley --removal_seed -1", ["seed", "-1"]),
        ("unlearn", QUICK_GD + " --design orthogonal --removal_seed -1", ["seed", "-1"]),
        ("unlearn", QUICK_GD + " --design stratified --removal_seed 1022", ["at most 1022 coalitions", "1023"]),
        ("unlearn", QUICK_GD + " --design best", ["--design", "orthogonal", "best"]),
        (
            "unlearn",
            QUICK_GD + " --design paired --removal_dist datamodel --dry_run",
            ["--design", "--removal_dist shapley", "datamodel"],
        ),
        (
            "train",
            "--dataset digits --method retrain --design paired --removal_dist uniform",
            ["--design", "--removal_dist shapley", "uniform"],
        ),
        ("unlearn", QUICK_GD + " --contributors vendors", ["other data"]),
        (
            "unlearn",
            QUICK_TEST.replace("--removal_seed 0", "--removal_seed 1"),
            ["--load", "--removal_seed"],
        ),
        ("lds", "--train_db missing.db --train_exp_name e1 --max_train_size 10", ["missing.db"]),
        ("run", "missing.yaml", ["missing.yaml"]),
    ],
)
def test_wrong_input_is_named(
    command: str, flags: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(command, flags, capsys)
    for part in expected:
        assert part in message or part.replace("-", "_") in message.replace("-", "_"), message


def test_lds_says_what_is_missing_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    tribute("unlearn", QUICK_GD + " --removal_dist shapley --removal_seed 0")
    lds = "--train_db results.db --train_exp_name e1 --max_train_size 10 --model_behavior_key ink:brightness"
    message = fails("lds", lds, capsys)
    assert "unlearn.py --removal_dist empty" in message
    assert "removal_dist shapley" in message
    tribute("unlearn", QUICK_GD + " --removal_dist empty")
    tribute("unlearn", QUICK_GD + " --removal_dist None")
    assert "independent coalitions" in fails("lds", lds + " --estimator size_adjusted", capsys)
    assert "--test_db" in fails("lds", lds + " --test_exp_name e0", capsys)
    assert "no_by_class" in fails("lds", lds + " --no-by_class", capsys).replace("-", "_")


def test_lds_refuses_evaluations_of_different_settings(capsys: pytest.CaptureFixture[str]) -> None:
    tribute("unlearn", QUICK_GD + " --removal_dist shapley --removal_seed 0")
    tribute("unlearn", QUICK_GD.replace("--gd_steps 2", "--gd_steps 3") + " --removal_dist shapley --removal_seed 1")
    message = fails(
        "lds",
        "--train_db results.db --train_exp_name e1 --max_train_size 10 --model_behavior_key ink:brightness",
        capsys,
    )
    assert "different settings: train" in message
    assert "--exp_name" in message


def test_an_unknown_setting_of_a_study_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("study.yaml").write_text("name: s\nfit: {n_coalition: 3}\nbehaviours: [fid]\n")
    message = fails("run", "study.yaml", capsys)
    assert "fit.n_coalition: unknown setting" in message
    assert "behaviours: unknown setting" in message


def test_an_interruption_ends_with_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tribute.study.value_function.sample_images", interrupted)
    with pytest.raises(SystemExit) as stopped:
        tribute("unlearn", QUICK_GD + " --removal_dist shapley")
    assert stopped.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.undo()


def test_help_of_the_program_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom tribute.cli import main\n"
        "try:\n    main(None, ['--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'tyro', 'pydantic', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(None, ["pay"])
    assert stopped.value.code == 2
    assert "unknown command 'pay'" in capsys.readouterr().err
