from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tribute.config import NoiseScheduleConfig, PruneConfig, UNetConfig, load_preset
from tribute.errors import CheckpointError, ConfigError
from tribute.models import pipelines
from tribute.models.build import build_noise_schedule, build_unet
from tribute.models.checkpoint import Checkpoint, build_model, save_checkpoint
from tribute.models.pipelines import SCHEDULERS, adopt_model, load_model, schedule_settings, unet_settings
from tribute.models.pruning import apply_recipe, prune_unet

WritePipeline = Callable[..., Path]

# One value of each argument of UNet2DModel that differs from the one in the fixture.
CHANGES: dict[str, dict[str, Any]] = {
    "sample_size": {"sample_size": 16},
    "in_channels": {"in_channels": 3, "out_channels": 3},
    "out_channels": {"in_channels": 2, "out_channels": 2},
    "center_input_sample": {"center_input_sample": True},
    "time_embedding_type": {"time_embedding_type": "learned", "num_train_timesteps": 50},
    "time_embedding_dim": {"time_embedding_dim": 24},
    "freq_shift": {"freq_shift": 0},
    "flip_sin_to_cos": {"flip_sin_to_cos": True},
    "down_block_types": {"down_block_types": ("DownBlock2D", "DownBlock2D")},
    "mid_block_type": {"mid_block_type": None},
    "up_block_types": {"up_block_types": ("UpBlock2D", "UpBlock2D")},
    "block_out_channels": {"block_out_channels": (4, 8)},
    "layers_per_block": {"layers_per_block": 2},
    "mid_block_scale_factor": {"mid_block_scale_factor": 1.5},
    "downsample_padding": {"downsample_padding": 0},
    "downsample_type": {"downsample_type": "resnet"},
    "upsample_type": {"upsample_type": "resnet"},
    "dropout": {"dropout": 0.25},
    "act_fn": {"act_fn": "gelu"},
    "attention_head_dim": {"attention_head_dim": 8},
    "norm_num_groups": {"norm_num_groups": 4},
    "attn_norm_num_groups": {"attn_norm_num_groups": 4},
    "norm_eps": {"norm_eps": 1e-3},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "add_attention": {"add_attention": False},
    "num_class_embeds": {"num_class_embeds": 11},
    "num_train_timesteps": {"num_train_timesteps": 60, "time_embedding_type": "learned"},
}


def output_of(model: torch.nn.Module) -> torch.Tensor:
    """Prediction on fixed inputs."""
    config: Any = model.config
    size = config["sample_size"]
    noisy = torch.randn(2, config["in_channels"], size, size, generator=torch.Generator().manual_seed(3))
    labels = {"class_labels": torch.tensor([1, 2])} if config["num_class_embeds"] else {}
    with torch.inference_mode():
        return model.eval()(noisy, torch.tensor([7, 31]), **labels).sample


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file; None removes a key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_every_argument_of_the_network_is_read_or_refused() -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    arguments = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    assert arguments == set(UNetConfig.model_fields) | set(pipelines._NOT_IN_OUR_TERMS)
    assert arguments == set(CHANGES) | set(pipelines._NOT_IN_OUR_TERMS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_network_of_any_shape_computes_the_same(name: str, write_pipeline: WritePipeline) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    folder = write_pipeline(**CHANGES[name])
    oracle = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    model = build_model(load_model(folder))
    saved = json.loads((folder / "unet" / "config.json").read_text())
    for argument, value in CHANGES[name].items():
        assert model.config[argument] == value
        assert saved[argument] == (list(value) if isinstance(value, tuple) else value)
    assert torch.equal(output_of(model), output_of(oracle))


def test_what_a_config_leaves_out_has_the_default_of_diffusers() -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    unet = unet_settings({"_class_name": "UNet2DModel", "sample_size": [32, 32]}, where=Path("config.json"))
    defaults = {name: item.default for name, item in inspect.signature(UNet2DModel.__init__).parameters.items()}
    del defaults["self"], defaults["class_embed_type"]
    assert unet.model_dump() == {**defaults, "sample_size": 32}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_experts": 3}, "n_experts: unknown setting"),
        ({"class_embed_type": "timestep"}, "class_embed_type: expected null, found 'timestep'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"sample_size": [8, 16]}, r"sample_size.*\[8, 16\]"),
        ({"sample_size": None}, "sample_size.*None"),
        ({"out_channels": 2}, "found 1 and 2"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"block_out_channels": [8, 32]}, "another architecture"),
    ],
)
def test_networks_that_cannot_be_read_faithfully(
    changes: dict[str, Any], expected: str, write_pipeline: WritePipeline
) -> None:
    folder = write_pipeline()
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=expected):
        load_model(folder)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_forward_process_of_every_known_scheduler(name: str, write_pipeline: WritePipeline) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)(
        num_train_timesteps=50, beta_start=1e-3, beta_end=0.2, beta_schedule="scaled_linear", prediction_type="epsilon"
    )
    schedule = NoiseScheduleConfig.parse(load_model(write_pipeline(scheduler)).meta["noise_schedule"], where="test")
    torch.testing.assert_close(
        build_noise_schedule(schedule).alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-6, atol=0
    )
    assert schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "sigmoid", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.001 * (i + 1) for i in range(50)]},
    ],
)
def test_forward_processes_without_a_formula_of_ours(changes: dict[str, Any], write_pipeline: WritePipeline) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=50, **changes)
    schedule = NoiseScheduleConfig.parse(load_model(write_pipeline(scheduler)).meta["noise_schedule"], where="test")
    torch.testing.assert_close(
        build_noise_schedule(schedule).alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-12
    )


def test_a_scheduler_has_the_defaults_of_its_own_class() -> None:
    def read(name: str, **values: Any) -> NoiseScheduleConfig:
        return schedule_settings({"_class_name": name, **values}, where=Path("scheduler_config.json"))

    assert read("HeunDiscreteScheduler").beta_start == 0.00085
    assert read("DDIMScheduler").clip_sample is True
    assert read("DDIMScheduler").timestep_spacing == "leading"
    assert read("PNDMScheduler").clip_sample is False
    assert read("EulerDiscreteScheduler", steps_offset=1).steps_offset == 0
    assert read("DDPMScheduler", predict_epsilon=False).prediction_type == "sample"
    # A DDIM scheduler made from a PNDM scheduler keeps settings that do not concern it.
    assert read("DDIMScheduler", skip_prk_steps=True, steps_offset=1, tensor_format="pt").steps_offset == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler.*DDPMScheduler, DDIM"),
        ({}, "unknown scheduler None"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas: True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type: 'continuous'"),
        ({"_class_name": "DDPMScheduler", "snr_gamma": 5.0}, "unknown settings of DDPMScheduler: snr_gamma"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow"}, "prediction_type.*'flow'"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "spiral"}, "spiral"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, "expected one for each of 1000 steps, found 1"),
    ],
)
def test_schedulers_that_cannot_be_followed(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        schedule_settings(config, where=Path("scheduler_config.json"))


def test_early_folders_hold_everything_in_one_place_under_old_names(write_pipeline: WritePipeline) -> None:
    """As google/ddpm-cifar10-32: no sub-folders, and attention layers of the names before diffusers 0.17."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    folder = write_pipeline()
    expected = output_of(build_model(load_model(folder)))
    tensors = load_file(folder / "unet" / pipelines.WEIGHTS_NAME)
    old_names = {new: old for old, new in pipelines._RENAMED}
    for name in list(tensors):
        for new, old in old_names.items():
            if f".{new}." in name and "attentions" in name:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)
                break
    assert any(".query." in name for name in tensors)
    save_file(tensors, folder / pipelines.WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.move(folder / "unet" / "config.json", folder / "config.json")
    shutil.move(folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")
    found = load_model(folder)
    assert torch.equal(output_of(build_model(found)), expected)
    assert found.meta["noise_schedule"]["num_train_timesteps"] == 50
    assert torch.equal(output_of(UNet2DModel.from_pretrained(folder, use_safetensors=True)), expected)


def test_a_network_alone_leaves_the_noise_schedule_to_the_preset(
    write_pipeline: WritePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    preset = load_preset("digits")
    alone = load_model(write_pipeline() / "unet")
    adopted = adopt_model(preset, alone)
    assert adopted.noise_schedule == preset.noise_schedule
    assert adopted.unet.block_out_channels == (8, 16)
    assert adopted.training == preset.training
    assert "names no scheduler" in caplog.text


def test_a_pipeline_brings_its_network_and_noise_schedule(write_pipeline: WritePipeline) -> None:
    preset = load_preset("digits")
    adopted = adopt_model(preset, load_model(write_pipeline()))
    assert adopted.noise_schedule.num_train_timesteps == 50
    assert adopted.noise_schedule.prediction_type == "epsilon"
    assert (adopted.sampling, adopted.training) == (preset.sampling, preset.training)


def test_the_identity_of_a_model_is_its_weights_and_settings(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    first = load_model(folder).model_hash
    assert load_model(folder).model_hash == first
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    second = load_model(folder).model_hash
    weights = folder / "unet" / pipelines.WEIGHTS_NAME
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1e-3
    save_file(tensors, weights)
    assert len({first, second, load_model(folder).model_hash}) == 3


def test_weights_in_half_precision_become_float32(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    weights = folder / "unet" / pipelines.WEIGHTS_NAME
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    assert {tensor.dtype for tensor in load_model(folder).ema.values()} == {torch.float32}


def test_pickled_weights_are_refused_with_a_way_to_convert_them(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    tensors = load_file(folder / "unet" / pipelines.WEIGHTS_NAME)
    (folder / "unet" / pipelines.WEIGHTS_NAME).unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code") as error:
        load_model(folder)
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    exec(code)  # the advice works
    assert build_model(load_model(folder))


@pytest.mark.parametrize("damage", ["truncated", "no json", "list", "missing config"])
def test_damaged_folders_are_named(damage: str, write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    config, weights = folder / "unet" / "config.json", folder / "unet" / pipelines.WEIGHTS_NAME
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing config":
        config.unlink()
    else:
        config.write_text("[]" if damage == "list" else "{")
    with pytest.raises(CheckpointError, match=r"config\.json|not a readable safetensors"):
        load_model(folder)


def test_text_conditional_pipelines_are_refused(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    for changes, expected in [
        ({"unet": ["diffusers", "UNet2DConditionModel"], "_class_name": "StableDiffusionPipeline"}, "StableDiffusion"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder"),
        ({"unet": None, "transformer": ["diffusers", "DiTTransformer2DModel"]}, "transformer"),
    ]:
        saved = (folder / "model_index.json").read_text()
        edit(folder / "model_index.json", **changes)
        with pytest.raises(CheckpointError, match=expected):
            load_model(folder)
        (folder / "model_index.json").write_text(saved)


def test_a_latent_pipeline_names_its_codec(write_pipeline: WritePipeline) -> None:
    folder = write_pipeline()
    edit(folder / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])
    (folder / "vqvae").mkdir()
    codec = {"_class_name": "VQModel", "block_out_channels": [8, 8, 8], "scaling_factor": 0.5, "in_channels": 3}
    (folder / "vqvae" / "config.json").write_text(json.dumps(codec))
    found = load_model(folder)
    assert found.meta["codec"] == {
        "path": str(folder),
        "subfolder": "vqvae",
        "revision": None,
        "scaling_factor": 0.5,
        "factor": 4,
        "image_channels": 3,
    }
    with pytest.raises(ConfigError, match=r"clip_sample .*expected false with a codec"):
        adopt_model(load_preset("digits"), found)  # its scheduler clips
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    adopted = adopt_model(load_preset("digits"), load_model(folder)).codec
    assert adopted is not None and adopted.factor == 4
    edit(folder / "vqvae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(CheckpointError, match="AutoencoderTiny"):
        load_model(folder)


def test_a_hub_id_without_a_network_names_the_local_alternative(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for where in ("google/ddpm-cifar10-32@main", "hub:google/ddpm-cifar10-32@main"):
        with pytest.raises(CheckpointError) as error:
            load_model(where)
        message = str(error.value)
        assert "hf download google/ddpm-cifar10-32 --revision main --local-dir FOLDER" in message
        assert "--load FOLDER" in message


def test_a_wrong_local_path_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "fetch_from_hub", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "results").mkdir()
    for where in ("results/full", "nowhere", "./a/b", str(tmp_path / "a"), "a/b/c"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load_model(where)


def test_a_model_of_the_hub_is_read_in_two_steps(
    write_pipeline: WritePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Settings first, so that a model that cannot be read costs no download of its weights; the commit is recorded."""
    source = write_pipeline()
    snapshot = tmp_path / "snapshots" / ("c" * 40)
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(allow_patterns)
        assert (name, revision) == ("owner/digits", "v1")
        for pattern in allow_patterns:
            for path in source.glob(pattern):
                target = snapshot / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    found = load_model("owner/digits@v1")
    origin = found.meta["origin"]
    assert (origin["name"], origin["revision"], origin["commit"]) == ("owner/digits", "v1", "c" * 40)
    assert asked[1] == ["unet/diffusion_pytorch_model.safetensors"]
    assert found.model_hash == load_model(source).model_hash
    asked.clear()
    edit(source / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(CheckpointError, match="UNet2DConditionModel"):
        load_model("owner/digits@v1")
    assert len(asked) == 1


def test_a_model_of_the_hub_without_safetensors_is_refused_with_a_way_to_convert_it(
    write_pipeline: WritePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = write_pipeline()
    (source / "unet" / pipelines.WEIGHTS_NAME).unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(source))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"DiffusionPipeline\.from_pretrained\('owner/digits'\)"):
        load_model("owner/digits")


def test_our_own_checkpoints_are_read_as_before(unet_config: UNetConfig, tmp_path: Path) -> None:
    model = build_unet(unet_config)
    path = save_checkpoint(
        tmp_path,
        n_steps=3,
        unet=model.state_dict(),
        ema=model.state_dict(),
        meta={"unet": unet_config.model_dump(mode="json")},
    )
    assert isinstance(load_model(tmp_path), Checkpoint)
    assert load_model(tmp_path).path == path
    assert not pipelines.is_foreign(load_model(path))


def test_a_class_conditional_network_can_be_pruned_and_rebuilt(unet_config: UNetConfig) -> None:
    config = unet_config.replace(num_class_embeds=11)
    model = build_unet(config)
    width = model.class_embedding.embedding_dim  # pyright: ignore[reportOptionalMemberAccess]
    result = prune_unet(model, PruneConfig(pruning_ratio=0.5))
    assert model.class_embedding.weight.shape[1] < width  # pyright: ignore[reportOptionalMemberAccess]
    again = build_unet(config)
    apply_recipe(again, result.recipe)
    again.load_state_dict(model.state_dict())
    assert torch.equal(output_of(again), output_of(model))
